"""Reconstruction: units of a graph, learned rounding, resumption, closed-form regression."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from canonical_vit import tiny_mixer, tiny_vit

from tvm_vitq.calibrate import calibrate, losses
from tvm_vitq.calibrate.blocks import find_units
from tvm_vitq.calibrate.dropping import Mix, random_mask
from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.reconstruct import Settings, reconstruct
from tvm_vitq.calibrate.regression import quantize_columns, refine_roundings, regress
from tvm_vitq.calibrate.rounding import AdaRound, Nearest, StraightThrough, Unquantized
from tvm_vitq.calibrate.searches import mse
from tvm_vitq.calibrate.simulate import FakeQuantize, simulate
from tvm_vitq.errors import VitqError
from tvm_vitq.ops import attrs, op_name
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.uniform import integer_range
from tvm_vitq.recipes.percentile import Percentile
from tvm_vitq.relax_passes.annotate import annotate
from tvm_vitq.relax_passes.sites import bindings, image_sites, list_sites
from tvm_vitq.site_rules import Granularities, resolve_specs

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
QUICK = Settings(iterations=20, batch=4)


def job_of(mod, bits="w3a4", seed=0, work=None, granularities=None):
    """A job fitted by `percentile`."""
    names = [site.name for site in list_sites(mod)]
    specs = resolve_specs(names, bits, image_sites=image_sites(mod), granularities=granularities)
    marked, aliases = annotate(mod, specs)
    job = Job(marked, specs, aliases, IMAGES, seed, False, work)
    Percentile().fit(job)
    return job


def error(job, reference):
    """Mean squared error of the job's simulated logits."""
    with torch.no_grad():
        return float(
            (Executor(job.mod).run(IMAGES, FakeQuantize(job.quantizers)) - reference).square().mean()
        )


# Units


def test_units_of_a_vit():
    mod = tiny_vit()
    units = find_units(mod)
    assert [(u.name, u.kind) for u in units] == [
        ("patch_embed.proj", "layer"),
        ("blocks.0", "block"),
        ("blocks.1", "block"),
        ("head", "layer"),
    ]
    modules = find_units(mod, "module")
    assert [u.name for u in modules[1:3]] == ["blocks.0.attn", "blocks.0.mlp"]
    assert units[1].layers == (*modules[1].layers, *modules[2].layers)
    with pytest.raises(VitqError, match="block or module"):
        find_units(mod, "layer")


@pytest.mark.parametrize("mod", [tiny_vit(gated=True, bias=True, pool="mean"), tiny_mixer()])
@pytest.mark.parametrize("level", ["block", "module"])
def test_units_are_the_whole_graph(mod, level):
    units, executor = find_units(mod, level), Executor(mod)
    assert [u.start for u in units[1:]] == [u.stop for u in units[:-1]]
    assert [layer for u in units for layer in u.layers] == list(
        dict.fromkeys(s.layer for s in list_sites(mod))
    )
    x = IMAGES[:3]
    for unit in units:
        x = executor.run_between(unit.start, unit.stop, x, chunk=2)
    torch.testing.assert_close(x, executor.run(IMAGES[:3]))


@pytest.mark.parametrize(
    ("name", "blocks", "layers"),
    [
        ("vit_outlier", [f"blocks.{i}" for i in range(6)], ["patch_embed.proj", "head"]),
        (
            "swin",
            [f"layers.{i}.blocks.{k}" for i in range(3) for k in range(2)],
            ["patch_embed.proj", *(f"layers.{i}.downsample.reduction" for i in (1, 2)), "head.fc"],
        ),
    ],
)
def test_units_of_reference_models(name, blocks, layers):
    from tvm_vitq import refmodels
    from tvm_vitq.frontend import import_model

    mod = import_model(refmodels.load_model(name), input_shape=(3, 32, 32)).mod
    units = find_units(mod)
    assert [u.name for u in units if u.kind == "block"] == blocks
    assert [u.name for u in units if u.kind == "layer"] == layers
    assert len(find_units(mod, "module")) == 2 * len(blocks) + len(layers)


def test_part_of_a_graph():
    executor = Executor(tiny_vit())
    with pytest.raises(VitqError, match="depends on more"):
        executor.between("blocks_0_norm2", "blocks_0_add2")
    unit = find_units(tiny_vit())[1]
    x = torch.randn(2, 16, 32, requires_grad=True)
    executor.run_between(unit.start, unit.stop, x).sum().backward()
    assert x.grad.abs().sum() > 0


# Rounding


