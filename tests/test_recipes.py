"""Recipes on a small ViT: complete plans, sensible accuracy, and a simulation of the plan."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from canonical_vit import tiny_mixer, tiny_vit

from tvm_vitq.calibrate import calibrate
from tvm_vitq.calibrate.executor import Executor, Hooks
from tvm_vitq.calibrate.simulate import FakeQuantize, simulate
from tvm_vitq.errors import VitqError
from tvm_vitq.ops import shape_of
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.plan import QuantPlan
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.recipes import RECIPES, find_recipe
from tvm_vitq.recipes.percentile import Percentile
from tvm_vitq.relax_passes.sites import bindings, list_sites
from tvm_vitq.site_rules import Granularities

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()


def float_model(mod):
    return SimpleNamespace(
        mod=mod, name="tiny", input_shape=tuple(shape_of(mod["main"].params[0])), preprocessing=None
    )


def fit(mod, bits="w8a8", recipe="percentile", data=IMAGES, **options):
    return calibrate(float_model(mod), bits, recipe, data, progress=False, **options)


def sqnr(reference, other):
    return 10 * np.log10(np.square(reference).mean() / np.square(reference - other).mean())


def outlier_vit():
    """tiny_vit, and the same function with LayerNorm channels 30 times wider, as in pretrained models."""
    from tvm_vitq.relax_passes.constants import replace_constants

    mod = tiny_vit()
    constants = Executor(mod).constants
    factor = np.ones(32, "float32")
    factor[[3, 17]] = 30.0
    changed = {}
    for i in range(2):
        for norm, linear in (
            (f"blocks.{i}.norm1", f"blocks.{i}.attn.qkv"),
            (f"blocks.{i}.norm2", f"blocks.{i}.mlp.fc1"),
        ):
            changed |= {f"{norm}.{k}": constants[f"{norm}.{k}"].numpy() * factor for k in ("gamma", "beta")}
            changed[f"{linear}.weight"] = constants[f"{linear}.weight"].numpy() / factor
    return mod, replace_constants(mod, changed)


def quick(name):
    """A recipe that trains only a little, if it trains."""
    recipe = find_recipe(name)
    training = {k for k, v in recipe.parameters().items() if k in TRAINING and isinstance(v, int)}
    return dataclasses.replace(recipe, **dict.fromkeys(training, 20))


TRAINING = ("iterations", "clipping", "rounding", "refit")
"""Parameters that count steps of training."""

LEAST_SQNR = {
    "repq-vit": 21, "fq-vit": 15, "p2-vit": 15, "repquant": 20, "is-vit": 15, "igq-vit": 16, "adfq-vit": 15,
    "aphq-vit": 18, "glf-q": 18,
}  # fmt: skip
"""In dB at 8 bits, of those that clip at 8 bits as below, have 4-bit probabilities, or replace GELU in a few
steps; 25 of all others."""


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize(
    "mod", [tiny_vit(batch=1, gated=True, bias=True), tiny_mixer()], ids=["vit", "mixer"]
)
def test_plans_are_complete_and_good(mod, recipe, tmp_path):
    result = fit(mod, "w8a8", quick(recipe))
    plan = result.plan
    plan.check(site.name for site in list_sites(mod))
    assert {b.var.name for b in bindings(result.mod)} <= set(plan.ranges)
    plan.save(tmp_path / "plan.json")
    read = QuantPlan.load(tmp_path / "plan.json")
    assert read.hash == plan.hash
    logits = simulate(result.mod, read)(IMAGES)
    assert logits.shape == (16, 10) and logits.dtype == np.float32
    reference = Executor(mod).run(torch.from_numpy(IMAGES)).numpy()
    assert sqnr(reference, logits) > LEAST_SQNR.get(recipe, 25)
    assert plan.recipe == recipe and plan.calibration.count == 16


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_integer_program_computes_what_the_simulation_says(recipe):
    """Up to roundings next to a boundary, which fall either way and are a whole step then."""
    result = fit(tiny_vit(batch=1, bias=True), "w6a6", quick(recipe))
    program = QuantizedModel(run_passes(result.mod, realize_passes(result.plan)), result.plan)
    assert sqnr(simulate(result.mod, result.plan)(IMAGES), program.reference(IMAGES)) > 20


def test_same_seed_same_plan():
    assert fit(tiny_vit(), "w4a4").plan.hash == fit(tiny_vit(), "w4a4").plan.hash


def test_image_keeps_eight_bits_and_overrides_win():
    plan = fit(tiny_vit(), "w3a4", "minmax", overrides={"blocks.0.mlp.fc2": 8, "head.input": 6}).plan
    assert plan["patch_embed.proj.input"].bits == 8 and plan["patch_embed.proj.weight"].bits == 3
    assert plan["blocks.0.mlp.fc2.input"].bits == plan["blocks.0.mlp.fc2.weight"].bits == 8
    assert plan["head.input"].bits == 6 and plan["blocks.1.mlp.fc2.input"].bits == 4


def test_fold_saves_outlier_channels():
    mod, wide = outlier_vit()
    reference = Executor(mod).run(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(Executor(wide).run(torch.from_numpy(IMAGES)).numpy(), reference, atol=1e-4)

    def quality(model, recipe, bits):
        result = fit(model, bits, recipe)
        return sqnr(reference, simulate(result.mod, result.plan)(IMAGES))

    assert quality(wide, "minmax", "w4a4") < 6
    assert quality(wide, "percentile", "w8a8") > quality(wide, Percentile(fold=False), "w8a8") + 6
    assert abs(quality(wide, "percentile", "w8a8") - quality(mod, "percentile", "w8a8")) < 3


def test_narrow_weights_are_searched():
    plain, searched = fit(tiny_vit(), "w3a8", "minmax").plan, fit(tiny_vit(), "w3a8", "mse").plan
    assert np.mean(searched["head.weight"].scale) < 0.95 * np.mean(plain["head.weight"].scale)
    plain, searched = fit(tiny_vit(), "w8a8", "minmax").plan, fit(tiny_vit(), "w8a8", "mse").plan
    assert searched["head.weight"].scale == plain["head.weight"].scale


def test_granularities():
    asked = Granularities(input="token", heads="head", weight_group=16)
    result = fit(tiny_vit(), "w4a4", "percentile", granularities=asked)
    plan = result.plan
    assert len(plan["blocks.0.attn.qkv.input"].scale) == 17
    assert len(plan["blocks.0.attn.q"].scale) == 2
    assert len(plan["blocks.0.attn.qkv.weight"].scale) == 96 * 2
    assert "no token axis" in plan.notes["head.input"] and len(plan["head.input"].scale) == 1
    assert "not folded" in plan.notes["blocks.0.norm1"]
    reference = Executor(tiny_vit()).run(torch.from_numpy(IMAGES)).numpy()
    plain = fit(tiny_vit(), "w4a4", Percentile(fold=False))
    finer = sqnr(reference, simulate(result.mod, plan)(IMAGES))
    assert finer > sqnr(reference, simulate(plain.mod, plain.plan)(IMAGES)) - 1
    grouped = fit(tiny_vit(), "w4a4", granularities=Granularities(input_group=24)).plan
    assert "groups of 24" in grouped.notes["blocks.0.attn.qkv.input"]
    assert len(grouped["patch_embed.proj.input"].scale) == 2


def test_probabilities():
    for recipe in ("minmax", "percentile", "mse"):
        site = fit(tiny_vit(), "w4a4", recipe).plan["blocks.0.attn.probs"]
        assert site.codec == "row_maximum" and site.dynamic and site.bits == 4 and not site.scale
    per_tensor = Granularities(probs="tensor")
    job = fit(tiny_vit(), "w8a8", granularities=per_tensor)
    largest = []

    class Largest(Hooks):
        def probs(self, site, probs):
            largest.append(float(probs.max()))
            return probs

    Executor(tiny_vit()).run(torch.from_numpy(IMAGES), Largest(), chunk=len(IMAGES))
    assert job.plan["blocks.0.attn.probs"].scale == [pytest.approx(largest[0] / 255, rel=1e-4)]
    plan = fit(tiny_vit(), "w4a4", "mse", granularities=per_tensor).plan
    assert 0 < plan["blocks.0.attn.probs"].scale[0] <= 1 / 15


def test_shift_plans_have_powers_of_two():
    result = fit(tiny_vit(gated=True), "w8a8", requantize="shift")
    for site in result.plan.sites.values():
        mantissas = np.frexp(np.array(site.scale))[0]
        assert (mantissas == 0.5).all()
    reference = Executor(tiny_vit(gated=True)).run(torch.from_numpy(IMAGES)).numpy()
    assert sqnr(reference, simulate(result.mod, result.plan)(IMAGES)) > 20


def test_synthesized_by_default():
    plan = fit(tiny_vit(), data=None).plan
    assert plan.calibration.source.startswith("synthesized") and plan.calibration.count == 32


def test_simulation_is_differentiable():
    result = fit(tiny_vit(depth=1), "w4a4")
    hooks = FakeQuantize(result.plan.sites)
    scales = {name: p["scale"] for name, p in hooks.parameters.items() if p}
    for scale in scales.values():
        scale.requires_grad_()
    executor = Executor(result.mod)
    executor.run(torch.from_numpy(IMAGES[:2]), hooks).square().sum().backward()
    trained = [name for name, scale in scales.items() if scale.grad.abs().sum() > 0]
    assert len(trained) == len(scales) == len(hooks.parameters) - 1  # all but the probabilities


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w9a8"}, "2 to 8"),
        ({"recipe": "percentil"}, "percentile"),
        ({"requantize": "float"}, "multiply or shift"),
        ({"overrides": {"blocks.7.*": 4}}, "matches no site"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(VitqError, match=message):
        fit(tiny_vit(), **options)


def test_plan_of_another_model_is_refused():
    result = fit(tiny_vit(depth=1))
    with pytest.raises(VitqError, match=r"blocks\.1"):
        simulate(fit(tiny_vit(depth=2)).mod, result.plan)


def test_recipes_are_found_by_name_or_given():
    assert find_recipe("mse").name == "mse"
    assert find_recipe(Percentile(fold=False)).parameters()["fold"] is False


@pytest.mark.parametrize(("bits", "free"), [("w4a4", True), ("w8a6", True), ("w4a8", False)])
def test_auto_gives_narrow_inputs_and_softmax_free_levels(bits, free):
    mod = tiny_vit()
    plan = fit(mod, bits, "auto-fast").plan
    roles = {"input", "probs"}
    sites = [s.name for s in list_sites(mod) if s.role in roles and s.name in plan.sites]
    image = "patch_embed.proj.input"
    assert {s.rpartition(".")[2] for s in sites} == roles and plan.sites[image].codec == "uniform"
    assert all((plan.sites[s].codec == "lloyd_max") == free for s in sites if s != image)
