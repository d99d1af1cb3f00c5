"""ReLU in place of GELU, the losses of APHQ-ViT and FIMA-Q, and the recipes made of them."""

import dataclasses

import numpy as np
import pytest
import torch
from canonical_vit import tiny_mixer, tiny_vit
from test_recipes import IMAGES, fit, sqnr
from test_recipes_papers import job_of

from tvm_vitq.calibrate import losses
from tvm_vitq.calibrate.blocks import find_units
from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.frame import percentile_frame
from tvm_vitq.calibrate.losses import Batch, Context
from tvm_vitq.calibrate.mlp_relu import Refit, gelu_to_relu
from tvm_vitq.calibrate.reconstruct import Settings, reconstruct
from tvm_vitq.calibrate.simulate import FakeQuantize, simulate
from tvm_vitq.errors import VitqError
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.recipes import find_recipe
from tvm_vitq.recipes.aphq_vit import APHQViT
from tvm_vitq.recipes.fima_q import FIMAQ
from tvm_vitq.recipes.glf_q import GLFQ

X = torch.from_numpy(IMAGES)
QUICK = [APHQViT(refit=30, iterations=10), FIMAQ(iterations=10), GLFQ(refit=30, iterations=10)]
NAMES = [recipe.name for recipe in QUICK]


def logits(job):
    with torch.no_grad():
        return job.executor.run(X).numpy()


# ReLU


@pytest.mark.parametrize("mod", [tiny_vit(), tiny_mixer()], ids=["vit", "mixer"])
def test_relu_is_refitted(mod):
    job = job_of(mod)
    before = logits(job)
    teacher = gelu_to_relu(job, Refit(0))
    plain = logits(job)
    assert {site.kind for site in job.sites.values() if site.role == "input"} == {"relu", ""}
    job = job_of(mod)
    gelu_to_relu(job, Refit(150, clamped=0.0, rate=5e-3))
    assert sqnr(before, logits(job)) > sqnr(before, plain) + 6
    assert job.costs["relu"].iterations % 150 == 0
    with torch.no_grad():
        np.testing.assert_array_equal(teacher.run(X).numpy(), before)


def test_clamping_pulls_the_tail_in():
    reached = []
    for percentile in (1.0, 0.8):
        job = job_of(tiny_vit(depth=1))
        gelu_to_relu(job, Refit(150, rate=5e-3, percentile=percentile))
        hidden = job.executor.run_between("x", "blocks.0.mlp.act".replace(".", "_"), X)
        reached.append(float(hidden.max()))
    assert reached[1] < 0.95 * reached[0]


def test_other_functions_stay():
    for options in ({"activation": "silu"}, {"gated": True}):
        job = job_of(tiny_vit(**options))
        before = logits(job)
        gelu_to_relu(job, Refit(5))
        np.testing.assert_array_equal(logits(job), before)
        assert job.costs["relu"].iterations == 0
    assert "GELU stays" in job.notes["blocks.1.mlp.act"]


