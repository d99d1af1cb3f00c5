"""The reference models and their images: function, accuracy, and collapse under naive quantization."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from tvm_vitq import VitqError, refmodels
from tvm_vitq.refmodels import scenes
from tvm_vitq.refmodels.outliers import normalized_linears
from tvm_vitq.refmodels.packing import pack, unpack

BASES = ["vit", "swin"]
COUNT = 400


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sample() -> tuple[torch.Tensor, np.ndarray]:
    images, labels = refmodels.test_set()
    return torch.from_numpy(images[:COUNT]), labels[:COUNT]


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(250)])


def top1(scores: torch.Tensor, labels: np.ndarray) -> float:
    return 100 * float((scores.argmax(1).numpy() == labels).mean())


def fake_quantized(values: torch.Tensor, low: float, high: float, bits: int) -> torch.Tensor:
    """Plain asymmetric per-tensor quantization over [low, high], which is widened to hold zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return (torch.clamp(torch.round(values / scale) + zero, 0, 2**bits - 1) - zero) * scale


@contextmanager
def naive_quantization(model: nn.Module, bits: int) -> Iterator[None]:
    """Per-tensor min/max fake quantization of every linear layer's input and weight."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    ranges: dict[nn.Linear, tuple[float, float]] = {}

    def observe(module, inputs):
        ranges[module] = (float(inputs[0].min()), float(inputs[0].max()))

    hooks = [module.register_forward_pre_hook(observe) for module in linears]
    logits(model, torch.from_numpy(refmodels.calibration_images()[:64]))
    for hook in hooks:
        hook.remove()
    for module in linears:
        weight = module.weight
        module.weight.data = fake_quantized(weight, float(weight.min()), float(weight.max()), bits)
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: (fake_quantized(inputs[0], *ranges[module], bits),)
        )
        for module in linears
    ]
    yield
    for hook in hooks:
        hook.remove()


def test_names():
    assert refmodels.names() == ["vit", "vit_outlier", "swin", "swin_outlier"]
    with pytest.raises(VitqError, match="vit_outlier"):
        refmodels.load_model("vit_outliers")


def test_images():
    images, labels = refmodels.test_set_uint8()
    assert images.shape == (3000, 32, 32, 3) and images.dtype == np.uint8
    assert labels.shape == (3000,) and labels.dtype == np.int64
    assert len(refmodels.class_names()) == 36
    assert np.ptp(np.bincount(labels, minlength=36)) <= 1
    normalized, again = refmodels.test_set()
    assert normalized.shape == (3000, 3, 32, 32) and normalized.dtype == np.float32
    assert np.array_equal(labels, again)
    calibration = refmodels.calibration_images()
    assert calibration.shape == (256, 3, 32, 32) and calibration.dtype == np.float32
    assert np.abs(calibration.mean((0, 2, 3))).max() < 0.2
    assert np.abs(calibration.std((0, 2, 3)) - 1).max() < 0.2
    assert np.array_equal(refmodels.normalize(refmodels.calibration_images_uint8()), calibration)


def test_images_need_no_torch():
    code = (
        "import sys; from tvm_vitq import refmodels; refmodels.test_set(); refmodels.calibration_images();"
        "sys.exit(bool({'torch', 'timm', 'tvm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_packing_is_lossless():
    images = np.random.default_rng(0).integers(0, 32, (5, 7, 9, 3), dtype=np.uint8) * np.uint8(8)
    assert np.array_equal(unpack(pack(images, 32), 32), images)


def test_shipped_images_are_the_generated_ones():
    """Equal up to rounding of the platform's sines; training and test sources share nothing."""
    train, test = scenes.TRAIN, scenes.TEST
    assert train.stream != test.stream and not set(train.backgrounds) & set(test.backgrounds)
    for field in ("hues", "proportions"):
        intervals = sorted(getattr(train, field) + getattr(test, field))
        assert all(left[1] <= right[0] for left, right in pairwise(intervals))
    assert list(scenes.CLASSES) == refmodels.class_names()
    shipped = refmodels.meta()["images"]["calibration"]
    images, _ = scenes.draw(train, shipped["count"], shipped["seed"], shipped["severity"])
    difference = np.abs(images.astype(int) - refmodels.calibration_images_uint8().astype(int))
    assert (difference > 0).mean() < 1e-3


def test_more_test_images_are_new():
    images, labels = refmodels.more_test_images(72)
    assert images.shape == (72, 3, 32, 32) and sorted(labels) == sorted(list(range(36)) * 2)
    assert not any((images[0] == known).all() for known in refmodels.test_set()[0])


@pytest.mark.parametrize("base", BASES)
def test_outlier_variant_is_the_same_function(base, sample):
    plain, variant = refmodels.load_model(base), refmodels.load_model(f"{base}_outlier")
    images = sample[0][:64]
    assert (logits(plain, images) - logits(variant, images)).abs().max() < 1e-4
    norms = [module for module in plain.modules() if isinstance(module, nn.LayerNorm)]
    pairs = zip(normalized_linears(plain), normalized_linears(variant), strict=True)
    for (path, before, _), (_, after, _) in pairs:
        factors = (after.weight / before.weight).numpy()
        share = (factors > 1.5).mean()
        assert 0.05 <= share <= 0.10, path
        assert factors[factors > 1.5].min() >= 7.9 and factors.max() <= 40.1
    # Only Swin's norm behind the patch embedding feeds a residual stream and stays as it is.
    assert len(norms) - len(normalized_linears(plain)) == (1 if base == "swin" else 0)


@pytest.mark.parametrize("arguments", [{"fraction": 0.0}, {"low": 0.0}, {"low": 9.0, "high": 8.0}])
def test_outlier_arguments(arguments):
    with pytest.raises(VitqError, match="out of range"):
        refmodels.add_outliers(refmodels.load_model("vit"), **arguments)
    with pytest.raises(VitqError, match="LayerNorm"):
        refmodels.add_outliers(nn.Linear(2, 2))


@pytest.mark.parametrize("base", BASES)
def test_accuracy(base, sample):
    recorded = refmodels.meta()["top1_percent"]
    assert 80 <= recorded[base] <= 93
    assert recorded[f"{base}_outlier"] == pytest.approx(recorded[base], abs=0.05)
    measured = top1(logits(refmodels.load_model(base), sample[0]), sample[1])
    assert measured == pytest.approx(recorded[base], abs=4)  # 400 of 3000 images: 3 standard deviations


@pytest.mark.parametrize("base", BASES)
def test_naive_quantization_collapses_on_outliers_only(base, sample):
    images, labels = sample
    full = top1(logits(refmodels.load_model(base), images), labels)
    result = {}
    for name, bits in ((base, 8), (base, 4), (f"{base}_outlier", 4)):
        model = refmodels.load_model(name)
        with naive_quantization(model, bits):
            result[name, bits] = top1(logits(model, images), labels)
    assert result[base, 8] > full - 1.5
    assert result[f"{base}_outlier", 4] < full - 30
    assert result[f"{base}_outlier", 4] < result[base, 4] - 15
