"""Recipes of published methods: each site has the paper's quantizer, and what the papers claim holds."""

import numpy as np
import pytest
import torch
from canonical_vit import tiny_mixer, tiny_vit
from test_recipes import IMAGES, fit, outlier_vit, sqnr

from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.fused import fused_parts
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.output_search import quantized
from tvm_vitq.calibrate.samples import record
from tvm_vitq.calibrate.searches import grouped, minmax, symmetric
from tvm_vitq.calibrate.simulate import simulate
from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.errors import VitqError
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.quantizers.twin_uniform_gelu import TwinUniformGelu
from tvm_vitq.recipes import find_recipe
from tvm_vitq.recipes.adalog import AdaLog
from tvm_vitq.recipes.fq_vit import FQViT
from tvm_vitq.recipes.p2_vit import P2ViT
from tvm_vitq.recipes.peg import PerEmbeddingGroup
from tvm_vitq.recipes.ptq4vit import PTQ4ViT
from tvm_vitq.recipes.q_bert import QBert
from tvm_vitq.recipes.repq_vit import RepQViT
from tvm_vitq.recipes.vs_quant import VSQuant
from tvm_vitq.relax_passes.annotate import annotate
from tvm_vitq.relax_passes.sites import list_sites
from tvm_vitq.site_rules import Granularities, resolve_specs

PAPERS = ["repq-vit", "fq-vit", "ptq4vit", "adalog", "peg", "vs-quant", "q-bert", "p2-vit"]


def quality(mod, bits, recipe, reference=None):
    result = fit(mod, bits, recipe)
    reference = Executor(mod).run(torch.from_numpy(IMAGES)).numpy() if reference is None else reference
    return sqnr(reference, simulate(result.mod, result.plan)(IMAGES))


def job_of(mod, bits="w4a4", **options):
    specs = resolve_specs([site.name for site in list_sites(mod)], bits, **options)
    annotated, aliases = annotate(mod, specs)
    return Job(annotated, specs, aliases, torch.from_numpy(IMAGES), show_progress=False)


# Quantizers of each site ------------------------------------------------------------------------------------

BLOCK = "blocks.0."
WEIGHT = ("uniform", "channel")
TENSOR = ("uniform", "tensor")


@pytest.mark.parametrize(
    ("recipe", "probs", "gelu", "heads", "weight"),
    [
        ("repq-vit", "log_sqrt2", TENSOR, "tensor", WEIGHT),
        ("fq-vit", "log_int_softmax", TENSOR, "tensor", WEIGHT),
        ("ptq4vit", "twin_uniform", ("twin_uniform_gelu", "tensor"), "tensor", TENSOR),
        ("adalog", "adalog", ("adalog", "tensor"), "head", WEIGHT),
        ("peg", "row_maximum", TENSOR, "tensor", WEIGHT),
        ("vs-quant", "row_maximum", ("uniform", "group"), "tensor", ("uniform", "group")),
        ("q-bert", "row_maximum", TENSOR, "tensor", WEIGHT),
        ("p2-vit", "log_int_softmax", TENSOR, "tensor", WEIGHT),
    ],
)
def test_quantizers_are_those_of_the_paper(recipe, probs, gelu, heads, weight):
    plan = fit(tiny_vit(depth=1), "w3a4", recipe).plan

    def kind(site):
        return plan[BLOCK + site].codec, plan[BLOCK + site].granularity

    assert plan[BLOCK + "attn.probs"].codec == probs
    assert kind("mlp.fc2.input") == gelu
    assert {kind(f"attn.{role}") for role in "qkv"} == {("uniform", heads)}
    assert kind("mlp.fc1.weight") == kind("mlp.fc2.weight") == weight
    assert plan[BLOCK + "mlp.fc1.weight"].bits == 3
    assert {plan[BLOCK + s].bits for s in ("attn.probs", "attn.q", "mlp.fc1.input", "mlp.fc2.input")} == {4}
    assert plan["patch_embed.proj.input"].bits == 8
    assert plan.requantize == ("shift" if recipe == "p2-vit" else "multiply")