def weight_and_quantizer(granularity="channel", group=None):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    count = 6 * (16 // group if group else 1)
    return weight, SiteQuantizer(3, [0.7] * count, [0] * count, "uniform", True, granularity, 0, group)


@pytest.mark.parametrize(("granularity", "group"), [("channel", None), ("group", 8)])
def test_rounding_starts_at_the_weight_and_ends_at_codes(granularity, group):
    weight, quantizer = weight_and_quantizer(granularity, group)
    clipped = weight.clamp(-2.1, 2.1)
    for kind in (AdaRound, Unquantized):
        value = kind(weight, quantizer).value()
        torch.testing.assert_close(value, clipped if kind is AdaRound else weight, atol=1e-6, rtol=1e-5)
    for kind in (AdaRound, StraightThrough, Nearest):
        hardened = kind(weight, quantizer).hardened()
        torch.testing.assert_close(hardened, (weight / 0.7).round().clamp(-3, 3) * 0.7)
    rounding = AdaRound(weight, quantizer)
    with torch.no_grad():
        rounding.logits.fill_(-1.0)
    torch.testing.assert_close(rounding.hardened(), (weight / 0.7).floor().clamp(-3, 3) * 0.7)
    assert rounding.penalty(20.0) > rounding.penalty(2.0) > 0
    with pytest.raises(VitqError, match="uniform"):
        AdaRound(weight, dataclasses.replace(quantizer, codec="log2"))


def test_random_choice():
    generator = torch.Generator().manual_seed(0)
    mask = random_mask((100, 101), 0.25, generator)
    assert mask.unique().tolist() == [0, 1] and abs(float(mask.mean()) - 0.25) < 0.02
    x, y = torch.zeros(100, 101, requires_grad=True), torch.ones(100, 101, requires_grad=True)
    mixed = Mix.apply(x, y, mask)
    mixed.sum().backward()
    assert torch.equal(mixed, mask) and torch.equal(y.grad, mask) and torch.equal(x.grad, 1 - mask)


# Reconstruction


@pytest.mark.parametrize("weights", [AdaRound, StraightThrough])
def test_reconstruction_lowers_the_error(weights):
    mod = tiny_vit()
    reference = Executor(mod).run(IMAGES)
    job = job_of(mod)
    before, scales = error(job, reference), dict(job.quantizers)
    settings = dataclasses.replace(QUICK, iterations=60, weights=weights, rate_biases=1e-3)
    reconstruct(job, find_units(job.mod), settings)
    assert error(job, reference) < 0.8 * before
    moved = [n for n, q in job.quantizers.items() if q.scale != scales[n].scale]
    assert moved and not any(n.endswith((".weight", ".probs")) for n in moved)
    assert job.costs["reconstruct"].iterations == 4 * 60


@pytest.mark.parametrize("asked", [Granularities(), Granularities(weight_group=16)])
@pytest.mark.parametrize("bits", ["w3a4", "w8a8"])
def test_codes_survive_to_the_integer_model(bits, asked):
    data = IMAGES.numpy()
    model = SimpleNamespace(mod=tiny_vit(), name="t", input_shape=(2, 3, 16, 16), preprocessing=None)
    recipe = _Quick()
    found = calibrate(model, bits, recipe, data, granularities=asked, progress=False)
    integer = run_passes(found.mod, realize_passes(found.plan))
    constants = Executor(found.mod).constants
    checked = 0
    for binding in bindings(integer):
        if op_name(binding.value) != "vitq.int_linear":
            continue
        site = attrs(binding.value)["site"]
        stored = np.from_dlpack(binding.value.args[1].value).astype(int)
        quantizer = found.plan[f"{site}.weight"]
        scale = np.repeat(np.array(quantizer.scale).reshape(len(stored), -1), _width(quantizer, stored), 1)
        codes = constants[f"{site}.weight"].numpy() / scale
        assert np.abs(codes - np.rint(codes)).max() < 1e-4
        farthest = max(int(np.abs(end).max()) for end in integer_range(quantizer))
        align = 2 ** int(np.log2(127 / farthest)) if quantizer.granularity == "channel" else 1
        np.testing.assert_array_equal(stored, np.rint(codes).astype(int) * align)
        checked += 1
    assert checked == 10


class _Quick(Percentile):
    def fit(self, job):
        super().fit(job)
        reconstruct(job, find_units(job.mod), QUICK)


def _width(quantizer, stored):
    return quantizer.group_size or stored.shape[1]


def test_resumed_is_uninterrupted(tmp_path):
    def fitted(work=None, seed=0):
        job = job_of(tiny_vit(), seed=seed, work=work)
        reconstruct(job, find_units(job.mod), QUICK)
        return job

    whole = fitted()
    kept = fitted(tmp_path / "work")
    files = sorted((tmp_path / "work").iterdir())
    assert len(files) == 4
    for file in files[2:]:
        file.unlink()
    resumed = fitted(tmp_path / "work")
    assert resumed.costs["reconstruct"].iterations == 2 * QUICK.iterations
    other = fitted(seed=1)
    for job, same in ((kept, True), (resumed, True), (other, False)):
        assert (job.quantizers == whole.quantizers) == same
        assert (job.ranges == whole.ranges) == same
        pairs = zip(job.executor.constants.values(), whole.executor.constants.values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same
    with pytest.raises(VitqError, match="another calibration"):
        fitted(tmp_path / "work", seed=1)
    files[0].write_bytes(b"PK")
    with pytest.raises(VitqError, match="unreadable"):
        fitted(tmp_path / "work")


@pytest.mark.parametrize("loss", [losses.Fisher, losses.WithSuffix, losses.AttentionDivergence])
def test_losses(loss):
    mod = tiny_vit(bias=True)
    reference = Executor(mod).run(IMAGES)
    job = job_of(mod)
    before = error(job, reference)
    reconstruct(job, find_units(job.mod, "module"), dataclasses.replace(QUICK, iterations=40, loss=loss()))
    assert error(job, reference) < before


def test_stages_share_the_float_model():
    """First weights in float, then rounded, against the same teacher."""
    mod = tiny_vit()
    job = job_of(mod)
    teacher = Executor(job.mod)
    units = find_units(job.mod)
    float_stage = dataclasses.replace(QUICK, weights=Unquantized, rate_scales=0.0, drop=0.0)
    reconstruct(job, units, float_stage, teacher, "first")
    reconstruct(job, units, QUICK, teacher, "second")
    assert set(job.costs) == {"first", "second"}


# Regression


def test_refined_roundings_and_compensation_lower_the_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 16, generator=generator) + 0.5
    x = torch.nn.functional.pad(x, (0, 1), value=1.0).double()
    moments = x.T @ x / len(x)
    weight, quantizer = weight_and_quantizer()
    whole = torch.cat([weight, torch.zeros(6, 1)], 1).double()

    def loss(codes, bias):
        difference = torch.cat([codes * 0.7, bias[:, None]], 1) - whole
        return float((difference @ moments * difference).sum())

    steps, scale = weight.double() / 0.7, torch.full((6, 16), 0.7).double()
    ends = torch.full_like(steps, -3), torch.full_like(steps, 3)
    nearest = refine_roundings(steps, scale, moments[:16, :16], ends, 0)
    refined = refine_roundings(steps, scale, moments[:16, :16], ends, 100)
    assert torch.equal(nearest, steps.round().clamp(-3, 3))
    assert (refined - steps.clamp(-3, 3)).abs().max() <= 1
    assert loss(refined, whole[:, -1]) < 0.5 * loss(nearest, whole[:, -1])
    codes, bias = quantize_columns(whole, moments, quantizer, 1e-6)
    assert loss(codes, bias) < 0.5 * loss(nearest, whole[:, -1])
    plain, moved = quantize_columns(whole, moments, quantizer, 1e-6, refinements=0)
    assert loss(codes, bias) < loss(plain, moved) < loss(nearest, whole[:, -1])
    assert codes.abs().max() <= 3 and torch.equal(codes, codes.round())


@pytest.mark.parametrize("asked", [Granularities(), Granularities(weight_group=16)])
def test_regression_lowers_the_error(asked):
    mod = tiny_vit(bias=True, gated=True)
    reference = Executor(mod).run(IMAGES)
    job = job_of(mod, granularities=asked)
    before = error(job, reference)
    regress(job, find_units(job.mod), mse())
    assert error(job, reference) < 0.9 * before
    assert job.costs["regression"].seconds > 0


@pytest.mark.parametrize("recipe", ["qdrop", "erq"])
def test_recipes_fit_windows_and_repeat(recipe):
    """Swin's windows put more than images on the first axis."""
    from tvm_vitq import refmodels
    from tvm_vitq.frontend import import_model
    from tvm_vitq.recipes import RECIPES

    options = {"iterations": 2} if recipe == "qdrop" else {"refinements": 5}
    model = import_model(refmodels.load_model("swin"), input_shape=(3, 32, 32), batch=4)
    images = refmodels.calibration_images()[:16]
    made = [calibrate(model, "w4a4", RECIPES[recipe](**options), images, progress=False) for _ in range(2)]
    assert made[0].plan.hash == made[1].plan.hash
    logits = [simulate(m.mod, m.plan)(images) for m in made]
    assert np.array_equal(*logits) and np.isfinite(logits[0]).all()
