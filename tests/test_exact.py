"""One answer everywhere: compiled libraries return the logits of the NumPy reference, bit for bit."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tvm_vitq
from tvm_vitq import emulate
from tvm_vitq.calibrate import calibrate
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.recipes.adfq_vit import ADFQViT
from tvm_vitq.site_rules import Granularities
from tvm_vitq.targets import ISAS, parse

HOST_TARGETS = [isa.key for isa in ISAS if isa.arch == "x86_64"]
ARM_TARGETS = {isa.name: isa.key for isa in ISAS if isa.arch == "aarch64"}


def _graphs() -> Any:
    spec = importlib.util.spec_from_file_location("canonical_vit", Path(__file__).parent / "canonical_vit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BY_ROW: dict[str, Any] = {"granularity": "token", "axis": -2, "dynamic": True}
LOG2 = (
    SiteQuantizer(4, [0.5], [0], "log2", params={"grid": 2**15}),
    SiteQuantizer(3, [], [], "log2", params={"grid": 255}, **BY_ROW),
    SiteQuantizer(8, [1.0], [0], "twin_uniform", params={"grid": 2**15}),
)
"""Quantizers of the probabilities, block by block."""

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    # name: (graph, options of calibrate, books). Odd sizes on purpose: tails in rows, columns, depths, keys.
    "vit": (lambda g: g.tiny_vit(dim=48, heads=3, image=28, classes=37, batch=1), {}),
    "vit_batch": (lambda g: g.tiny_vit(batch=3, outliers=20.0, bias=True), {"bits": "w4a4"}),
    "gated": (
        lambda g: g.tiny_vit(gated=True, activation="silu", attention="sigmoid", pool="mean"),
        {"bits": "w3a8"},
    ),
    "mixer": (lambda g: g.tiny_mixer(), {"bits": "w6a6"}),
    "groups": (
        lambda g: g.tiny_vit(dim=64, depth=1),
        {"granularities": Granularities(weight_group=16, input_group=32), "recipe": "minmax"},
    ),
    "multiples": (
        lambda g: g.tiny_vit(dim=48, heads=3, image=28, classes=37, batch=1),
        {"bits": "w8a8", "recipe": "vs-quant"},
    ),
    "narrow_multiples": (
        lambda g: g.tiny_vit(depth=1, dim=48, heads=3, image=28, classes=37, batch=1),
        {"bits": "w4a4", "recipe": "vs-quant"},
    ),
    "tokens": (
        lambda g: g.tiny_vit(depth=1),
        {"granularities": Granularities(input="token"), "recipe": "minmax"},
    ),
    "outliers": (
        lambda g: g.tiny_vit(depth=1, outliers=20.0),
        {"bits": "w4a4", "recipe": ADFQViT(iterations=0)},
    ),
    "free_levels": (
        lambda g: g.tiny_vit(depth=1, dim=48, heads=3, image=28, batch=2),
        {"bits": "w4a4", "recipe": "auto-fast"},
    ),
    "instances": (
        lambda g: g.tiny_vit(depth=1, dim=48, heads=3, image=28),
        {"bits": "w4a4", "recipe": "igq-vit"},
    ),
    "heads": (lambda g: g.tiny_vit(depth=1, heads=4), {"granularities": Granularities(heads="head")}),
    "shift": (lambda g: g.tiny_vit(depth=1), {"requantize": "shift"}),
    "log2": (lambda g: g.tiny_vit(depth=3, heads=3, dim=48, bias=True), {"bits": "w8a4", "books": LOG2}),
    "shift_log2": (lambda g: g.tiny_vit(depth=1), {"requantize": "shift", "books": LOG2[:1]}),
}


@functools.cache
def quantized(name: str) -> tuple[QuantizedModel, np.ndarray, np.ndarray]:
    """A quantized model, images for three calls, and the reference's logits."""
    make, options = MODELS[name][0], dict(MODELS[name][1])
    books = options.pop("books", ())
    graph = make(_graphs())
    shape = tuple(int(v) for v in graph["main"].params[0].ty.shape)
    rng = np.random.default_rng(5)
    calibration = rng.normal(size=(8 * shape[0], *shape[1:])).astype(np.float32)
    model = SimpleNamespace(mod=graph, name=name, input_shape=shape, preprocessing=None)
    found = calibrate(model, calibration=calibration, progress=False, **options)
    probabilities = [name for name in found.plan.sites if name.endswith(".probs")]
    found.plan.sites.update(zip(probabilities, books, strict=bool(books)))
    qm = QuantizedModel(run_passes(found.mod, realize_passes(found.plan)), found.plan)
    images = rng.normal(size=(3 * shape[0], *shape[1:])).astype(np.float32)
    images[0] *= 4  # beyond the calibrated range
    return qm, images, qm.reference(images)


def run(library: Any, images: np.ndarray) -> np.ndarray:
    batch = library.info.input_shape[0]
    return np.concatenate([library(images[i : i + batch]) for i in range(0, len(images), batch)])


@pytest.mark.parametrize("target", HOST_TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_host_library_equals_reference(name, target):
    profile = parse(target)
    if profile.missing_here():
        pytest.skip(f"this CPU lacks {', '.join(profile.missing_here())}")
    qm, images, want = quantized(name)
    library = tvm_vitq.compile(qm, target)
    for threads in (1, 2):
        library.num_threads = threads
        np.testing.assert_array_equal(run(library, images), want)
    dots = [k for k in library.report["kernels"] if k["macs"]]
    assert dots and all(k["instruction"] in next(i for i in ISAS if i.key == target).summary for k in dots), (
        dots
    )


ARM_MODELS = [
    "vit", "vit_batch", "gated", "mixer", "groups", "multiples", "free_levels", "instances", "shift", "log2",
]  # fmt: skip


@pytest.mark.parametrize("isa", ARM_TARGETS)
@pytest.mark.parametrize("name", ARM_MODELS)
def test_aarch64_library_equals_reference(run_under_qemu, tmp_path, name, isa):
    qm, images, want = quantized(name)
    path = tvm_vitq.compile(qm, ARM_TARGETS[isa]).export_library(tmp_path / f"{name}.so")
    got = run_under_qemu(path, images, cpu=emulate.CPU_OF_ISA[isa], threads=2)
    np.testing.assert_array_equal(got, want)


def test_the_model_file_keeps_every_bit(tmp_path):
    qm, images, want = quantized("vit")
    qm.save(tmp_path / "model.vitq")
    again = tvm_vitq.load(tmp_path / "model.vitq")
    np.testing.assert_array_equal(again.reference(images), want)
    assert again.plan.hash == qm.plan.hash


def test_the_exported_library_runs_without_the_compiler(tmp_path):
    qm, images, want = quantized("vit")
    path = tvm_vitq.compile(qm).export_library(tmp_path / "model.so")
    loaded = tvm_vitq.load_library(path)
    np.testing.assert_array_equal(run(loaded, images), want)
    assert loaded.info.plan_hash == qm.plan.hash
    assert loaded.report["integer_coverage"] == 1.0