@pytest.mark.parametrize("recipe", PAPERS)
def test_asked_granularities_win(recipe):
    plan = fit(
        tiny_vit(depth=1), "w4a4", recipe, granularities=Granularities(input="token", probs="token")
    ).plan
    assert len(plan[BLOCK + "attn.qkv.input"].scale) == 17
    assert plan[BLOCK + "mlp.fc2.input"].codec == "uniform" and plan[BLOCK + "attn.q"].granularity == "tensor"


@pytest.mark.parametrize("recipe", ["repq-vit", "fq-vit", "ptq4vit", "adalog"])
def test_what_a_method_does_not_cover_is_noted(recipe):
    plan = fit(tiny_vit(depth=1, attention="sigmoid", activation="silu"), "w4a4", recipe).plan
    assert plan[BLOCK + "attn.probs"].codec == plan[BLOCK + "mlp.fc2.input"].codec == "uniform"
    assert "this is sigmoid" in plan.notes[BLOCK + "attn.probs"]
    assert ("this is silu" in plan.notes.get(BLOCK + "mlp.fc2.input", "")) == (
        recipe in ("ptq4vit", "adalog")
    )


# RepQ-ViT, PEG ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["repq-vit", "adalog"])
def test_folded_scales_make_outlier_channels_harmless(recipe):
    mod, wide = outlier_vit()
    reference = Executor(mod).run(torch.from_numpy(IMAGES)).numpy()
    assert quality(wide, "w4a4", recipe, reference) > quality(wide, "w4a4", "minmax", reference) + 1
    assert abs(quality(wide, "w4a4", recipe, reference) - quality(mod, "w4a4", recipe)) < 2


def test_mean_and_median_scale_give_the_same_function():
    _, wide = outlier_vit()
    mean, median = (fit(wide, "w4a4", RepQViT(target=target)) for target in ("mean", "median"))
    site = BLOCK + "attn.qkv.input"
    assert mean.plan[site].scale[0] > 1.5 * median.plan[site].scale[0]
    np.testing.assert_allclose(
        *(simulate(result.mod, result.plan)(IMAGES) for result in (mean, median)), rtol=0.05, atol=0.1
    )


def test_groups_lie_between_one_range_and_one_per_channel():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(12, 500)).astype("float32") * np.geomspace(1, 30, 12)[:, None])
    rows = rows[torch.randperm(12, generator=torch.Generator().manual_seed(0))].float()
    summary = Summary.of(rows)
    low, high = minmax(summary, 4, False)
    for count, different in ((1, 1), (3, 3), (12, 12), (40, 12)):
        lows, highs = grouped(minmax, count)(summary, 4, False)
        assert len(lows.unique()) == different and (lows <= low).all() and (highs >= high).all()
    lows, highs = grouped(minmax, 3)(summary, 4, False)
    assert ((high - low).sort().values[3::4] <= (highs - lows).unique() + 1e-6).all()


def test_more_groups_are_better():
    _, wide = outlier_vit()
    reference = Executor(wide).run(torch.from_numpy(IMAGES)).numpy()
    one, six, all_ = (quality(wide, "w8a6", PerEmbeddingGroup(n), reference) for n in (1, 6, 32))
    assert one + 1 < six < all_ + 1


# FQ-ViT, P2-ViT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "asked", "given"), [("w8a8", 4, 4), ("w8a8", None, 8), ("w6a6", 4, 6)])
def test_fq_vit_attention_bits(bits, asked, given):
    site = fit(tiny_vit(depth=1), bits, FQViT(attention_bits=asked)).plan[BLOCK + "attn.probs"]
    assert (site.bits, site.scale, site.granularity) == (given, [1.0], "tensor")


def test_p2_vit_chooses_between_two_powers():
    mod = tiny_vit(depth=1)
    near, power = fit(mod, "w4a8", FQViT()).plan, fit(mod, "w4a8", P2ViT()).plan
    ratios = []
    for name, site in power.sites.items():
        scale = np.array(site.scale)
        assert (np.frexp(scale)[0] == 0.5).all()
        if site.codec == "uniform":
            ratios += (scale / np.array(near[name].scale)).tolist()
    ratios = np.array(ratios)
    assert 0.5 < ratios.min() < 0.95 and 1.05 < ratios.max() < 2


