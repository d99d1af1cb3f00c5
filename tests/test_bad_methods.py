"""Methods asked for what they cannot do: told before any work, with what they can."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from canonical_vit import tiny_vit
from torch import nn

import tvm_vitq
from tvm_vitq.calibrate import calibrate
from tvm_vitq.calibrate.simulate import simulate
from tvm_vitq.cli import main
from tvm_vitq.errors import VitqError
from tvm_vitq.frontend.model import FloatModel
from tvm_vitq.plan import QuantPlan, SiteQuantizer
from tvm_vitq.quantizers import codec_of
from tvm_vitq.recipes import RECIPES, find_recipe
from tvm_vitq.recipes.base import TRAINING_IMAGES
from tvm_vitq.recipes.minmax import MinMax

IMAGES = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32)


def fit(recipe="minmax", bits="w4a4", images=IMAGES, **options):
    model = FloatModel(tiny_vit(depth=1), "tiny", (2, 3, 16, 16), None, None)
    return calibrate(model, bits, recipe, images, progress=False, **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks.0.attn.qkv.input": {"codec": "log2"}}, r"cannot choose the codec[\s\S]*docs/recipes\.md"),
        ({"blocks.0.attn.probs": {"codec": "log2", "bits": 4}}, r"the recipe does[\s\S]*attn\.probs"),
        ({"*.weight": {"scale": [1.0]}}, "scales are fitted"),
        ({"*.probs": {"params": {"base": 2}}}, "other parameters"),
        ({"blocks.0.attn.q": {"group_size": 8}}, r"where: blocks\.0\.attn\.q[\s\S]*tensor, head"),
        ({"blocks.0.attn.probs": {"granularity": "group", "group_size": 8}}, "tensor, token"),
        ({"blocks.0.attn.v": {"granularity": "channel"}}, "more bits"),
        ({"head.input": {"granularity": "channel"}}, "folding"),
        ({"head.weight": {"granularity": "head"}}, "per output channel"),
        ({"head.weight": {"granularity": "chanel"}}, "unknown granularity"),
        ({"head.weight": {"group_size": "8"}}, "malformed group_size"),
        ({"head.weight": {"group_size": 0}}, "malformed group_size"),
        ({"head.weight": {"bitz": 8}}, r"unknown key[\s\S]*bits"),
        ({"head.weight": {"bits": "8"}}, "2 to 8"),
    ],
)
def test_overrides_that_do_not_apply(overrides, message, monkeypatch):
    monkeypatch.setattr(MinMax, "fit", None)
    with pytest.raises(VitqError, match=message):
        fit(overrides=overrides)


@pytest.mark.parametrize("name", ["repq", "repqvit", "RepQ-ViT", "fqvit"])
def test_unknown_recipes_name_the_nearest(name):
    with pytest.raises(VitqError, match="repq-vit" if "ep" in name else "fq-vit"):
        find_recipe(name)


def test_unknown_quantizers_name_the_nearest():
    with pytest.raises(VitqError, match=r"where: head\.input[\s\S]*log2"):
        codec_of(SiteQuantizer(4, [1.0], [0], codec="log_2"), "head.input")


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.trains])
def test_training_needs_images(recipe, monkeypatch):
    monkeypatch.setattr(RECIPES[recipe], "fit", None)
    with pytest.raises(VitqError, match=f"too few calibration images for recipe {recipe}[\\s\\S]*got: 15"):
        fit(recipe, images=IMAGES[: TRAINING_IMAGES - 1])
    with pytest.raises(TypeError):  # enough: it goes on to fit
        fit(recipe, images=IMAGES)


def test_recipes_say_how_many_images_they_take():
    for name, recipe in RECIPES.items():
        assert recipe.least_images <= recipe.calibration_images <= 1024, name
        assert recipe.calibration_images >= TRAINING_IMAGES, name


def test_widths_that_a_recipe_does_not_define(monkeypatch):
    monkeypatch.setattr(MinMax, "widths", range(4, 9))
    monkeypatch.setattr(MinMax, "fit", None)
    with pytest.raises(VitqError, match=r"recipe minmax does not define[\s\S]*3 bits[\s\S]*4 to 8 bits"):
        fit(bits="w3a4")
    with pytest.raises(VitqError, match=r"where: head\.input"):
        fit(overrides={"head.input": 2})


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_two_bits_work_or_are_refused(recipe):
    """The narrowest width of all: levels that collapse and steps that are missing show there first."""
    kind = RECIPES[recipe]
    short = {f.name: 2 for f in dataclasses.fields(kind) if f.name in ("iterations", "refit", "rounding")}
    if 2 not in kind.widths:
        with pytest.raises(VitqError, match="does not define"):
            fit(kind(**short), "w2a2")
        return
    found = fit(kind(**short), "w2a2")
    assert {site.bits for name, site in found.plan.sites.items() if "patch_embed" not in name} == {2}
    logits = simulate(found.mod, found.plan)(IMAGES[:4])
    assert np.isfinite(logits).all() and logits.std() > 0


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4))


def quantize(module, **options):
    images = np.random.default_rng(0).standard_normal((4, 3, 2, 2), dtype=np.float32)
    return tvm_vitq.quantize(module, input_shape=(3, 2, 2), calibration=images, progress=False, **options)


def test_codecs_of_a_given_plan(small):
    plan = QuantPlan.from_dict(quantize(small, bits="w4a4").plan.to_dict())
    site = "3.input"
    plan.sites[site] = dataclasses.replace(plan[site], codec="lloyd_max", params={"levels": [0, 100, 255]})
    again = quantize(small, plan=plan).plan
    assert again[site].codec == "uniform" and "not lloyd_max" in again.notes[site]
    plan.sites[site] = dataclasses.replace(plan[site], codec="loyd_max")
    with pytest.raises(VitqError, match=r"3\.input: codec[\s\S]*lloyd_max"):
        quantize(small, plan=plan)


def test_command_line_tells_them(tmp_path, capsys):
    arguments = ["quantize", "refmodel:vit", "-o", str(tmp_path / "x.vitq"), "--calibration", "refmodel"]
    for extra, says in (
        (["--override", 'head={"codec": "log2"}'], "cannot choose the codec"),
        (["--recipe", "qdrop", "--calibration-count", "4"], "16 or more"),
        (["--calibration-count", "0"], "1 or more"),
        (["--bits", "auto"], "budget"),
    ):
        assert main([*arguments, *extra]) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
