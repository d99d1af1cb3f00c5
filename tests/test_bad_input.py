"""Bad input through the whole package: what the user is told, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tvm
from canonical_vit import tiny_vit
from PIL import Image
from torch import nn
from tvm import relax

import tvm_vitq
from tvm_vitq import cli, ops, runtime
from tvm_vitq.artifacts import open_model
from tvm_vitq.calibrate.sources import load_images
from tvm_vitq.cli import main
from tvm_vitq.errors import VitqError, nearest

SHAPE = (1, 3, 32, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


class Wide(nn.Module):
    """A layer whose inputs are so many that equal weights overflow int32."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 4))
        nn.init.constant_(self.mlp[1].weight, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


@pytest.fixture(scope="module")
def quantized():
    """The smallest model that has every part of a file."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    images = np.random.default_rng(0).standard_normal((4, 3, 2, 2), dtype=np.float32)
    return tvm_vitq.quantize(module, input_shape=(3, 2, 2), calibration=images, progress=False)


# Errors that cross C++


def unfitting() -> None:
    x = relax.Var("x", relax.TensorType((1, 4, 8), "float32"))
    weight, bias = relax.const(np.zeros((5, 7), "float32")), relax.const(np.zeros(5, "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            out = block.emit_output(ops.call("vitq.linear", [x, weight, bias], site="head"))
        block.emit_func_output(out)


def test_type_inference_tells_a_vitq_error():
    with pytest.raises(VitqError) as caught:
        unfitting()
    assert caught.value.what == "vitq.linear has unfitting operands" and caught.value.where == "head"
    assert caught.value.got == "float32[1, 4, 8], float32[5, 7], float32[5]"
    assert str(caught.value).endswith("expected: x[..., K], weight[N, K], bias[N]")


@pytest.mark.parametrize("error", [VitqError("no", where="blocks.0", fix="so"), KeyboardInterrupt()])
def test_errors_of_passes_arrive_as_themselves(error):
    def fail(*_):
        raise error

    @relax.expr_functor.mutator
    class Mutator(relax.PyExprMutator):
        visit_call_ = fail

    mod = tiny_vit()
    by_module = tvm.transform.module_pass(fail, opt_level=0)
    for run in (
        lambda: by_module(mod),
        lambda: tvm.transform.Sequential([by_module])(mod),
        lambda: relax.transform.function_pass(fail, opt_level=0)(mod),
        lambda: Mutator(mod).visit_expr(mod["main"]),
    ):
        with pytest.raises(type(error)) as caught:
            run()
        assert str(caught.value) == str(error)


def test_error_survives_its_text():
    error = VitqError("a\nb", where="w", got="two\n  lines", fix="f")
    for again in (VitqError(str(error)), pickle.loads(pickle.dumps(error))):
        assert str(again) == str(error)
        assert (again.what, again.where, again.got, again.expected, again.fix) == (
            "a\nb",
            "w",
            "two\n  lines",
            None,
            "f",
        )


def test_additions_of_any_rank():
    """The second operand may have more axes than the first."""
    a, b = (relax.Var("x", relax.TensorType(s, "int32")) for s in ((4,), (2, 1, 4)))
    block = relax.BlockBuilder()
    with block.function("main", [a, b]):
        for pair in ([a, b], [b, a]):
            assert ops.shape_of(block.emit(ops.call("vitq.int_add", pair, out_dtype="int32"))) == [2, 1, 4]
        block.emit_func_output(a)


# Models and targets


def test_far_names_are_not_suggested():
    assert nearest("deit_tinny", ["rdnet_tiny", "deit_tiny_patch16_224"]).startswith("deit_tiny_patch16_224")
    assert nearest("nonsense", ["bonnell", "senet154"]) == ""


def test_weights_given_as_the_model(folder, capsys):
    for verb in ("quantize", "build"):
        assert main([verb, str(folder / "weights.pth"), "-o", str(folder / "x.so")]) == 2
        assert "as checkpoint" in capsys.readouterr().err


def test_overflow_is_refused_by_layer():
    images = np.random.default_rng(0).random((2, 3, 224, 224), dtype=np.float32)
    for what, overrides in (
        ("the layer", {}),
        ("a group", {"*.weight": {"granularity": "group", "group_size": 3 * 224 * 112}}),
    ):
        with pytest.raises(VitqError, match=rf"accumulator of {what}[\s\S]*mlp\.1[\s\S]*fewer bits"):
            tvm_vitq.quantize(
                Wide(), input_shape=(3, 224, 224), calibration=images, overrides=overrides, progress=False
            )


# Calibration


def test_images_in_any_memory_layout():
    data = np.random.default_rng(0).random((2, *SHAPE[1:]), dtype=np.float32)
    frozen = data.copy()
    frozen.flags.writeable = False
    for given, plain in ((data[:, :, ::-1], data[:, :, ::-1].copy()), (frozen, data)):
        assert (load_images(given, SHAPE).values.numpy() == plain).all()


@pytest.mark.parametrize("content", [b"", b"P6 x 10 255 " + bytes(60), b"II*\0" + bytes(range(60)), "half"])
def test_corrupt_images(tmp_path, content):
    """Pillow raises another type for each of them."""
    if content == "half":
        Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
        content = (tmp_path / "whole.png").read_bytes()[:900]
        (tmp_path / "whole.png").unlink()
    (tmp_path / "bad.ppm").write_bytes(content)
    with pytest.raises(VitqError, match=r"unreadable image[\s\S]*bad\.ppm[\s\S]*fix"):
        load_images(tmp_path, SHAPE)


def test_file_instead_of_a_folder(tmp_path):
    (tmp_path / "images.npz").write_bytes(b"")
    with pytest.raises(VitqError, match=r"not a folder[\s\S]*images\.npz[\s\S]*\.npy"):
        load_images(tmp_path / "images.npz", SHAPE)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04aaa", "cut", "objects"])
def test_bad_npy(tmp_path, capsys, content):
    path = tmp_path / "images.npy"
    np.save(path, np.array([None]) if content == "objects" else np.zeros((4, *SHAPE[1:]), "float32"))
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    output = tmp_path / "x.vitq"
    assert main(["quantize", "refmodel:vit", "--calibration", str(path), "-o", str(output)]) == 2
    err = capsys.readouterr().err
    assert "cannot read the calibration images" in err and str(path) in err and "numpy.save" in err
    assert os.listdir(tmp_path) == ["images.npy"]


# Files of another kind or content


def rewritten(source: Path, target: Path, entry: str, content: bytes | None) -> Path:
    """A copy of a model file with one entry replaced or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name != entry:
                new.writestr(name, old.read(name))
            elif content is not None:
                new.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("entry", "content"),
    [
        ("header.json", b"[]"),
        ("header.json", None),
        ("plan.json", b"{}"),
        ("graph.json", None),
        ("graph.json", b"{}"),
        ("graph.json", b'{"root_index": 0, "nodes": ['),
        ("graph.json", b'{"root_index":0,"nodes":[{"type":"None"}],"metadata":{}}'),
        ("graph.json", b"\xff\xfe"),
        ("graph.json", "unknown operator"),
        ("graph.json", "no function"),
    ],
)
def test_model_file_with_foreign_parts(quantized, tmp_path, entry, content):
    quantized.save(tmp_path / "whole.vitq")
    if content == "unknown operator":
        content = (
            zipfile.ZipFile(tmp_path / "whole.vitq").read(entry).replace(b"vitq.int_linear", b"vitq.nope")
        )
    if content == "no function":
        content = tvm.ir.save_json(tvm.IRModule({})).encode()
    with pytest.raises(VitqError, match=r"bad\.vitq"):
        tvm_vitq.load(rewritten(tmp_path / "whole.vitq", tmp_path / "bad.vitq", entry, content))


