"""MetaSchedule's task scheduler, evolutionary search and xgboost model over a model's kernels."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBModel
from tvm.s_tir.meta_schedule.database import TuningRecord
from tvm.s_tir.meta_schedule.runner import RunnerResult
from tvm.s_tir.meta_schedule.search_strategy import MeasureCandidate

from tvm_vitq.targets import TargetProfile
from tvm_vitq.tuning.candidates import MutateDecision, ScheduleFeatures, design, stand_in
from tvm_vitq.tuning.measuring import Builder, Measuring, OutOfTime, Runner
from tvm_vitq.tuning.records import Record
from tvm_vitq.tuning.tasks import Task

AT_ONCE = 4
"""Candidates of a kernel between two looks at which kernel is most worth the next ones."""

WARM = 16
"""Measured candidates from which on the cost model is asked."""

NEIGHBOURS = 0.9
"""Share of the population that comes of mutation."""


@dataclass(frozen=True)
class Budget:
    """End of a run: number of candidates in all, those of earlier runs included, and seconds (None: any)."""

    trials: int
    seconds: float | None = None


def search(
    tasks: Sequence[Task],
    profile: TargetProfile,
    measuring: Measuring,
    earlier: Sequence[Record],
    budget: Budget,
    seed: int = 0,
) -> None:
    """Measures candidates until the budget is used up or the spaces are; results leave through `measuring`.

    Parameters
    ----------
    earlier : records of an interrupted run: they count, teach the cost model, and are not measured again.
    """
    left = budget.trials - len(earlier)
    if left <= 0:
        return
    by_name = {task.name: task for task in tasks}
    known: dict[str, tuple[str, Mapping[str, Any]]] = {}
    deadline = None if budget.seconds is None else time.monotonic() + budget.seconds
    with _quiet(), _without_stock_intrinsics():
        contexts = [_context(task, profile, seed + n) for n, task in enumerate(tasks)]
        database = ms.database.MemoryDatabase()
        model = XGBModel(extractor=ScheduleFeatures(by_name), num_warmup_samples=WARM, verbose_eval=0)
        _remember(contexts, tasks, earlier, database, model, profile)
        with contextlib.suppress(OutOfTime):
            ms.tune.tune_tasks(
                tasks=contexts,
                task_weights=[float(task.calls) for task in tasks],
                work_dir="",
                max_trials_global=left,
                num_trials_per_iter=max(n for n in range(1, AT_ONCE + 1) if left % n == 0),
                builder=Builder(measuring, known, deadline),
                runner=Runner(measuring, known),
                database=database,
                cost_model=model,
                measure_callbacks=[
                    ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel()
                ],
                task_scheduler=ms.task_scheduler.GradientBased(seed=seed + 1),
            )  # fmt: skip


def _context(task: Task, profile: TargetProfile, seed: int) -> ms.TuneContext:
    space = ms.space_generator.ScheduleFn(
        design(task.spec), sch_rules=[], postprocs=[], mutator_probs={MutateDecision(seed): NEIGHBOURS}
    )
    strategy = ms.search_strategy.EvolutionarySearch(population_size=128, init_min_unmeasured=16)
    return ms.TuneContext(
        stand_in(task.name), target=profile.target, space_generator=space, search_strategy=strategy,
        task_name=task.name, rand_state=seed + 1, num_threads=1,
    )  # fmt: skip


def _remember(
    contexts: Sequence[ms.TuneContext],
    tasks: Sequence[Task],
    earlier: Sequence[Record],
    database: ms.database.Database,
    model: XGBModel,
    profile: TargetProfile,
) -> None:
    """Tells database and cost model of earlier records."""
    for context, task in zip(contexts, tasks, strict=True):
        workload = database.commit_workload(context.mod)
        candidates, results = [], []
        for record in earlier:
            if record.kernel != task.name or record.schedule is None:
                continue
            sch = Schedule(context.mod)
            design(task.spec, record.schedule)(sch)
            seconds = record.seconds or [1e10]  # as MetaSchedule counts failures
            info = ms.arg_info.ArgInfo.from_entry_func(context.mod, False)
            database.commit_tuning_record(TuningRecord(sch.trace, workload, seconds, profile.target, info))
            candidates.append(MeasureCandidate(sch, info))
            results.append(RunnerResult(record.seconds or None, record.error))
        model.update(context, candidates, results)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MetaSchedule's tables of progress go nowhere: ours is the progress bar. Its cost model draws from the
    global generator of NumPy, which is the caller's.
    """
    logger = logging.getLogger("tvm.s_tir.meta_schedule")
    before, state = logger.level, np.random.get_state()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
        np.random.set_state(state)


@contextlib.contextmanager
def _without_stock_intrinsics() -> Iterator[None]:
    """A tuning context imports the tensor intrinsics of every vendor, which takes 20 s, and we use none."""
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
        if hasattr(tvm.s_tir, "tensor_intrin"):
            del tvm.s_tir.tensor_intrin
