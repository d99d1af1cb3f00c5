"""Exported libraries: format, errors, loading, running."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest

from tvm_vitq import cpu, ffi, library_format, runtime
from tvm_vitq.errors import VitqError
from tvm_vitq.runtime import load_library


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(-8, 9, (1, 3, 8, 8)).astype("float32")


@pytest.fixture(scope="module")
def expected(images, toy_module):
    return images.reshape(1, -1) @ toy_module[1]


@pytest.fixture(scope="module")
def exported(toy_library, tmp_path_factory):
    return toy_library().export_library(tmp_path_factory.mktemp("lib") / "toy.so")


@pytest.fixture
def copy(exported, tmp_path):
    path = tmp_path / "copy.so"
    path.write_bytes(exported.read_bytes())
    return path


def test_compiled_library_runs(toy_library, images, expected):
    result = toy_library()(images)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


def test_results_are_copies(exported, images, expected):
    library = load_library(exported)
    first = library(images)
    library(-images)
    np.testing.assert_array_equal(first, expected)


def test_exported_library_knows_itself(exported, toy_library):
    library = load_library(exported)
    assert library.info == toy_library().info
    assert library.report == {"note": "µ"}
    assert library.executable is None
    assert "toy" in repr(library)


def test_size_is_that_of_the_weights(exported, toy_module):
    assert exported.stat().st_size < toy_module[1].nbytes + 40_000


def test_export_of_a_loaded_library(exported, tmp_path, images, expected):
    again = load_library(exported).export_library(tmp_path / "again.so")
    assert again.read_bytes() == exported.read_bytes()
    assert load_library(again).export_library(again) == again  # onto itself
    np.testing.assert_array_equal(load_library(again)(images), expected)


def test_relative_path(exported, images, expected, monkeypatch):
    monkeypatch.chdir(exported.parent)
    library = load_library("toy.so")
    np.testing.assert_array_equal(library(images), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_results(exported, images, expected, threads):
    np.testing.assert_array_equal(load_library(exported, num_threads=threads)(images), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_leaves_the_cores_of_its_thread_alone(exported, images, threads):
    before = os.sched_getaffinity(0)
    load_library(exported, num_threads=threads)(images)
    assert os.sched_getaffinity(0) == before


def test_thread_settings(exported, monkeypatch):
    library = load_library(exported)
    assert library.benchmark(repeat=2)["threads"] == cpu.usable_cores()
    monkeypatch.setenv("VITQ_NUM_THREADS", "2")
    assert library.benchmark(repeat=2)["threads"] == 2
    library.num_threads = 1
    assert library.benchmark(repeat=2)["threads"] == 1
    with pytest.raises(VitqError, match="number of threads"):
        load_library(exported, num_threads=-1)
    library.num_threads = 0
    monkeypatch.setenv("VITQ_NUM_THREADS", "-2")
    with pytest.raises(VitqError, match="VITQ_NUM_THREADS"):
        library.benchmark(repeat=2)


def test_the_number_of_threads_grows_up_to_the_first(exported, images):
    """TVM's pool of a thread does not grow; what it cannot do is refused."""
    library = load_library(exported)
    most = cpu.usable_cores() + 1
    found = []

    def calls():
        for threads in (most, 1, most, most + 1, 1):
            library.num_threads = threads
            try:
                library(images)
                found.append(ffi.runtime().get_global_func("runtime.NumThreads")())
            except VitqError as error:
                found.append(error.what)

    thread = threading.Thread(target=calls)  # has a pool of its own
    thread.start()
    thread.join()
    assert found == [most, 1, most, "too many threads", 1]


def test_calls_from_several_threads(exported, images, expected):
    library = load_library(exported)
    results = []
    workers = [threading.Thread(target=lambda: results.append(library(images))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all((result == expected).all() for result in results)


def test_benchmark(exported):
    timing = load_library(exported).benchmark(repeat=5)
    assert timing["runs"] == 5
    assert 0 < timing["min_ms"] <= timing["p10_ms"] <= timing["median_ms"] <= timing["p90_ms"]
    assert timing["images_per_second"] == pytest.approx(1000 / timing["median_ms"])
    with pytest.raises(VitqError, match="repeat"):
        load_library(exported).benchmark(repeat=0)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((1, 3, 8, 9), "float32"), "shape"),
        (np.zeros((2, 3, 8, 8), "float32"), "batch"),
        (np.zeros((3, 8, 8), "float32"), "shape"),
        (np.zeros((1, 3, 8, 8), "float64"), "astype"),
        (np.zeros((1, 3, 8, 8), "uint8"), "dtype"),
        (np.full((1, 3, 8, 8), np.nan, "float32"), "NaN"),
        (np.full((1, 3, 8, 8), np.inf, "float32"), "infinity"),
        (np.zeros((1, 3, 8, 8), ">f4"), "dtype"),
        ([[0.0]], "wrong type"),
        (None, "wrong type"),
    ],
)
def test_bad_input_is_refused(exported, x, words):
    with pytest.raises(VitqError, match=words):
        load_library(exported)(x)


def test_input_in_any_memory_layout(exported, images, expected):
    library = load_library(exported)
    np.testing.assert_array_equal(library(np.asfortranarray(images)), expected)
    unaligned = np.frombuffer(b"\0" + images.tobytes(), np.uint8)[1:].view(np.float32).reshape(images.shape)
    np.testing.assert_array_equal(library(unaligned), expected)


def test_torch_input(exported, images, expected):
    torch = pytest.importorskip("torch")
    library = load_library(exported)
    np.testing.assert_array_equal(library(torch.from_numpy(images).requires_grad_()), expected)
    for bad in (torch.zeros(images.shape, dtype=torch.bfloat16), torch.zeros(images.shape, device="meta")):
        with pytest.raises(VitqError, match=r"cannot be read[\s\S]*x\.float"):
            library(bad)


