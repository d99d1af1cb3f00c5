"""Schedules of every kind of kernel: none changes a bit, and the first candidates are the default."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tvm
from canonical_vit import tiny_vit
from group_cases import group_linear_case
from kernel_cases import CODES, INDEX, WIDE, attention_case, layer_norm_case, linear_case
from kernel_library import Case
from kernel_runs import ISAS, profile_of

import tvm_vitq
from tvm_vitq import targets
from tvm_vitq.calibrate import calibrate
from tvm_vitq.errors import VitqError
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.recipes.igq_vit import IGQViT
from tvm_vitq.schedules.isa import isa_names
from tvm_vitq.schedules.space import completed, scheduled, space_of
from tvm_vitq.schedules.weight_planes import WeightPlanes
from tvm_vitq.tuning import workers
from tvm_vitq.tuning.candidates import FEATURES, features
from tvm_vitq.tuning.records import Record, Writer, target_name
from tvm_vitq.tuning.tasks import find_tasks

torch.set_num_threads(1)
HERE = targets.parse("llvm")
LOOKUP = {"out": INDEX, "lookup": "int8", "zero_point": "scalar"}
LINEARS = LOOKUP, {"out": WIDE, "residual": True}, {"out": CODES, "planes": WeightPlanes(4, 3)}


def linear(isa, variant=0, m=25, schedule=None):
    shape, options = (m, 83, 44), LINEARS[variant % 3]
    spec = linear_case("", isa, shape, options).spec
    tile = None if schedule is None else scheduled(spec, schedule).tile
    return linear_case("", isa, shape, {**options, "tile": tile})


def group_linear(isa, variant=0, tokens=25, schedule=None):
    shape, options = (2, tokens, 83, 44, 3, 8), (LOOKUP, {"out": CODES})[variant % 2]
    spec = group_linear_case("", isa, shape, options).spec
    tile = None if schedule is None else scheduled(spec, schedule).tile
    return group_linear_case("", isa, shape, {**options, "tile": tile})


def attention(isa, variant=0, queries=7, schedule=None):
    case = attention_case("", isa, (1, 2, queries, 21, 12, 20), step=(0.0, None)[variant % 2])
    return case if schedule is None else replace(case, spec=scheduled(case.spec, schedule))


def layer_norm(isa, variant=0, m=21, schedule=None):
    case = layer_norm_case("", m, 45, CODES)
    return case if schedule is None else replace(case, spec=scheduled(case.spec, schedule))


KINDS = {make.__name__: make for make in (linear, group_linear, attention, layer_norm)}


def covering(space):
    """Schedules with every candidate of every decision, as few as the longest list has."""
    rng = np.random.default_rng(0)
    count = max(map(len, space.values()))
    lists = {
        name: [candidates[i] for i in rng.permutation(len(candidates))] for name, candidates in space.items()
    }
    return [
        {name: candidates[n % len(candidates)] for name, candidates in lists.items()} for n in range(count)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_equals_numerics(kind, use_threads):
    """Odd sizes, under one thread and under two."""
    isa = ISAS[:2][-1] if kind == "group_linear" else ISAS[0]  # narrower registers have fewer tiles
    schedules = covering(space_of(KINDS[kind](isa).spec))
    cases: list[Case] = [KINDS[kind](isa, n, schedule=schedule) for n, schedule in enumerate(schedules)]
    functions = {case.spec.name: case.spec.kernel().func for case in cases}
    assert len(functions) == len(cases)
    executable = tvm.compile(tvm.IRModule(functions), profile_of(isa).target)
    for threads in (1, 2):
        use_threads(threads)
        for case in cases:
            out = tvm.runtime.tensor(np.zeros(case.expected.shape, case.expected.dtype))
            executable[case.spec.name](*map(tvm.runtime.tensor, case.operands()), out)
            np.testing.assert_array_equal(out.numpy(), case.expected, case.spec.name)


def program(spec):
    """The text of a kernel without its name."""
    return spec.kernel().func.script().replace(spec.name, "kernel")


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_candidates_are_the_default(kind, isa):
    """Also of decisions that a record does not have; and where rows do not fill the default tile or block."""
    for rows in (3, 205):
        spec = KINDS[kind](isa, 0, rows).spec
        space = space_of(spec)
        first = {name: candidates[0] for name, candidates in space.items()}
        assert completed(spec, {}) == first
        assert program(scheduled(spec, first)) == program(spec)
        for name, candidates in space.items():
            assert all(candidates.count(candidate) == 1 for candidate in candidates), name
        row = features(spec, first)
        assert row.shape == (FEATURES,) and np.isfinite(row).all()


def test_orders_go_through_the_same_tasks():
    case = linear(ISAS[0], m=205)
    space = space_of(case.spec)
    assert space["order"] == ["panels", "rows"]
    by_rows = scheduled(case.spec, {"block_rows": 24, "order": "rows"})
    by_panels = scheduled(case.spec, {"block_rows": 24})
    assert program(by_rows) != program(by_panels) and by_rows.name != by_panels.name
    assert space_of(linear(ISAS[0], m=1).spec)["order"] == ["panels"]


def test_rows_of_a_task_are_those_asked_for():
    """All rows in one task, and a thread's share of each head."""
    spec = group_linear(ISAS[0], tokens=205).spec
    loops = re.findall(r"T\.parallel\((\d+)\)", program(scheduled(spec, {"block_rows": 205})))
    panels = -(-83 // spec.tiles.columns)
    assert loops == [str(2 * panels)]
    spec = attention(ISAS[0], queries=197).spec
    assert spec.block_rows == 66  # three tasks for each of two heads
    for asked in (197, 66, 25):
        text = program(scheduled(spec, {"block_rows": asked}))
        tiles = -(-197 // spec.tiles.rows)  # a task takes whole ones
        assert f"T.parallel({2 * -(-tiles // -(-asked // spec.tiles.rows))})" in text


def test_layer_norm_of_one_task_wakes_no_thread():
    spec = layer_norm(ISAS[0]).spec
    assert space_of(spec) == {"block_rows": [1, 4, 16, 21]}
    assert "parallel(21)" in program(spec) and "parallel(6)" in program(scheduled(spec, {"block_rows": 4}))
    assert "parallel" not in program(scheduled(spec, {"block_rows": 21}))


def test_what_is_no_candidate_is_refused():
    for kind, bad in (("layer_norm", {"register_tile": [1, 16]}), ("attention", {"order": "rows"})):
        with pytest.raises(VitqError, match="not a schedule of this kernel"):
            scheduled(KINDS[kind](ISAS[0]).spec, bad)


@pytest.fixture(scope="module")
def grouped():
    """A model whose linear layers have dynamic groups."""
    shape = (2, 3, 16, 16)
    images = np.random.default_rng(3).normal(size=(8, *shape[1:])).astype(np.float32)
    model = SimpleNamespace(mod=tiny_vit(depth=1), name="tiny", input_shape=shape, preprocessing=None)
    made = calibrate(model, "w4a4", IGQViT(groups=3), images, progress=False)
    return QuantizedModel(run_passes(made.mod, realize_passes(made.plan)), made.plan), images


def test_every_kind_is_tuned_and_builds_take_it(grouped, tmp_path):
    """Tasks have the operands and results of their kernels; records of all of them are applied."""
    quantized, images = grouped
    tasks = {
        re.search("vitq_(.*?)_(?:qs|w32|x16|f32)", task.name)[1]: task for task in find_tasks(quantized, HERE)
    }
    assert set(tasks) == {"linear", "group_linear", "attention", "layer_norm"}
    writer = Writer(tmp_path / "run.jsonl", target_name(HERE), {})
    once, wanted = workers.Device(threads=1, repeat=1, least_ms=0), set()
    for task in tasks.values():
        schedule = {name: candidates[-1] for name, candidates in space_of(task.spec).items()}
        spec = scheduled(task.spec, schedule)
        path = workers.build(spec, HERE, str(tmp_path / f"{len(wanted)}.so"))
        workers.measure([workers.Candidate(path, spec.name, task.operands(spec))], task.expected, once)
        assert len(np.unique(task.expected)) > 4
        writer.add(Record(task.name, schedule, [1.0]))
        wanted.add(spec.name)
    library = tvm_vitq.compile(quantized, tuning_logs=writer.path)
    assert {k["name"] for k in library.report["kernels"] if k["schedule"] == "tuned"} == wanted
    assert not any("default schedule" in warning for warning in library.report["warnings"])
    np.testing.assert_array_equal(library(images[:2]), quantized.reference(images[:2]))