# PTQ4ViT, AdaLog --------------------------------------------------------------------------------------------


def test_fused_rows_have_three_scales():
    job = job_of(tiny_vit(depth=1))
    assert fused_parts(job.mod) == {BLOCK + "attn.qkv": 3}
    weight = fit(tiny_vit(depth=1), "w4a4", "ptq4vit").plan[BLOCK + "attn.qkv.weight"]
    scales = np.array(weight.scale).reshape(3, -1)
    assert weight.granularity == "channel" and (scales == scales[:, :1]).all() and len(set(scales[:, 0])) == 3


def test_ptq4vit_activations_are_symmetric_and_gelu_spans_its_minimum():
    plan = fit(tiny_vit(depth=1), "w4a4", "ptq4vit").plan
    assert {plan[BLOCK + s].zero_point[0] for s in ("attn.qkv.input", "attn.q", "attn.v")} == {8}
    site = plan[BLOCK + "mlp.fc2.input"]
    assert site.scale == [pytest.approx(TwinUniformGelu.paper_scale(4, site.params["m"]))]
    summary = Summary.of(torch.tensor([[-1.0, 0.5, 3.0]]))
    ends = [float(end) for end in symmetric(minmax)(summary, 4, False)]
    assert ends == pytest.approx([-3, 3], rel=1e-4)


def test_samples_are_those_of_the_model():
    job = job_of(tiny_vit(depth=1, gated=True, bias=True))
    samples = record(job, images=8, fisher=True, rows=64)
    linear = samples.linear[BLOCK + "mlp.fc1"]
    assert linear.x.shape == (64, 32) and linear.importance.shape == (64, 128)
    assert samples.readers[BLOCK + "mlp.fc1.input"] == [BLOCK + "mlp.fc1", BLOCK + "mlp.fc1_g"]
    torch.testing.assert_close(linear.x, samples.linear[BLOCK + "mlp.fc1_g"].x)
    attention = samples.attention[BLOCK + "attn"]
    assert attention.q.shape == (8, 2, 17, 16) and attention.probs.shape == (8, 2, 17, 17)
    torch.testing.assert_close(attention.probs.sum(-1), torch.ones(8, 2, 17))
    for importance in (linear.importance, attention.of_scores, attention.of_output):
        assert (importance >= 0).all() and importance.sum() > 0
    assert not linear.error(linear.x, linear.weight).any()
    assert record(job, images=8).linear["head"].importance is None


def test_fisher_weights_are_squared_gradients():
    """At the logits, the gradient of the drawn label's log-likelihood is ``onehot - softmax``."""
    job = job_of(tiny_vit(depth=1))
    head = record(job, images=16, fisher=True, rows=16).linear["head"]
    prediction = (head.output + job.executor.constants["head.bias"]).softmax(-1)
    missed = (head.importance - prediction.square()).abs() < 1e-5
    drawn = (head.importance - (1 - prediction).square()).abs() < 1e-5
    assert (missed | drawn).all() and (drawn.sum(1) >= 1).all()


@pytest.mark.parametrize("recipe", [PTQ4ViT(hessian=False), AdaLog()])
def test_search_lowers_the_output_error(recipe):
    mod = tiny_vit(depth=1)
    asked = recipe.granularities("multiply")
    job = job_of(mod, granularities=asked)
    recipe.fit(job)
    samples = record(job)
    plain = fit(mod, "w4a4", "minmax", granularities=asked).plan.sites
    for layer in ("attn.proj", "mlp.fc2"):
        sample = samples.linear[BLOCK + layer]

        def error(quantizers, layer=layer, sample=sample):
            x, weight = (quantizers[f"{BLOCK}{layer}.{role}"] for role in ("input", "weight"))
            return float(sample.error(quantized(sample.x, x), quantized(sample.weight, weight)).sum())

        assert error(job.quantizers) < error(plain)


