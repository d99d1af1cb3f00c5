"""RepQuant, I&S-ViT, DopQ-ViT, ADFQ-ViT: their quantizers, learned ranges and roundings, stages, outliers."""

import dataclasses

import numpy as np
import pytest
import torch
from canonical_vit import tiny_mixer, tiny_vit
from test_recipes import IMAGES, fit, outlier_vit, sqnr
from test_recipes_papers import job_of

from tvm_vitq.calibrate import fit as steps
from tvm_vitq.calibrate import outliers, searches
from tvm_vitq.calibrate.blocks import find_units
from tvm_vitq.calibrate.clipping import Clipping, learn_ranges
from tvm_vitq.calibrate.codebooks import Moments
from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.layer_rounding import LayerRounding, round_layers
from tvm_vitq.calibrate.observe import View, observe
from tvm_vitq.calibrate.prefix import Quantized, Taking
from tvm_vitq.calibrate.probabilities import fit_shift_uniform_log2, fit_tangent
from tvm_vitq.calibrate.reparameterize import (
    channel_ranges,
    find_folds,
    fit_channels,
    fold_quantizers,
    limit_channels,
    observe_with_folds,
)
from tvm_vitq.calibrate.simulate import simulate
from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.formats import codes_format
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.quantizers import codec_of
from tvm_vitq.quantizers.outliers import UniformOutliers
from tvm_vitq.quantizers.uniform import integer_range
from tvm_vitq.recipes import find_recipe
from tvm_vitq.recipes.adfq_vit import ADFQViT
from tvm_vitq.recipes.dopq_vit import DopQViT
from tvm_vitq.recipes.is_vit import ISViT
from tvm_vitq.recipes.percentile import Percentile
from tvm_vitq.recipes.repquant import RepQuant
from tvm_vitq.site_rules import Granularities

RECIPES = [
    RepQuant(clipping=20, rounding=20),
    ISViT(iterations=10, batch=4),
    DopQViT(iterations=10, batch=4),
    ADFQViT(iterations=10, batch=4),
]
BLOCK = "blocks.0."
TENSOR = ("uniform", "tensor")


def by_name(recipe):
    return recipe.name


# Quantizers of each site ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "probs", "norm", "gelu"),
    [
        (RECIPES[0], "log_sqrt2", TENSOR, TENSOR),
        (RECIPES[1], "shift_uniform_log2", TENSOR, TENSOR),
        (RECIPES[2], "tangent", TENSOR, TENSOR),
        (RECIPES[3], "log_sqrt2", ("uniform_outliers", "token"), ("shift_log2", "tensor")),
    ],
    ids=map(by_name, RECIPES),
)
def test_quantizers_are_those_of_the_paper(recipe, probs, norm, gelu):
    plan = fit(tiny_vit(depth=1), "w3a4", recipe).plan

    def kind(site):
        return plan[BLOCK + site].codec, plan[BLOCK + site].granularity

    assert kind("attn.probs") == (probs, "tensor")
    assert kind("attn.qkv.input") == kind("mlp.fc1.input") == norm
    assert kind("mlp.fc2.input") == gelu
    assert {kind(f"attn.{role}") for role in "qkv"} == {TENSOR} and kind("attn.proj.input") == TENSOR
    assert kind("mlp.fc2.weight") == ("uniform", "channel") and plan[BLOCK + "mlp.fc1.weight"].bits == 3
    assert plan["patch_embed.proj.input"].bits == 8 and plan["patch_embed.proj.input"].codec == "uniform"
    assert " iterations in " in plan.comment


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
@pytest.mark.parametrize(
    "mod", [tiny_vit(batch=1, depth=1, gated=True, outliers=20.0), tiny_mixer(depth=1)], ids=["vit", "mixer"]
)
def test_integer_program_follows_the_simulation(recipe, mod):
    result = fit(mod, "w6a6", recipe)
    model = QuantizedModel(run_passes(result.mod, realize_passes(result.plan)), result.plan)
    assert not model.float_islands
    assert sqnr(simulate(result.mod, result.plan)(IMAGES), model.reference(IMAGES)) > 18


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_asked_granularities_win_and_plans_repeat(recipe):
    asked = Granularities(input="token", heads="head", weight_group=16)
    plans = [fit(tiny_vit(depth=1), "w4a4", recipe, granularities=asked).plan for _ in range(2)]
    assert plans[0].hash == plans[1].hash
    for name, count in (
        ("attn.qkv.input", 17),
        ("mlp.fc2.input", 17),
        ("attn.q", 2),
        ("attn.qkv.weight", 192),
    ):
        assert len(plans[0][BLOCK + name].scale) == count and plans[0][BLOCK + name].codec == "uniform"


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_what_a_method_does_not_cover_is_noted(recipe):
    plan = fit(tiny_vit(depth=1, attention="sigmoid", activation="silu"), "w4a4", recipe).plan
    assert plan[BLOCK + "attn.probs"].codec == plan[BLOCK + "mlp.fc2.input"].codec == "uniform"
    assert "this is sigmoid" in plan.notes[BLOCK + "attn.probs"]
    assert ("this is silu" in plan.notes.get(BLOCK + "mlp.fc2.input", "")) == (recipe.name == "adfq-vit")


