"""Calibration images made from a model."""

from __future__ import annotations

import pytest
import torch

import tvm_vitq
from tvm_vitq import VitqError, refmodels
from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.patch_similarity import PatchSimilarity, _Spread
from tvm_vitq.calibrate.synthesize import synthesize
from tvm_vitq.frontend import import_model


@pytest.fixture(scope="module", params=["vit", "swin"])
def model(request):
    return import_model(refmodels.load_model(request.param), input_shape=(3, 32, 32), batch=2)


def entropy(model, images) -> float:
    executor = Executor(model.mod)
    spread = _Spread(frozenset(s.name for s in executor.steps if s.op == "vitq.attention"), executor.batch)
    with torch.no_grad():
        executor.run(images, spread)
    return float(spread.entropy)


def test_images_spread_similarities_and_show_something(model):
    """Both parts of the objective improve on the images that it starts from."""
    asked = PatchSimilarity(images=3, iterations=12)
    images = asked.make(model.mod, None, seed=5, show_progress=False)
    start = synthesize(3, (3, 32, 32), None, 5)
    assert images.shape == (3, 3, 32, 32)
    assert bool(torch.isfinite(images).all())
    low, high = start.amin((2, 3), keepdim=True), start.amax((2, 3), keepdim=True)
    assert bool(((images >= low) & (images <= high)).all())
    assert entropy(model, images) > entropy(model, start)
    confident = [Executor(model.mod).run(x).softmax(-1).amax(-1).mean() for x in (images, start)]
    assert confident[0] > confident[1]


def test_equal_seeds_give_equal_images(model):
    asked = PatchSimilarity(images=2, iterations=2)
    first, again, other = (asked.make(model.mod, None, seed, False) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_density_of_known_similarities():
    """Of three tokens two are alike: similarities 1, 0 and 0, each a Gaussian bump."""
    x = torch.zeros(1, 1, 1, 3, 4)
    x[0, 0, 0, :2, 0] = 1.0
    x[0, 0, 0, 2, 1] = 1.0
    spread = _Spread(frozenset({"o"}), 1)
    spread.value("o", x)
    points = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    width = 0.05

    def kernel(centre: float) -> torch.Tensor:
        return (-0.5 * ((points - centre) / width) ** 2).exp() / (width * (2 * torch.pi) ** 0.5)

    density = (kernel(1.0) + 2 * kernel(0.0)) / 3
    expected = -torch.trapezoid(torch.xlogy(density, density.clamp(min=1e-300)), points)
    assert float(spread.entropy) == pytest.approx(float(expected), abs=0.02)


def test_quantize_takes_the_name_and_the_plan_says_so():
    quantized = tvm_vitq.quantize(
        "refmodel:vit", calibration="patch-similarity", calibration_count=2, progress=False
    )
    assert "PatchSimilarity(images=2" in quantized.plan.calibration.source
    assert quantized.plan.calibration.count == 2


def test_a_model_without_attention_is_refused():
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(12, 3)

        def forward(self, x):
            return self.head(x.flatten(1))

    model = import_model(Plain().eval(), input_shape=(3, 2, 2))
    with pytest.raises(VitqError, match="without attention"):
        PatchSimilarity().make(model.mod, None, 0, False)


@pytest.mark.parametrize("field", ["images", "iterations"])
def test_counts_below_one_are_refused(field):
    with pytest.raises(VitqError, match=f"{field} of PatchSimilarity"):
        PatchSimilarity(**{field: 0})
