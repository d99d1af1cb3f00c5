"""Schedules as MetaSchedule sees them.

MetaSchedule searches over traces of sampled decisions. What it schedules here is a stand-in for the kernel, a
block that carries the decisions as annotations; the builder reads them there and generates the kernel, whose
loops and registers schedules/ lays out by itself. So sampling, mutation, the cost model and the task
scheduler are TVM's, and the program that is measured is the one that will be shipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import te
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.feature_extractor import PyFeatureExtractor
from tvm.s_tir.meta_schedule.mutator import PyMutator

from tvm_vitq.schedules.attention import Attention
from tvm_vitq.schedules.group_linear import GroupLinear
from tvm_vitq.schedules.isa import ORDERS
from tvm_vitq.schedules.layer_norm import LayerNorm
from tvm_vitq.schedules.linear import Linear
from tvm_vitq.schedules.space import completed, space_of
from tvm_vitq.schedules.tir import LANES, ceildiv
from tvm_vitq.tuning.tasks import Task

BLOCK = "kernel"
ATTRIBUTE = "vitq.kernel"
PREFIX = "vitq.decision."


def stand_in(name: str) -> tvm.IRModule:
    """The module that MetaSchedule schedules in place of a kernel."""
    one = te.compute((1,), lambda i: tvm.tirx.const(0, "int32"), name=BLOCK)
    function = te.create_prim_func([one]).with_attr({"global_symbol": "main", ATTRIBUTE: name})
    return tvm.IRModule({"main": function})


def kernel_of(mod: tvm.IRModule) -> str:
    """The name that `stand_in` was given."""
    return str(mod["main"].attrs[ATTRIBUTE])


def design(spec: Any, taken: Mapping[str, Any] | None = None) -> Any:
    """The schedule function of a kernel: one sampled decision after the other.

    taken : decides instead of chance.
    """
    space = space_of(spec)
    given = None if taken is None else completed(spec, taken)

    def schedule(sch: Schedule) -> None:
        block = sch.get_sblock(BLOCK)
        for name, candidates in space.items():
            decision = None if given is None else candidates.index(given[name])
            count = len(candidates)
            picked = sch.sample_categorical(list(range(count)), [1.0 / count] * count, decision)
            sch.annotate(block, PREFIX + name, picked)

    return schedule


def schedule_of(spec: Any, mod: tvm.IRModule) -> dict[str, Any]:
    """The decisions of a scheduled stand-in."""
    sch = Schedule(mod)
    notes = sch.get(sch.get_sblock(BLOCK)).annotations
    return {name: candidates[int(notes[PREFIX + name])] for name, candidates in space_of(spec).items()}


@derived_object
class MutateDecision(PyMutator):
    """Samples one decision anew: the neighbours of a good schedule differ from it in one thing."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = np.random.default_rng(seed)

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, trace: Any, _: Any = None) -> Any:
        sampled = [i for i in trace.insts if i.kind.name == "SampleCategorical"]
        several = [i for i in sampled if len(i.attrs[0]) > 1]
        if not several:
            return None
        chosen = several[self.random.integers(len(several))]
        others = [d for d in range(len(chosen.attrs[0])) if d != int(trace.decisions[chosen])]
        return trace.with_decision(chosen, int(self.random.choice(others)), True)

    def clone(self) -> MutateDecision:
        return MutateDecision(int(self.random.integers(2**31)))


FEATURES = 15


def _sizes(spec: Any) -> tuple[int, int, int, int]:
    """Rows, columns and depth, and how often there are as many rows. Of attention, its first product."""
    if isinstance(spec, Attention):
        return spec.tq, spec.tk, spec.d, spec.batch * spec.heads
    if isinstance(spec, LayerNorm):
        return spec.m, spec.c, 1, 1
    if isinstance(spec, GroupLinear):
        return spec.tokens, spec.n, spec.k, spec.m // spec.tokens
    return spec.m, spec.n, spec.k, 1


def features(spec: Any, schedule: Mapping[str, Any]) -> np.ndarray:
    """What the cost model knows of a schedule, [FEATURES] float32: logarithms of sizes, bytes and counts."""
    m, n, k, times = _sizes(spec)
    rows, columns = schedule.get("register_tile", (1, LANES))
    vectors = 1 if isinstance(spec, LayerNorm) else ceildiv(columns, spec.target.lanes)
    block = min(schedule["block_rows"], m)
    panels, blocks = ceildiv(n, columns), ceildiv(m, block)
    numbers = [
        m, n, k, rows, columns, block,
        rows * vectors,  # sums in registers
        rows * vectors / (rows + vectors),  # products per load
        panels * columns / n,  # padding of columns
        ceildiv(m, rows) * rows / m,  # of rows
        columns * k,  # bytes of a panel
        block * k,  # of the rows that pass it
        times * blocks * (panels if isinstance(spec, Linear) else 1),  # tasks
        schedule.get("unroll", 1),
        1 + ORDERS.index(schedule.get("order", ORDERS[0])),
    ]  # fmt: skip
    return np.array([math.log2(v) for v in numbers], np.float32)


@derived_object
class ScheduleFeatures(PyFeatureExtractor):
    """`features` of every candidate, as one row each."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.tasks = tasks

    def extract_from(self, context: ms.TuneContext, candidates: Any) -> list[Any]:
        rows = []
        for candidate in candidates:
            spec = self.tasks[kernel_of(candidate.sch.mod)].spec
            row = features(spec, schedule_of(spec, candidate.sch.mod))
            rows.append(tvm.runtime.tensor(row.reshape(1, FEATURES)))
        return rows