def test_adalog_is_fitted():
    plan = fit(tiny_vit(), "w4a4", "adalog").plan
    probs, gelu = plan[BLOCK + "attn.probs"], plan[BLOCK + "mlp.fc2.input"]
    assert probs.scale == [1.0] and probs.params["base"] in range(10, 138)
    assert gelu.params["shift"] == pytest.approx(0.17, abs=1e-3) and gelu.params["base"] in range(10, 138)
    assert len(plan[BLOCK + "attn.v"].scale) == 2


# Groups of weights and inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [("w8a8", 15), ("w4a4", 15), ("w3a3", 15)])
def test_vs_quant_products_of_scales_are_whole_multiples(bits, most):
    plan = fit(tiny_vit(depth=1), bits, VSQuant(scale_bits=4)).plan
    weight, x = plan[BLOCK + "mlp.fc2.weight"], plan[BLOCK + "mlp.fc2.input"]
    assert weight.group_size == x.group_size == 16
    products = np.array(weight.scale).reshape(32, -1) * np.array(x.scale)
    count = np.array(weight.params["multiples"]).reshape(32, -1)
    assert 1 <= count.min() and count.max() <= most
    np.testing.assert_allclose(products, count * np.array(weight.params["step"])[:, None], rtol=1e-6)


def test_vs_quant_is_better_than_minmax():
    assert quality(tiny_vit(), "w4a4", "vs-quant") > quality(tiny_vit(), "w4a4", "minmax")


def test_vectors_grow_where_there_are_too_many():
    """Parts that are rounded are 127 at most; whole multiples are added up in any number."""
    asked = Granularities(weight_group=2, input="token")
    result = fit(tiny_vit(depth=1, ratio=8), "w8a8", VSQuant(vector=2), granularities=asked)
    assert result.plan[BLOCK + "mlp.fc2.weight"].group_size == 4
    assert "vectors of 4" in result.plan.notes[BLOCK + "mlp.fc2.weight"]
    QuantizedModel(run_passes(result.mod, realize_passes(result.plan)), result.plan)
    result = fit(tiny_vit(depth=1, ratio=8), "w8a8", VSQuant(vector=2))
    assert result.plan[BLOCK + "mlp.fc2.input"].group_size == 2
    QuantizedModel(run_passes(result.mod, realize_passes(result.plan)), result.plan)


@pytest.mark.parametrize(("groups", "different"), [(128, 96), (12, 12), (13, 12), (1, 1)])
def test_q_bert_rows_share_scales(groups, different):
    plan = fit(tiny_vit(depth=1), "w4a4", QBert(groups)).plan
    scales = np.array(plan[BLOCK + "attn.qkv.weight"].scale).reshape(different, -1)
    assert (scales == scales[:, :1]).all() and len(np.unique(scales)) == different
    asked = Granularities(weight="tensor")
    assert (
        "per tensor"
        in fit(tiny_vit(depth=1), "w4a4", "q-bert", granularities=asked).plan.notes["head.weight"]
    )


# Integer programs, errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mod", [tiny_vit(depth=1, bias=True), tiny_mixer()], ids=["vit", "mixer"])
@pytest.mark.parametrize("recipe", PAPERS)
def test_integer_program_follows_the_simulation(recipe, mod):
    result = fit(mod, "w8a8", recipe)
    model = QuantizedModel(run_passes(result.mod, realize_passes(result.plan)), result.plan)
    assert not model.float_islands
    assert sqnr(simulate(result.mod, result.plan)(IMAGES), model.reference(IMAGES)) > 20


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (PerEmbeddingGroup(0), "1 or more"),
        (QBert(0), "1 or more"),
        (VSQuant(scale_bits=1), "2 to 15 bits"),
        (RepQViT(target="mode"), "mean, median"),
        (RepQViT(zero="never"), "reserved"),
        (FQViT(attention_bits=9), "bit width"),
    ],
)
def test_parameters_out_of_range(recipe, message):
    with pytest.raises(VitqError, match=message):
        fit(tiny_vit(depth=1), "w8a8", recipe)


def test_recipes_are_listed():
    for name in PAPERS:
        assert find_recipe(name).name == name