def test_recipes_are_listed():
    for recipe in RECIPES:
        assert type(find_recipe(recipe.name)) is type(recipe)


# Ranges of channels -----------------------------------------------------------------------------------------


def folds_of(bits="w4a4", **options):
    """A job, its folds and what was observed for them."""
    job = job_of(tiny_vit(outliers=20.0, **options), bits)
    folds = find_folds(job)
    views = steps.activation_views(job) | steps.probability_views(job, softmax=True)
    return job, folds, observe_with_folds(job, folds, views, 1e-3)


@pytest.mark.parametrize("target", ["mean", "median"])
@pytest.mark.parametrize("pool", ["mean", "token"])
def test_folding_quantizers_keeps_every_code(target, pool):
    job, folds, summaries = folds_of(pool=pool)
    ranges = channel_ranges(job, folds, summaries, searches.percentile())
    fit_channels(job, folds, ranges)
    sites = {site for fold in folds for site in fold.sites}
    assert {job.quantizers[site].granularity for site in sites} == {"channel"}
    codes = codes_of(job, sites)
    with torch.no_grad():
        before = job.executor.run(job.images, Quantized(job.quantizers))
        fold_quantizers(job, folds, target)
        after = job.executor.run(job.images, Quantized(job.quantizers))
    assert {job.quantizers[site].granularity for site in sites} == {"tensor"}
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    first = folds[0].sites[0]
    assert (codes_of(job, sites)[first] == codes[first]).float().mean() > 0.999


def codes_of(job, sites):
    """Codes of sites on all images."""
    found = {}

    class Codes(Quantized):
        def quantize(self, site, x):
            if site in sites:
                q = job.quantizers[site]
                found[site] = torch.from_numpy(codec_of(q).encode(x.numpy(), q))
            return super().quantize(site, x)

    with torch.no_grad():
        job.executor.run(job.images, Codes(job.quantizers))
    return found


def test_learned_ranges_lower_the_error_of_what_reads_them():
    job, folds, summaries = folds_of("w3a3")
    start = channel_ranges(job, folds, summaries, searches.minmax)
    learned = learn_ranges(job, folds, start, Clipping(iterations=60, rows=256, batch=128))

    def error(fold, ranges):
        low, high = ranges[fold.layer]
        made = SiteQuantizer(3, *numbers(low, high), granularity="channel", axis=-1)
        total = 0.0
        for site in fold.sites:
            taken = Taking(job.sites[site].variable, None)
            job.executor.run(job.images, taken)
            x = taken.rows
            moved = torch.from_numpy(codec_of(made).round_trip(x.numpy(), made)) - x
            total += sum(float((moved @ job.weight(layer).T).square().mean()) for layer in fold.linears)
        return total

    def numbers(low, high):
        step = ((high - low) / 7).clamp(min=1e-12)
        return step.tolist(), (-low / step).round().int().tolist()

    better = [error(f, learned) < error(f, start) for f in folds]
    assert sum(better) >= len(folds) - 1
    for fold in folds:
        for (low, high), (least, most) in zip([learned[fold.layer]], [start[fold.layer]], strict=True):
            assert (high <= most.clamp(min=0) + 1e-6).all() and (low >= least.clamp(max=0) - 1e-6).all()
    assert job.costs["clipping"].iterations == 60 * len(folds)
    again = learn_ranges(job, folds, start, Clipping(iterations=0))
    assert all(torch.equal(a, b) for f in folds for a, b in zip(again[f.layer], start[f.layer], strict=True))


# Roundings of single layers ---------------------------------------------------------------------------------