@pytest.mark.parametrize("keep", [0, 3, 40, 1000, -1, -40])
def test_truncated_library(copy, keep):
    copy.write_bytes(copy.read_bytes()[:keep])
    with pytest.raises(VitqError, match=r"truncated|not a compiled library|without the metadata"):
        load_library(copy)


@pytest.mark.parametrize("at", [5000, -40, -30, -22])
def test_damaged_library(copy, at):
    data = bytearray(copy.read_bytes())
    data[at] ^= 0x10
    copy.write_bytes(data)
    with pytest.raises(VitqError, match="damaged"):
        load_library(copy)


def test_foreign_files(tmp_path):
    text = tmp_path / "model.onnx"
    text.write_bytes(b"not a library" * 100)
    with pytest.raises(VitqError, match="not a compiled library"):
        load_library(text)
    with pytest.raises(VitqError, match="without the metadata"):
        load_library(sys.executable if os.path.islink(sys.executable) else "/bin/ls")
    with pytest.raises(VitqError, match="cannot read"):
        load_library(tmp_path / "missing.so")
    with pytest.raises(VitqError, match="cannot read"):
        load_library(tmp_path)


def test_other_format_version(copy):
    data = copy.read_bytes()
    elf, text, checksum, version, magic = library_format.TRAILER.unpack(data[-32:])
    copy.write_bytes(data[:-32] + library_format.TRAILER.pack(elf, text, checksum, version + 1, magic))
    with pytest.raises(VitqError, match="another version"):
        load_library(copy)


@pytest.mark.parametrize("text", [b"text", b"[]", b"{}", b'{"target": {}, "input_shape": []}'])
def test_malformed_metadata(copy, text):
    data = copy.read_bytes()
    elf, _, _, version, magic = library_format.TRAILER.unpack(data[-32:])
    body = data[:elf] + text
    copy.write_bytes(body + library_format.TRAILER.pack(elf, len(text), zlib.crc32(body), version, magic))
    with pytest.raises(VitqError, match=r"malformed metadata[\s\S]*copy\.so[\s\S]*again"):
        load_library(copy)


def test_library_of_another_architecture(toy_library, tmp_path, images):
    other = "aarch64-neon" if cpu.host().arch == "x86_64" else "x86-64"
    library = toy_library(other)
    path = library.export_library(tmp_path / "other.so")
    for use in (lambda: library(images), lambda: load_library(path)):
        with pytest.raises(VitqError, match="another architecture"):
            use()


def test_library_of_a_newer_cpu(exported, tmp_path):
    info = library_format.read(exported)
    newer = dataclasses.replace(info.target, features=(*info.target.features, "avx1024"))
    path = tmp_path / "newer.so"
    library_format.write(path, exported, dataclasses.replace(info, target=newer))
    with pytest.raises(VitqError, match="missing here: avx1024"):
        load_library(path)


def test_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    def refuse(source, destination):
        destination.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime.shutil, "copyfile", refuse)
    with pytest.raises(VitqError, match="No space left"):
        load_library(exported).export_library(tmp_path / "toy.so")
    assert os.listdir(tmp_path) == []


def test_full_temporary_folder(toy_library, tmp_path, monkeypatch):
    monkeypatch.setattr(
        runtime.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(VitqError, match="TMPDIR"):
        toy_library().export_library(tmp_path / "toy.so")


def test_linker_failure_is_told(tmp_path):
    from tvm_vitq import linker

    (tmp_path / "bad.o").write_text("no object file")
    with pytest.raises(VitqError, match="linking the library failed"):
        linker.link(str(tmp_path / "out.so"), [str(tmp_path / "bad.o")])


def test_loading_needs_neither_torch_nor_the_compiler(exported, images, expected, tmp_path):
    """In a fresh process; load and first inference together take less than the promised second.

    Processor time, because a busy machine stretches the clock on the wall.
    """
    np.save(tmp_path / "x.npy", images)
    code = (
        "import sys, time\n"
        "import json, numpy, tvm_vitq\n"
        "y = tvm_vitq.load_library(sys.argv[1], num_threads=1)(numpy.load(sys.argv[2]))\n"
        "spent = time.process_time()\n"
        "loaded = sorted({'torch', 'timm', 'tvm'} & sys.modules.keys())\n"
        "print(json.dumps({'spent': spent, 'loaded': loaded, 'y': y.tolist()}))\n"
    )
    command = [sys.executable, "-c", code, str(exported), str(tmp_path / "x.npy")]
    answers = [json.loads(subprocess.check_output(command)) for _ in range(3)]
    assert answers[0]["loaded"] == []
    np.testing.assert_array_equal(np.float32(answers[0]["y"]), expected)
    assert min(answer["spent"] for answer in answers) < 1.0


def test_compiler_and_torch_still_work_after_a_light_load(exported, tmp_path):
    """The runtime is loaded first without torch; TVM's importer must accept torch tensors afterwards."""
    code = (
        "import sys, tvm_vitq; library = tvm_vitq.load_library(sys.argv[1]); library.benchmark(repeat=1)\n"
        "import torch, tvm, numpy\n"
        "from tvm.relax.frontend.torch import from_exported_program\n"
        "model = torch.nn.Linear(4, 4).eval()\n"
        "module = from_exported_program(torch.export.export(model, (torch.zeros(1, 4),)))\n"
        "x = torch.ones(library.info.input_shape)\n"
        "assert (library(x) == library(x.numpy())).all(); print('main' in str(module))\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code, str(exported)], text=True).strip() == "True"
