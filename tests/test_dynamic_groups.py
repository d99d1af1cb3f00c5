"""Dynamic groups from the quantizer to compiled libraries."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from canonical_vit import GraphBuilder, tiny_mixer, tiny_vit
from kernel_runs import ISAS
from tvm import relax

import tvm_vitq
from tvm_vitq import numerics_groups as ng
from tvm_vitq.calibrate import calibrate
from tvm_vitq.calibrate.dynamic_groups import Channels, alternate, assign, fit_groups, images_apart, starts
from tvm_vitq.calibrate.group_allocation import candidates
from tvm_vitq.calibrate.simulate import simulate
from tvm_vitq.errors import VitqError
from tvm_vitq.formats import wide_format
from tvm_vitq.integerize.groups import group_linear_constants, group_quantizers
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.plan import QuantPlan, SiteQuantizer
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.quantizers import codec_of
from tvm_vitq.recipes.igq_vit import IGQViT

torch.set_num_threads(1)
TARGET = "x86-64" if ISAS[0] == "x86_64" else f"x86-{ISAS[0]}"
SIGNED = (np.array([[-127]]), np.array([[127]]))


def site_of(scale, zero, tokens, bits=4):
    return SiteQuantizer(
        bits, scale, zero, "dynamic_group", granularity="instance", dynamic=True, params={"tokens": tokens}
    )


SITE = site_of([0.05, 0.2, 1.5, 0.1], [7, 3, 8, -20], 5)


def tensor(images=6, tokens=5, channels=16):
    rng = np.random.default_rng(1)
    spread, middle = 2.0 ** rng.uniform(-3, 4, (images, 1, channels)), rng.normal(0, 2, channels)
    return rng.normal(middle, spread, (images, tokens, channels)).astype(np.float32)


# The quantizer ----------------------------------------------------------------------------------------------


def test_channels_take_the_nearest_bounds_image_by_image():
    x, codec = tensor(), codec_of(SITE)
    low, high = codec.bounds(SITE)
    group = codec.groups(x, SITE)[:, 0]
    for image, channel in itertools.product(range(6), range(16)):
        values = x[image, :, channel].astype(np.float64)
        distance = (values.min() - low) ** 2 + (values.max() - high) ** 2
        assert group[image, channel] == distance.argmin()
    assert len(np.unique(group)) == 4 and (group[0] != group[1]).any()
    tied = site_of([0.1, 0.1], [4, 4], 5)
    assert not codec.groups(x, tied).any()


def test_torch_agrees_with_numpy_and_passes_gradients():
    x, codec = tensor(), codec_of(SITE)
    parameters = {k: torch.from_numpy(v).requires_grad_() for k, v in codec.parameters(SITE).items()}
    leaf = torch.from_numpy(x).requires_grad_()
    fake = codec.fake_quantize(leaf.reshape(2, 3, 5, 16), SITE, parameters)
    np.testing.assert_array_equal(fake.detach().numpy().reshape(x.shape), codec.round_trip(x, SITE))
    fake.square().sum().backward()
    assert leaf.grad.abs().sum() > 0 and parameters["scale"].grad.abs().min() > 0
    codes = codec.encode(x, SITE) & SITE.qmax
    assert codes.min() == 0 and codes.max() == SITE.qmax


def test_plans_keep_it_and_ask_for_tensors(tmp_path):
    plan = QuantPlan(sites={"fc.input": SITE})
    plan.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json").sites == plan.sites
    assert plan.asked()["fc.input"]["granularity"] == "tensor"
    for tokens in (0, 7, None, True):
        with pytest.raises(VitqError, match="rows of an image"):
            codec_of(SITE).encode(tensor(), site_of([1.0], [0], tokens))


# Integers ---------------------------------------------------------------------------------------------------


def test_integers_choose_and_round_as_reals_do():
    """But for points within half a unit of the middle between two bounds."""
    x, wide = tensor(40), wide_format(64.0)
    quantizers = group_quantizers(SITE, wide, "fc.input")
    integers = np.rint(x / wide.scale).astype(np.int32)
    codec = codec_of(SITE)
    group = ng.int_assign(integers, quantizers)
    assert (group == codec.groups(x, SITE)[:, 0]).mean() > 0.995
    codes = ng.int_group_codes(integers, group, quantizers).astype(int) + 8
    same = np.broadcast_to((group == codec.groups(x, SITE)[:, 0])[:, None], x.shape)
    assert (codes == (codec.encode(x, SITE) & 15))[same].mean() > 0.999


def test_linear_is_within_its_bound():
    """Half a unit for each group and for the bias, and the roundings of float32."""
    rng = np.random.default_rng(2)
    x, wide, weight = tensor(), wide_format(64.0), rng.normal(0, 0.1, (12, 16))
    scale, bias = np.abs(weight).max(1, keepdims=True) / 127, rng.normal(size=12)
    out = wide_format(30.0)
    made = group_linear_constants(weight, bias, scale, SIGNED, SITE, wide, out, 30.0, "fc")
    integers = np.rint(x / wide.scale).astype(np.int32)
    y = ng.int_group_linear(
        integers, made.weight, made.bias, made.multiplier, made.zero_point,
        ng.Output("int32"), made.quantizers, made.group_multiplier,
    )  # fmt: skip
    group = ng.int_assign(integers, made.quantizers)
    zero, step = (v[group][:, None] for v in (made.quantizers.zero_point, np.array(SITE.scale)))
    real = (ng.int_group_codes(integers, group, made.quantizers) - zero) * step
    exact = real @ (made.weight * scale).T + bias
    assert np.abs(y * out.scale - exact).max() <= out.scale * (
        4 / 2 + 1 + 2.0**-22 * np.abs(exact).max() / out.scale
    )


def test_sums_that_could_overflow_get_coarser_units_or_are_refused():
    weight, wide = np.ones((2, 4096)), wide_format(1.0)
    scale = np.full((2, 1), 1 / 127)
    made = group_linear_constants(weight, np.zeros(2), scale, SIGNED, SITE, wide, None, 0.01, "fc")
    assert made.multiplier[0] > wide_format(0.01).scale
    zero = made.quantizers.zero_point.astype(int)
    farthest = np.maximum(7 - zero, zero + 8)[:, None]
    most = np.abs(made.weight.astype(int)).sum(1) * (farthest * made.group_multiplier).max(0)
    assert 2**28 < most.max() < 2**31
    far = site_of([1e-3], [-40_000], 5)
    with pytest.raises(VitqError, match="too far from the codes"):
        group_linear_constants(weight, np.zeros(2), scale, SIGNED, far, wide, None, 1.0, "fc")
    with pytest.raises(VitqError, match="could overflow"):
        wider = np.ones((1, 20_000))
        group_linear_constants(
            wider, np.zeros(1), scale[:1], SIGNED, site_of([1.0], [-30_000], 5), wide, None, 1.0, "fc"
        )
    with pytest.raises(VitqError, match="weights in groups"):
        group_linear_constants(weight, np.zeros(2), np.ones((2, 2)), SIGNED, SITE, wide, None, 1.0, "fc")


# Calibration ------------------------------------------------------------------------------------------------


def channels_of(x):
    x = torch.from_numpy(x)
    return Channels(x.shape[1], x.amin(1), x.amax(1), x, torch.ones(x.shape[2]))


def test_alternation_lowers_the_distance_and_fitting_the_error():
    found = channels_of(tensor(30, 17, 24))
    for start in starts(found.low, found.high, 6):
        assert len(start[0]) == len(start[1]) == 6
        points = found.low.flatten().double(), found.high.flatten().double()
        near = assign(*points, *start)
        before = sum((end - bound[near]).square().mean() for end, bound in zip(points, start, strict=True))
        assert alternate(*points, *start)[2] < before
    errors = [found.error(fit_groups(found, 4, groups)) for groups in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4
    assert fit_groups(found, 4, 4) == fit_groups(found, 4, 4)


def test_constant_channels_and_more_groups_than_points_are_fine():
    flat = np.full((1, 5, 2), 3.0, np.float32)
    made = fit_groups(channels_of(flat), 4, 8)
    made.check("fc.input")
    np.testing.assert_allclose(codec_of(made).round_trip(flat, made), flat, rtol=2e-3)


# Whole models -----------------------------------------------------------------------------------------------


def windows(batch=2, across=False):
    """LayerNorm, then windows of 2 x 2 tokens, then a linear layer; `across`: with the batch inside."""
    build = GraphBuilder(0)
    image = relax.Var("x", relax.TensorType((batch, 3, 16, 16), "float32"))
    with build.block.function("main", [image]):
        with build.block.dataflow():
            x = build.layer_norm(build.patches(image, 4, 24), "norm")
            x = build.emit(relax.op.reshape(x, (batch, 2, 2, 2, 2, 24)), "cut")
            order = [1, 3, 0, 2, 4, 5] if across else [0, 1, 3, 2, 4, 5]
            x = build.emit(relax.op.permute_dims(x, order), "moved")
            x = build.emit(relax.op.reshape(x, (batch * 4, 4, 24)), "windows")
            x = build.emit(build.activation(build.linear(x, 40, "fc1"), "gelu", "act"), "hidden")
            x = build.emit(relax.op.reshape(build.linear(x, 5, "fc2"), (batch, 80)), "flat")
            result = build.block.emit_output(build.linear(x, 7, "head"), name_hint="logits")
        build.block.emit_func_output(result)
    return build.block.get()


MODELS = {
    "vit": (lambda: tiny_vit(outliers=20.0, batch=3), "w4a4", {}),
    "gated": (lambda: tiny_vit(gated=True, bias=True, activation="silu", pool="mean"), "w8a8", {"groups": 5}),
    "all": (lambda: tiny_vit(dim=48, heads=3, batch=1), "w3a3", {"sites": "all"}),
    "windows": (windows, "w8a8", {"sites": "all", "groups": 3}),
    "mixer": (tiny_mixer, "w8a4", {"allocate": True, "groups": 2}),
}


def images(shape, count=24):
    return np.random.default_rng(3).normal(size=(count, *shape[1:])).astype(np.float32)


def fitted(mod, bits="w4a4", options=None, **more):
    shape = tuple(int(v) for v in mod["main"].params[0].ty.shape)
    model = SimpleNamespace(mod=mod, name="tiny", input_shape=shape, preprocessing=None)
    recipe = IGQViT(**(options or {}))
    return calibrate(model, bits, recipe, images(shape), progress=False, **more)


@pytest.mark.parametrize("name", MODELS)
def test_libraries_equal_the_reference_and_follow_the_simulation(name):
    make, bits, options = MODELS[name]
    made = fitted(make(), bits, options)
    dynamic = [s for s in made.plan.sites.values() if s.codec == "dynamic_group"]
    assert len(dynamic) >= 2
    quantized = QuantizedModel(run_passes(made.mod, realize_passes(made.plan)), made.plan)
    x = images(tuple(made.plan.input_shape))
    x[0] *= 4  # beyond the calibrated range
    wanted, simulated = quantized.reference(x), simulate(made.mod, made.plan)(x)
    error = np.square(simulated - wanted)[1:].sum() / np.square(simulated)[1:].sum()
    assert -10 * np.log10(error) > {"w8a8": 28, "w8a4": 10, "w4a4": 6, "w3a3": 2}[bits]
    library = tvm_vitq.compile(quantized, TARGET)
    batch = made.plan.input_shape[0]
    for threads in (1, 2):
        library.num_threads = threads
        got = np.concatenate([library(x[i : i + batch]) for i in range(0, len(x), batch)])
        np.testing.assert_array_equal(got, wanted)
    names = [k["name"] for k in library.report["kernels"]]
    assert any("group_linear" in n for n in names) and any("group_codes" in n for n in names)


def test_images_that_are_not_apart_keep_one_scale():
    for across, found in ((False, True), (True, False)):
        mod = windows(across=across)
        assert ("windows" in images_apart(mod, 2)) is found
    plan = fitted(windows(across=True)).plan
    assert plan["fc1.input"].granularity == "tensor" and "images" in plan.notes["fc1.input"]


def test_statistics_of_windows_are_by_image(monkeypatch):
    from tvm_vitq.calibrate import site_statistics

    monkeypatch.setattr(site_statistics, "VALUES", 24 * 4 * 3)  # three windows of four
    assert fitted(windows()).plan.statistics["fc1.input"].sqnr > 15


def test_a_single_token_keeps_one_scale():
    plan = fitted(tiny_vit()).plan
    assert plan["head.input"].codec == "uniform" and "single token" in plan.notes["head.input"]
    assert plan["blocks.0.attn.qkv.input"].params == {"tokens": 17}


def test_allocation_keeps_the_budget():
    assert candidates(8) == (4, 6, 8, 10, 12, 16) and candidates(1) == (1, 2)
    plan = fitted(tiny_vit(), options={"allocate": True, "groups": 4}).plan
    sites = [f"blocks.{i}.{s}.input" for i in range(2) for s in ("attn.qkv", "mlp.fc1")]
    outputs = [96, 128] * 2
    spent = sum(len(plan[s].scale) * n for s, n in zip(sites, outputs, strict=True))
    assert spent <= 4 * sum(outputs)


def test_what_cannot_be_is_refused():
    for options, message in (({"groups": 0}, "1 or more"), ({"sites": "some"}, "unknown kind of sites")):
        with pytest.raises(VitqError, match=message):
            fitted(tiny_vit(depth=1), options=options)
    with pytest.raises(VitqError, match="no powers of two"):
        fitted(tiny_vit(depth=1), requantize="shift")
    made = fitted(tiny_vit(depth=1))
    made.plan.requantize = "shift"
    with pytest.raises(VitqError, match="shift plan"):
        run_passes(made.mod, realize_passes(made.plan))