def test_layer_roundings_lower_the_error_on_quantized_inputs():
    job = job_of(tiny_vit(depth=1), "w3a4")
    Percentile().fit(job)
    original = dict(job.executor.constants)
    round_layers(job, find_units(job.mod), LayerRounding(iterations=150))
    layers = [site.removesuffix(".weight") for site in job.quantizers if site.endswith(".weight")]
    assert job.costs["rounding"].iterations == 150 * len(layers)
    lower = 0
    for layer in layers:
        site = f"{layer}.weight"
        quantizer, rounded = job.quantizers[site], job.executor.constants[site]
        nearest = torch.from_numpy(codec_of(quantizer).round_trip(original[site].numpy(), quantizer))
        codes = rounded / torch.tensor(quantizer.scale)[:, None]
        assert (codes - codes.round()).abs().max() < 1e-4
        low, high = (torch.from_numpy(end)[:, None] for end in integer_range(quantizer))
        steps_off = (original[site] / torch.tensor(quantizer.scale)[:, None]).clamp(low, high) - codes
        assert steps_off.abs().max() < 1.001
        (step,) = (s for s in job.executor.steps if (s.op, s.layer) == ("vitq.linear", layer))
        taken = Taking(step.arguments[0].name, job.quantizers)
        with torch.no_grad():
            job.executor.run(job.images, taken)
        errors = [float(((w - original[site]) @ taken.rows.T).square().mean()) for w in (rounded, nearest)]
        assert errors[0] <= errors[1] * 1.001
        lower += errors[0] < 0.95 * errors[1]
    assert lower >= len(layers) // 2


