"""Scales that are whole multiples: how they are chosen, what a plan says of them, what layers compute."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from canonical_vit import tiny_vit
from test_recipes import fit

from tvm_vitq import numerics as nm
from tvm_vitq import reference
from tvm_vitq.calibrate.whole_multiples import whole_multiples
from tvm_vitq.errors import VitqError
from tvm_vitq.formats import codes_format
from tvm_vitq.integerize.multiples import multiple_constants
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.plan import QuantPlan, SiteQuantizer
from tvm_vitq.quantizers import Uniform
from tvm_vitq.quantizers.multiples import TOLERANCE, whole_scales
from tvm_vitq.quantizers.uniform import integer_range
from tvm_vitq.recipes.vs_quant import VSQuant

RNG = np.random.default_rng
WIDTHS = [8, 6, 4, 3, 2]
FC2 = "blocks.0.mlp.fc2.weight"


def weight_site(bits: int, rows: int, groups: int, size: int) -> SiteQuantizer:
    count = rows * groups
    ones, zeros = [1.0] * count, [0] * count
    return SiteQuantizer(bits, ones, zeros, "uniform", bits == 8, "group", 0, size)


def input_site(bits: int, groups: int, seed: int) -> SiteQuantizer:
    r = RNG(seed)
    scale = r.uniform(0.01, 1, groups).astype(np.float32).tolist()
    zero = r.integers(0, 2**bits, groups).tolist()
    if groups == 1:
        return SiteQuantizer(bits, scale, zero)
    return SiteQuantizer(bits, scale, zero, granularity="group", group_size=48 // groups)


def fitted(bits: int, groups: int, inputs: int, seed: int = 0):
    """A layer with 7 outputs and 48 inputs, and its quantizers."""
    r = RNG(seed)
    weight, bias = r.normal(0, 1, (7, 48)) * r.uniform(0.1, 3, 48), r.normal(0, 2, 7)
    x = input_site(bits, inputs, seed)
    site = weight_site(bits, 7, groups, 48 // groups)
    return weight, bias, x, whole_multiples(weight, bias, site, np.array(x.scale), 63, bits <= 4)


def constants(weight, bias, x, site, out=None):
    whole = whole_scales(site, np.array(x.scale), x.granularity, len(weight), "fc.weight")
    ends = tuple(v.reshape(len(weight), -1) for v in integer_range(site))
    scale = np.array(site.scale).reshape(len(weight), -1)
    form = codes_format(x.bits, x.scale, x.zero_point, x.granularity)
    return multiple_constants(weight, bias, scale, ends, whole, form, out, "fc"), form


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("groups", "inputs"), [(3, 3), (12, 3), (3, 1), (1, 1)])
def test_layers_equal_the_real_ones(bits, groups, inputs):
    """Nothing but the bias is rounded: to half a step."""
    weight, bias, x, site = fitted(bits, groups, inputs)
    made, form = constants(weight, bias, x, site)
    assert (made.inner is None) == (bits <= 4)
    codes = RNG(1).integers(form.qmin, form.qmax + 1, (2, 5, 48)).astype(np.int8)
    scale, zero = form.broadcast([48])
    real = Uniform().decode(Uniform().encode(weight, site), site).astype(np.float64)
    exact = (scale * (codes.astype(np.float64) - zero)) @ real.T + bias
    got = nm.int_linear(
        codes, made.weight, made.bias, made.multiplier, made.zero_point, nm.Output("float32"), made.inner
    )
    rounded = 0.5 * np.array(site.params["step"]) + 2 * TOLERANCE * np.abs(exact).max()
    assert np.all(np.abs(got - exact) <= rounded)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_cover_every_group(bits):
    """Scales are rounded up: a weight is off by half a step, at the ends by one, that of the zero point."""
    weight, _, _, site = fitted(bits, 12, 3)
    error = np.abs(Uniform().decode(Uniform().encode(weight, site), site) - weight).reshape(7, 12, 4)
    scale = np.array(site.scale).reshape(7, 12, 1)
    assert np.all(error <= scale * (0.501 if bits == 8 else 1.001))
    count = np.array(site.params["multiples"])
    assert count.min() >= 1 and count.max() <= 63 and (bits <= 4 or count.max() == 63)


def test_empty_groups_rows_and_small_weights():
    """Groups without weights do not widen the step of others; rows without any, or with weights that are
    nothing beside their bias, keep the bias."""
    weight, bias = RNG(0).normal(0, 1, (5, 48)), np.array([0.0, 1.0, -2.5, 3.0, 1.0])
    weight[1, :16] = 0
    weight[2:4] = 0
    weight[4] *= 1e-12
    x = input_site(8, 3, 0)
    for bits in (8, 4):
        site = whole_multiples(weight, bias, weight_site(bits, 5, 3, 16), np.array(x.scale), 63, bits <= 4)
        alone = np.array(site.params["multiples"]).reshape(5, 3)
        assert alone[1, 0] == 1 and alone[1, 1:].max() > (40 if bits == 8 else 8)
        made, form = constants(weight, bias, x, site)
        codes = RNG(1).integers(form.qmin, form.qmax + 1, (4, 48)).astype(np.int8)
        got = nm.int_linear(
            codes, made.weight, made.bias, made.multiplier, 0, nm.Output("float32"), made.inner
        )
        np.testing.assert_allclose(got[:, 2:], np.broadcast_to(bias[2:], (4, 3)), rtol=1e-6)


def test_wide_rows_get_wider_steps():
    """A sum that could overflow int32 is refused; the choice of steps does not let it come to that."""
    weight, bias = np.ones((2, 4096)), np.zeros(2)
    x = SiteQuantizer(8, [0.1], [0])
    site = whole_multiples(weight, bias, weight_site(8, 2, 256, 16), np.array(x.scale), 63, False)
    assert max(site.params["multiples"]) < 16
    constants(weight, bias, x, site)
    steps = [v / 50 for v in site.params["step"]]
    finer = {"step": steps, "multiples": [v * 50 for v in site.params["multiples"]]}
    with pytest.raises(VitqError, match=r"could overflow[\s\S]*where: fc"):
        constants(weight, bias, x, dataclasses.replace(site, params=finer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, x: w.params.pop("step"), r"params\['step'\][\s\S]*7 positive"),
        (lambda w, x: w.params.pop("multiples"), r"params\['multiples'\][\s\S]*21 whole"),
        (lambda w, x: w.params["step"].pop(), "6 entries"),
        (lambda w, x: w.params.update(step=[-1.0] * 7), "positive"),
        (lambda w, x: w.params["multiples"].__setitem__(3, 0), "1 to 32767"),
        (lambda w, x: w.params["multiples"].__setitem__(3, 2.5), "whole"),
        (lambda w, x: w.params["multiples"].__setitem__(20, 77), "output channel 6, group 2"),
        (lambda w, x: w.scale.__setitem__(4, 2 * w.scale[4]), "output channel 1, group 1"),
        (lambda w, x: x.scale.__setitem__(1, 2 * x.scale[1]), "group 1[\\s\\S]*anew"),
        (lambda w, x: x.scale.append(1.0), "whole groups"),
    ],
)
def test_malformed_multiples_are_refused(change, message):
    weight, _, x, site = fitted(8, 3, 3)
    change(site, x)
    with pytest.raises(VitqError, match=message):
        whole_scales(site, np.array(x.scale), x.granularity, len(weight), "fc.weight")


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_plans_keep_multiples(tmp_path, bits):
    """Written and read again they give the same program; without them sums are rounded group by group."""
    made = fit(tiny_vit(depth=1), bits, VSQuant())
    made.plan.save(tmp_path / "plan.json")
    plan = QuantPlan.load(tmp_path / "plan.json")
    assert plan.hash == made.plan.hash and plan[FC2].params["multiples"]
    x = RNG(2).normal(size=made.plan.input_shape).astype(np.float32)

    def logits(plan: QuantPlan) -> np.ndarray:
        return reference.run(run_passes(made.mod, realize_passes(plan)), x)

    exact = logits(made.plan)
    np.testing.assert_array_equal(logits(plan), exact)
    for site in plan.sites.values():
        site.params.clear()
    rounded = logits(plan)
    assert not np.array_equal(rounded, exact)
    assert np.square(rounded - exact).sum() < 0.05 * np.square(exact).sum()


def test_shift_plans_have_no_multiples():
    plan = fit(tiny_vit(depth=1), "w8a8", VSQuant(), requantize="shift").plan
    assert not any("multiples" in site.params for site in plan.sites.values())