@pytest.mark.parametrize("keep", [0, 10, 1000, -1, -100])
def test_truncated_model_file(quantized, tmp_path, keep):
    path = tmp_path / "cut.vitq"
    quantized.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VitqError, match=r"truncated[\s\S]*cut\.vitq[\s\S]*write it again"):
        tvm_vitq.load(path)


def test_only_models_are_compiled(quantized, tmp_path):
    quantized.plan.save(tmp_path / "plan.json")
    with pytest.raises(VitqError, match=r"a plan cannot be compiled[\s\S]*--from-plan"):
        open_model(tmp_path / "plan.json")


def test_reference_refuses_what_libraries_refuse(quantized):
    good = np.zeros((1, 3, 2, 2), "float32")
    assert (
        quantized.reference(torch.zeros(1, 3, 2, 2, requires_grad=True)) == quantized.reference(good)
    ).all()
    for bad in (
        good + np.float32("nan"),
        good + np.float32("inf"),
        good[:0],
        good[0],
        good.astype("float64"),
    ):
        with pytest.raises(VitqError, match="reference"):
            quantized.reference(bad)


# Files are written whole or not at all


@contextlib.contextmanager
def full_disk():
    """The operating system refuses to make any file larger than 1000 bytes, pytest's own output included."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("old", [None, b"old"])
def test_refused_writes_leave_the_old_file_or_none(quantized, tmp_path, old):
    for name, write in (("m.vitq", quantized.save), ("plan.json", quantized.plan.save)):
        if old:
            (tmp_path / name).write_bytes(old)
        message = rf"cannot write[\s\S]*{name}[\s\S]*nothing was left"
        with pytest.raises(VitqError, match=message), full_disk():
            write(tmp_path / name)
        assert os.listdir(tmp_path) == ([name] if old else [])
        if old:
            assert (tmp_path / name).read_bytes() == old
            (tmp_path / name).unlink()


def test_room_for_linking_is_checked(quantized, tmp_path, monkeypatch):
    """LLVM would end the process."""
    library = tvm_vitq.compile(quantized)
    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(runtime.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(VitqError, match=r"too little space[\s\S]*1000 bytes[\s\S]*TMPDIR"):
        library.export_library(tmp_path / "x.so")
    assert os.listdir(tmp_path) == []


def test_interruption_in_a_destructor_counts(monkeypatch, capsys):
    """Python itself would print it and go on."""

    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def run(_):
        Dropped()
        time.sleep(20)

    monkeypatch.setattr(cli.doctor, "run", run)
    before = sys.unraisablehook
    start = time.monotonic()
    assert main(["doctor"]) == 130
    assert time.monotonic() - start < 10 and sys.unraisablehook is before
    assert "interrupted" in capsys.readouterr().err