def test_repquant_resumes(tmp_path):
    recipe = RepQuant(clipping=20, rounding=20)

    def fitted(work=None):
        job = dataclasses.replace(job_of(tiny_vit(), "w3a3"), work=work)
        recipe.fit(job)
        return job

    whole, kept = fitted(), fitted(tmp_path)
    files = sorted(tmp_path.iterdir())
    clipping, rounding = (
        [f for f in files if f.name.startswith(label)] for label in ("clipping", "rounding")
    )
    assert len(clipping) + len(rounding) == len(files) and clipping and rounding
    for file in (clipping[-1], *rounding[1:]):
        file.unlink()
    resumed = fitted(tmp_path)
    assert resumed.costs["clipping"].iterations == 20
    assert 0 < resumed.costs["rounding"].iterations < whole.costs["rounding"].iterations
    for job in (kept, resumed):
        assert job.quantizers == whole.quantizers and job.ranges == whole.ranges
        pairs = zip(job.executor.constants.values(), whole.executor.constants.values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# Probabilities, ranges of q, k and v ------------------------------------------------------------------------


def test_probabilities_are_fitted_by_squared_error():
    job, _, summaries = folds_of(bias=True)
    site = BLOCK + "attn.probs"
    moments = Moments.of(summaries[site])

    def error(quantizer):
        return float(moments.squared_error(*codec_of(quantizer).table(quantizer, quantizer.scale[0])))

    fit_shift_uniform_log2(job, summaries)
    chosen = job.quantizers[site]
    for eta in (0.001, 0.05, 1.0):
        job.quantizers.clear()
        fit_shift_uniform_log2(job, summaries, [eta])
        assert error(chosen) <= error(job.quantizers[site])
        assert job.quantizers[site].params["eta"] == eta
    fit_tangent(job, summaries)
    tangent = job.quantizers[site]
    plain = dataclasses.replace(tangent, params={**tangent.params, "alpha": 2.25}, scale=[1.0])
    assert error(tangent) <= error(plain)


def test_steps_and_zero_points_are_searched_together():
    x = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    x[1] = x[1].abs() * 3 - 1
    summary = Summary.of(x)
    low, high = searches.plane()(summary, 4, False)

    def error(low, high):
        scale, zero = (torch.from_numpy(v)[:, None] for v in searches.quantizer_numbers(low, high, 4, False))
        codes = ((x / scale).round() + zero).clamp(0, 15) - zero
        return (codes * scale - x).abs().pow(2.4).mean(1)

    for rule in (searches.minmax, searches.percentile(), searches.mse()):
        assert (error(low, high) <= 1.02 * error(*rule(summary, 4, False))).all()
    assert float(searches.plane()(Summary.of(torch.zeros(1, 5)), 4, False)[1]) == 0


# Outliers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "limits"), [(3, (-124, 131)), (4, (-120, 135)), (8, (0, 255))])
def test_outliers_have_the_codes_of_a_byte(bits, limits):
    site = SiteQuantizer(bits, [0.5, 0.25], [3, 2], "uniform_outliers", granularity="token", axis=-2)
    x = np.linspace(-100, 100, 4002, dtype=np.float32).reshape(1, 2, 2001)
    codec = codec_of(site)
    codes = codec.encode(x, site)
    assert (codes.min(), codes.max()) == limits == UniformOutliers().limits(site)
    numbers = {k: torch.from_numpy(v) for k, v in codec.parameters(site).items()}
    simulated = codec.fake_quantize(torch.from_numpy(x), site, numbers)
    np.testing.assert_allclose(simulated.numpy(), codec.decode(codes, site), atol=1e-6)
    form = codes_format(bits, site.scale, site.zero_point, site.granularity, codec.limits(site))
    integers = form.encode(x)
    assert (form.qmin, form.qmax) == (-128, 127) == (integers.min(), integers.max())
    np.testing.assert_array_equal(integers.astype(int), codes - 2 ** (bits - 1))


def test_outliers_have_no_part_in_ranges():
    job = job_of(tiny_vit(outliers=20.0), "w4a4")
    norms = outliers.norm_sites(job)
    names = {site.name for site in norms}
    assert names == {f"blocks.{i}.{layer}.input" for i in (0, 1) for layer in ("attn.qkv", "mlp.fc1")} | {
        "head.input"
    }
    outliers.ask_for_tokens(job, norms)
    assert job.specs["head.input"].granularity == "tensor"
    views = {site.name: View("token", -2, within=3.0) for site in norms if len(site.shape) == 3}
    summaries = observe(job, views | {"head.input": View("tensor", within=3.0)}, 1e-3)
    assert all(float(s.maximum.max()) <= 3 and float(s.minimum.min()) >= -3 for s in summaries.values())
    outliers.fit_outliers(job, norms, summaries, searches.minmax)
    site = job.quantizers[BLOCK + "attn.qkv.input"]
    assert site.codec == "uniform_outliers" and len(site.scale) == 17
    taken = Taking(job.sites[BLOCK + "attn.qkv.input"].variable, None)
    job.executor.run(job.images, taken)
    x = taken.rows.reshape(-1, 17, 32)
    moved = (torch.from_numpy(codec_of(site).round_trip(x.numpy(), site)) - x).abs()
    step = torch.tensor(site.scale)[:, None]
    assert x.abs().max() > 20 and (moved <= 0.51 * step).float().mean() > 0.99  # next to nothing saturates
    assert float(step.max()) < 0.5 * float(x.abs().max()) / 15  # and steps are not those of the outliers


def test_outliers_run_as_integers():
    mod = outlier_vit()[1]
    reference = Executor(mod).run(torch.from_numpy(IMAGES)).numpy()
    result = fit(mod, "w4a4", ADFQViT(iterations=0))
    plain = fit(mod, "w4a4", ADFQViT(iterations=0, threshold=1e6))
    model = QuantizedModel(run_passes(result.mod, realize_passes(result.plan)), result.plan)
    simulated = simulate(result.mod, result.plan)(IMAGES)
    assert sqnr(simulated, model.reference(IMAGES)) > 15
    assert sqnr(reference, simulated) > sqnr(reference, simulate(plain.mod, plain.plan)(IMAGES)) + 1
    wide = fit(mod, "w8a8", ADFQViT(iterations=0)).plan
    assert (
        wide[BLOCK + "attn.qkv.input"].codec == "uniform" and len(wide[BLOCK + "attn.qkv.input"].scale) == 17
    )


def test_far_channels_are_divided_by_powers_of_two_and_the_function_stays():
    job = job_of(outlier_vit()[1])
    before = Executor(job.mod)
    folds = find_folds(job)
    observe_with_folds(job, folds, {}, 0.0)
    limit_channels(job, folds, 10.0)
    for fold in folds:
        name = f"{fold.layer}.gamma"
        ratio = before.constants[name] / job.executor.constants[name]
        assert torch.equal(ratio, torch.exp2(torch.log2(ratio).round()))
        assert all(job.ranges[variable] <= 10.0 for variable in fold.variables)
        if ratio.max() > 1:
            assert all(job.ranges[variable] > 5.0 for variable in fold.variables)
    images = torch.from_numpy(IMAGES[:4])
    torch.testing.assert_close(job.executor.run(images), before.run(images), rtol=1e-4, atol=1e-4)
