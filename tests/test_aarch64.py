"""Cross-linked libraries on emulated AArch64 CPUs, and the C++ program that runs them."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from tvm_vitq import cpu, deploy_kit, emulate, library_format, targets
from tvm_vitq.errors import VitqError
from tvm_vitq.runtime import Library


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).integers(-8, 9, (3, 3, 8, 8)).astype("float32")


@pytest.fixture(scope="module")
def neon(toy_library, tmp_path_factory):
    return toy_library("aarch64-neon").export_library(tmp_path_factory.mktemp("lib") / "neon.so")


@pytest.mark.parametrize(("isa", "model"), emulate.CPU_OF_ISA.items())
def test_same_bits_on_every_core(run_under_qemu, toy_library, toy_module, images, tmp_path, isa, model):
    path = toy_library(f"aarch64-{isa}").export_library(tmp_path / "toy.so")
    for threads in (1, 2):
        result = run_under_qemu(path, images, cpu=model, threads=threads)
        np.testing.assert_array_equal(result, images.reshape(3, -1) @ toy_module[1])


def test_missing_instructions_are_told_by_the_program(run_under_qemu, toy_library, images, tmp_path):
    path = toy_library("aarch64-dotprod").export_library(tmp_path / "toy.so")
    with pytest.raises(VitqError, match=r"this CPU lacks: .*asimddp"):
        run_under_qemu(path, images, cpu="cortex-a72")


@pytest.mark.parametrize("isa", emulate.CPU_OF_ISA)
def test_emulated_cpus_have_what_libraries_of_their_isa_need(
    run_under_qemu, toy_library, images, tmp_path, isa
):
    """... and the class above does not run on the class below, so each CPU proves something of its own."""
    later = list(emulate.CPU_OF_ISA)[list(emulate.CPU_OF_ISA).index(isa) + 1 :]
    for other in later:
        path = toy_library(f"aarch64-{other}").export_library(tmp_path / f"{other}.so")
        with pytest.raises(VitqError, match="lacks"):
            run_under_qemu(path, images, cpu=emulate.CPU_OF_ISA[isa])


def test_functions_of_the_math_library_are_found(run_under_qemu, images, tmp_path):
    """Operators left in float may call libm, which the library does not name as a dependency."""
    import tvm
    from tvm import relax

    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            y = block.emit(relax.op.tan(relax.op.exp(x)))
            out = block.emit_output(relax.op.reshape(y, (1, 192)))
        block.emit_func_output(out)
    profile = targets.parse("aarch64-neon")
    executable = tvm.compile(block.get(), profile.target)
    info = library_format.LibraryInfo("float", profile, (1, 3, 8, 8), 192)
    path = Library(info, executable=executable).export_library(tmp_path / "float.so")
    small = images[:1] / 16
    np.testing.assert_allclose(run_under_qemu(path, small).ravel(), np.tan(np.exp(small)).ravel(), rtol=1e-4)


def test_unknown_cpu_model(run_under_qemu, neon, images):
    with pytest.raises(VitqError, match="nosuch"):
        run_under_qemu(neon, images, cpu="nosuch")


def test_wrong_input(run_under_qemu, neon, toy_library, images, tmp_path):
    with pytest.raises(VitqError, match="shape"):
        run_under_qemu(neon, images[:, :, :4])
    with pytest.raises(VitqError, match="dtype"):
        run_under_qemu(neon, images.astype("float64"))
    with pytest.raises(VitqError, match="NaN"):
        run_under_qemu(neon, images * np.float32("nan"))
    with pytest.raises(VitqError, match="not for AArch64"):
        run_under_qemu(toy_library("x86-64").export_library(tmp_path / "x.so"), images)


def test_missing_tools_are_told(neon, images, monkeypatch):
    monkeypatch.setattr(emulate.shutil, "which", lambda name: None)
    with pytest.raises(VitqError, match="apt-get install qemu-user"):
        emulate.run_aarch64(neon, images)


# The same program on this machine.


@pytest.fixture(scope="module")
def program():
    if shutil.which("g++") is None:
        reason = "no g++ for this machine: apt-get install g++"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return deploy_kit.cached(cpu.host().arch) / "vitq_run"


@pytest.fixture(scope="module")
def library(toy_library, tmp_path_factory):
    return toy_library().export_library(tmp_path_factory.mktemp("lib") / "toy.so")


def run(program, *arguments, cwd=None):
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert "Traceback" not in done.stderr
    return done


def test_program_on_this_machine(program, library, toy_module, images, tmp_path):
    images.tofile(tmp_path / "in.bin")
    options = ["--threads", 2, "--repeat", 3, "--output", tmp_path / "out.bin"]
    done = run(program, library.name, tmp_path / "in.bin", *options, cwd=library.parent)
    assert done.returncode == 0, done.stderr
    expected = images.reshape(3, -1) @ toy_module[1]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out.bin", "float32").reshape(3, -1), expected)
    assert re.search(rf"image 0:  class {expected[0].argmax()} ", done.stdout)
    assert "median of 9 runs" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["in.bin", "out.bin"]


def test_program_describes_libraries_of_other_machines(program, neon):
    done = run(program, neon, "--info")
    assert (done.returncode, done.stdout) == (0, "toy for aarch64-neon, input 1x3x8x8, 96 classes\n")


def test_program_refuses_bad_libraries(program, library, neon, tmp_path):
    good = library.read_bytes()
    info = library_format.read(library)
    newer = dataclasses.replace(info.target, features=(*info.target.features, "avx1024"))
    library_format.write(tmp_path / "newer.so", library, dataclasses.replace(info, target=newer))
    cases = {
        "cannot open": None,
        "truncated": good[:-1],
        "its length": good[:100] + good[101:],
        "its checksum": good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
        "library format 9": good[:-12] + b"\x09\0\0\0" + good[-8:],
        "another architecture": neon.read_bytes() if cpu.host().arch == "x86_64" else None,
        "this CPU lacks: avx1024": (tmp_path / "newer.so").read_bytes(),
    }
    (tmp_path / "in.bin").write_bytes(bytes(4 * 3 * 8 * 8))
    for words, content in cases.items():
        path = tmp_path / "case.so"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        done = run(program, path, tmp_path / "in.bin")
        assert done.returncode == 1
        assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage"),
        (["one.so", "--fast"], "unknown option"),
        (["--threads"], "wants a value"),
        (["--threads", "0"], "1 or more"),
        (["--repeat", "3x"], "1 or more"),
    ],
)
def test_program_refuses_bad_arguments(program, arguments, words):
    done = run(program, *arguments)
    assert done.returncode == 1
    assert words in done.stderr


def test_program_refuses_bad_images(program, library, images, tmp_path):
    path = tmp_path / "in.bin"
    for words, content in {
        "cannot open": None,
        "expected a multiple of 768": images.tobytes()[:-4],
        "has 0 bytes": b"",
        "NaN or infinity": np.full((1, 3, 8, 8), np.inf, "float32").tobytes(),
    }.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        done = run(program, library, path)
        assert done.returncode == 1
        assert words in done.stderr
    images.tofile(path)
    done = run(program, library, path, "--output", tmp_path / "no" / "out.bin")
    assert done.returncode == 1
    assert "cannot write" in done.stderr


def test_kit_errors(tmp_path, monkeypatch):
    with pytest.raises(VitqError, match="no kit"):
        deploy_kit.make("riscv64", tmp_path / "kit")
    monkeypatch.setattr(deploy_kit.shutil, "which", lambda name: None)
    with pytest.raises(VitqError, match="apt-get install"):
        deploy_kit.make("aarch64", tmp_path / "kit")
    assert os.listdir(tmp_path) == []


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    other = "aarch64" if cpu.host().arch == "x86_64" else "x86_64"
    monkeypatch.setattr(deploy_kit, "_compiler", lambda arch: "g++")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(VitqError, match="cannot download"):
        deploy_kit.make(other, tmp_path / "kit")
    assert os.listdir(tmp_path) == []