def test_refit_resumes(tmp_path):
    def refitted(work=None, seed=0):
        job = dataclasses.replace(job_of(tiny_vit()), work=work, seed=seed)
        gelu_to_relu(job, Refit(10))
        return job

    whole, kept = refitted(), refitted(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    files[1].unlink()
    resumed = refitted(tmp_path)
    assert resumed.costs["relu"].iterations == 10
    for job in (kept, resumed):
        np.testing.assert_array_equal(logits(job), logits(whole))
    with pytest.raises(VitqError, match="another calibration"):
        refitted(tmp_path, seed=1)


# Losses


def context_of(mod, number=1):
    teacher, units = Executor(mod), find_units(mod)
    with torch.no_grad():
        entered = teacher.run_between("x", units[number].start, X)
        left = teacher.run_between(units[number].start, units[number].stop, entered)
    return Context(units[number], units[-1], teacher, entered, left)


def test_perturbation_hessian_resembles_the_fisher_diagonal():
    """Tokens that do not reach the class token have no weight in the last block."""
    context = context_of(tiny_vit(depth=1))
    measure = losses.PerturbationHessian().prepare(context)
    fisher = losses.Fisher().prepare(context)
    found = []
    for token in (0, 1):
        moved = context.targets.clone()
        moved[:, token] += 0.1
        batch = Batch(moved, context.targets, torch.arange(16), {})
        found.append((float(measure(batch)), float(fisher(batch))))
    assert found[0][0] > 0 and found[1] == (0, 0)
    assert 0.3 < found[0][0] / found[0][1] < 3


def test_low_rank_fisher_collects_rows():
    context = context_of(tiny_vit())
    measure = losses.LowRankFisher(rank=3).prepare(context)
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(context.targets.shape, generator=generator)

    def loss(size, progress=None):
        output = (context.targets + size * noise).requires_grad_()
        value = measure(Batch(output, context.targets, torch.arange(16), {}, progress))
        value.backward()
        assert output.grad.abs().sum() > 0 and torch.isfinite(output.grad).all()
        return float(value.detach())

    assert loss(1.0) == pytest.approx(2.0) and loss(0.5) == pytest.approx(0.5, rel=1e-3)
    assert loss(1.0, 0.0) == pytest.approx(2.0) and len(measure.gradients) == 1
    assert loss(0.5, 0.2) == pytest.approx(0.5, rel=1e-3) and len(measure.gradients) == 1
    for progress, rows in ((0.4, 2), (0.5, 2), (0.7, 3), (0.9, 3)):
        assert loss(1.0, progress) > 0 and len(measure.gradients) == rows
    assert loss(1.0) == pytest.approx(2.0)


@pytest.mark.parametrize("loss", [losses.PerturbationHessian(), losses.LowRankFisher()])
def test_training_lowers_the_error(loss):
    job = job_of(tiny_vit(bias=True), "w3a4")
    percentile_frame(job)
    reference = logits(job)

    def error():
        with torch.no_grad():
            return sqnr(reference, job.executor.run(X, FakeQuantize(job.quantizers)).numpy())

    before = error()
    reconstruct(job, find_units(job.mod), Settings(40, 4, loss=loss))
    assert error() > before


# Recipes


@pytest.mark.parametrize("recipe", QUICK, ids=NAMES)
def test_sites_are_uniform(recipe):
    result = fit(tiny_vit(depth=1), "w3a4", recipe)
    plan, block = result.plan, "blocks.0."
    codecs = {site.codec for name, site in plan.sites.items() if not name.endswith(".probs")}
    assert codecs == {"uniform"} and plan[block + "attn.probs"].codec == "row_maximum"
    heads = "tensor" if recipe.name == "glf-q" else "head"
    assert {plan[block + f"attn.{role}"].granularity for role in "qkv"} == {heads}
    assert plan[block + "mlp.fc1.weight"].granularity == "channel"
    zero = plan[block + "mlp.fc2.input"].zero_point
    assert (zero == [0]) == (recipe.name != "fima-q")
    labels = ["reconstruct"] if recipe.name == "fima-q" else ["relu", "reconstruct"]
    assert [part.split(":")[0] for part in plan.comment.split("; ")] == labels


@pytest.mark.parametrize("recipe", QUICK, ids=NAMES)
def test_integer_program_follows_the_simulation(recipe):
    result = fit(tiny_vit(depth=1, bias=True), "w8a8", recipe)
    model = QuantizedModel(run_passes(result.mod, realize_passes(result.plan)), result.plan)
    assert not model.float_islands
    assert sqnr(simulate(result.mod, result.plan)(IMAGES), model.reference(IMAGES)) > 20


def test_token_scales():
    recipe = FIMAQ(iterations=10, token_scales=True)
    result = fit(tiny_vit(depth=1), "w4a4", recipe)
    site = result.plan["blocks.0.mlp.fc1.input"]
    assert site.granularity == "token" and len(set(site.scale)) == 17
    assert "not folded" in result.plan.notes["blocks.0.norm1"]
    model = QuantizedModel(run_passes(result.mod, realize_passes(result.plan)), result.plan)
    assert np.isfinite(model.reference(IMAGES)).all()


def test_parts_of_glf_q_can_be_left_out():
    off = {"streams": False, "heads": False, "relu": False}
    options = [off, off | {"streams": True}, off | {"heads": True}]
    plans = [fit(tiny_vit(), "w4a4", GLFQ(iterations=0, **given)).plan for given in options]
    assert len({plan.hash for plan in plans}) == 3


def test_recipes_are_listed():
    for recipe in QUICK:
        assert type(find_recipe(recipe.name)) is type(recipe)
