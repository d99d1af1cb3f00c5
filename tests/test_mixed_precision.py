"""Widths by layer: the knapsack, budgets, sensitivities, and what a plan says of the choice."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from canonical_vit import tiny_vit

from tvm_vitq.calibrate import allocate as knapsack
from tvm_vitq.calibrate import calibrate
from tvm_vitq.calibrate.allocate import Option, allocate
from tvm_vitq.calibrate.budget import Budget, cost, matmuls, parse_budget, unit_cost
from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.sensitivity import divergences
from tvm_vitq.calibrate.simulate import FakeQuantize
from tvm_vitq.cli import main
from tvm_vitq.errors import VitqError
from tvm_vitq.frontend.model import FloatModel
from tvm_vitq.plan import QuantPlan
from tvm_vitq.recipes.minmax import MinMax
from tvm_vitq.recipes.qdrop import QDrop
from tvm_vitq.relax_passes.annotate import annotate
from tvm_vitq.relax_passes.sites import list_sites
from tvm_vitq.site_rules import layer_of, resolve_specs, role_of

IMAGES = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32)


def mixed(budget, recipe="minmax", mod=None, **options):
    mod = tiny_vit() if mod is None else mod
    model = FloatModel(mod, "tiny", (2, 3, 16, 16), None, None)
    options = {"calibration": IMAGES, "progress": False, **options}
    return calibrate(model, "auto", recipe, budget=budget, **options)


def spent(plan, kind, mod=None):
    """What a plan costs, in units of the budget."""
    products = [p for of in matmuls(tiny_vit() if mod is None else mod).values() for p in of]
    specs = {name: plan[name] for name in [*plan.sites, *plan.aliases]}
    return cost(kind, products, specs) / unit_cost(kind, products)


def random_items(rng, count, options=4):
    return [
        [Option(int(rng.integers(0, 30)), float(rng.random())) for _ in range(options)] for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_knapsack_is_exact(seed):
    rng = np.random.default_rng(seed)
    items = random_items(rng, 6)
    least = sum(min(o.cost for o in options) for options in items)
    for budget in (least, least + 20, 1000):
        picked = [options[n] for options, n in zip(items, allocate(items, budget), strict=True)]
        assert sum(o.cost for o in picked) <= budget
        best = min(
            sum(o.loss for o in chosen)
            for chosen in itertools.product(*items)
            if sum(o.cost for o in chosen) <= budget
        )
        assert sum(o.loss for o in picked) == pytest.approx(best)
    with pytest.raises(VitqError, match=f"{least} or more"):
        allocate(items, least - 1)


def test_knapsack_of_many_different_sizes(monkeypatch):
    rng = np.random.default_rng(0)
    items = [
        [Option(int(size * width), 4.0**-width * float(weight)) for width in range(3, 9)]
        for size, weight in zip(rng.integers(10**6, 10**7, 40), rng.random(40), strict=True)
    ]
    budget = sum(options[0].cost for options in items) * 3 // 2

    def loss():
        picked = [options[n] for options, n in zip(items, allocate(items, budget), strict=True)]
        assert sum(o.cost for o in picked) <= budget
        return sum(o.loss for o in picked)

    exact = loss()
    monkeypatch.setattr(knapsack, "MOST_STATES", 500)
    assert exact <= loss() <= 1.02 * exact


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("4bit", "bits", 4.0),
        ("4.5 bits", "bits", 4.5),
        ("0.6x", "size", 0.6),
        ("8MB", "bytes", 8e6),
        ("120 kB", "bytes", 1.2e5),
        (".35x bops", "bops", 0.35),
        ("0.35 x bops", "bops", 0.35),
    ],
)
def test_budgets(text, kind, limit):
    assert parse_budget(text) == Budget(kind, limit)
    assert parse_budget(str(parse_budget(text))) == parse_budget(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5ms", "bops"),
        ("4", "4.0bit"),
        ("four bits", "unknown budget"),
        ("4bops", "unknown budget"),
        ("0bit", "positive"),
        (None, "belong together"),
    ],
)
def test_wrong_budgets(text, message):
    with pytest.raises(VitqError, match=message):
        mixed(text)


def test_budget_needs_auto():
    model = FloatModel(tiny_vit(), "tiny", (2, 3, 16, 16), None, None)
    with pytest.raises(VitqError, match="belong together"):
        calibrate(model, "w4a4", calibration=IMAGES, budget="4bit")
    with pytest.raises(VitqError, match="malformed bits"):
        calibrate(model, "mixed", calibration=IMAGES)


@pytest.mark.parametrize("kind", ["bits", "size", "bytes", "bops"])
def test_impossible_budgets_say_the_minimum(kind, monkeypatch):
    monkeypatch.setattr(MinMax, "fit", None)  # told before the first calibration
    with pytest.raises(VitqError, match="or more, which is 3 bits everywhere") as raised:
        mixed(Budget(kind, 1e-3))
    least = parse_budget(raised.value.expected.split(" or more")[0])
    with pytest.raises(TypeError):  # enough: it goes on to calibrate
        mixed(least)


def test_divergence_is_that_of_one_layer():
    mod = tiny_vit()
    names = [site.name for site in list_sites(mod)]
    annotated, aliases = annotate(mod, resolve_specs(names, "w3a3"))
    job = Job(annotated, resolve_specs(names, "w3a3"), aliases, torch.from_numpy(IMAGES), show_progress=False)
    MinMax().fit(job)
    groups = [["patch_embed.proj"], ["blocks.0.attn"], ["blocks.1.mlp.fc2"], ["head"]]
    found = divergences(job, groups, images=5)
    x = torch.from_numpy(IMAGES[:5])
    executor = Executor(annotated)
    for group, divergence in zip(groups, found, strict=True):
        only = FakeQuantize({n: q for n, q in job.quantizers.items() if layer_of(n) in group})
        p, q = (executor.run(x, hooks).double().log_softmax(-1) for hooks in (None, only))
        assert divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
        assert divergence > 1e-5


@pytest.mark.parametrize("budget", ["4bit", "0.55x", "0.02MB", "0.3x bops"])
def test_budgets_are_kept_and_used(budget):
    plan = mixed(budget).plan
    asked = parse_budget(budget)
    assert 0.9 * asked.limit < spent(plan, asked.kind) <= asked.limit * (1 + 1e-5)
    assert plan.bits == "mixed" and f"chosen for {asked}" in plan.notes["bits"]
    assert len({q.bits for name, q in plan.sites.items() if role_of(name) == "weight"}) > 1
    assert plan["patch_embed.proj.input"].bits == 8
    for name, site in plan.sites.items():
        if name.endswith(".weight") and name != "patch_embed.proj.weight":
            assert plan[f"{layer_of(name)}.input"].bits == site.bits
        assert set(plan.statistics[name].divergence) == set("345678")
    if asked.kind == "bits":
        assert {plan[f"blocks.{i}.attn.{r}"].bits for i in range(2) for r in ("q", "probs")} == {4}


def test_more_budget_less_divergence():
    plans = [mixed(f"{bits}bit").plan for bits in (3, 4.5, 8)]
    assert [round(spent(plan, "bits"), 3) for plan in (plans[0], plans[2])] == [3.0, 8.0]

    def total(plan):
        weights = [name for name in plan.sites if name.endswith(".weight")]
        return sum(plan.statistics[name].divergence[str(plan[name].bits)] for name in weights)

    assert total(plans[0]) > total(plans[1]) > total(plans[2])


def test_shared_inputs_share_a_width():
    mod = tiny_vit(gated=True)
    plan = mixed("0.3x bops", mod=mod).plan
    for i in range(2):
        assert plan.aliases[f"blocks.{i}.mlp.fc1_g.input"] == f"blocks.{i}.mlp.fc1.input"
        assert plan[f"blocks.{i}.mlp.fc1_g.weight"].bits == plan[f"blocks.{i}.mlp.fc1.weight"].bits


def test_overrides_are_not_chosen():
    plan = mixed("4.5bit", overrides={"head": 8, "blocks.0.mlp.fc1": {"bits": 3}}).plan
    assert plan["head.weight"].bits == plan["head.input"].bits == 8
    assert plan["blocks.0.mlp.fc1.weight"].bits == 3
    assert spent(plan, "bits") <= 4.5 + 1e-5


def test_methods_that_train_are_run_once(monkeypatch):
    runs = []
    fit = QDrop.fit
    monkeypatch.setattr(QDrop, "fit", lambda self, job: (runs.append(1), fit(self, job)))
    plan = mixed("4bit", recipe=QDrop(iterations=2)).plan
    assert len(runs) == 1 and plan.recipe == "qdrop" and plan.bits == "mixed"


def test_a_mixed_plan_is_a_start(tmp_path):
    chosen = mixed("4bit").plan
    chosen.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == chosen
    model = FloatModel(tiny_vit(), "tiny", (2, 3, 16, 16), None, None)
    again = calibrate(model, "mixed", "minmax", IMAGES, overrides=chosen.asked(), progress=False).plan
    assert again.sites == chosen.sites


def test_command_line(tmp_path, capsys):
    from tvm_vitq import refmodels

    np.save(tmp_path / "few.npy", refmodels.calibration_images()[:2])
    arguments = [
        "quantize",
        "refmodel:swin",
        "--calibration",
        str(tmp_path / "few.npy"),
        "--recipe",
        "minmax",
    ]
    arguments += ["--bits", "auto", "-o", str(tmp_path / "swin.vitq"), "--json"]
    assert main([*arguments, "--budget", "1bit"]) == 2
    assert "3bit or more" in capsys.readouterr().err
    assert main([*arguments, "--budget", "0.3x bops"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits"] == "mixed" and any("0.3x bops" in text for text in report["warnings"])
