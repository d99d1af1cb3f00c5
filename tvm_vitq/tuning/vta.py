"""Tuning for VTA: tiles, loop orders and contexts of a model's products, measured by the cycle model.

The estimate that chooses default tiles orders the candidates, so that few are worth measuring; which product
is next depends on its share of the model's cycles. The model gives the same cycles every time, so nothing is
repeated, and any machine can tune for any configuration.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvm_vitq.errors import VitqError
from tvm_vitq.pipeline import lower_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.relax_passes.offload_vta import Offload
from tvm_vitq.targets import TargetProfile
from tvm_vitq.tuning.apply import FOLDER, VTA_FOLDER, vta_name
from tvm_vitq.tuning.records import Record, Writer, best, earlier_records, model_name
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.stream.choice import Choice, Schedule


class _Task:
    """A product or launch, how often the model has it, and what is known of its schedules."""

    def __init__(self, choice: Choice, calls: int) -> None:
        self.choice, self.calls = choice, calls
        self.best, self.fewest = choice.schedule, choice.cycles(choice.schedule)
        self.default = self.fewest
        self.tried = [dict(choice.schedule)]
        self.options = choice.options(self.best)

    def next(self) -> Schedule | None:
        """One that has not been tried; None: there is no more."""
        return next((option for option in self.options if option not in self.tried), None)

    def found(self, schedule: Schedule, cycles: int) -> None:
        """Takes a measurement into account."""
        self.tried.append(dict(schedule))
        if cycles < self.fewest:
            self.best, self.fewest = schedule, cycles
            self.options = self.choice.options(schedule)


def tune_vta(
    quantized: QuantizedModel,
    profile: TargetProfile,
    *,
    trials: int,
    seconds: float | None,
    work_dir: str | os.PathLike[str] | None,
    resume: bool,
    progress: bool,
) -> dict[str, Any]:
    """See tvm_vitq.tune."""
    assert profile.vta is not None
    target = vta_name(profile.vta)
    machine = target.removeprefix(f"{VTA_FOLDER}-")
    path = Path(work_dir or FOLDER) / VTA_FOLDER / f"{model_name(quantized)}-{machine}.jsonl"
    records = earlier_records(path, resume, target)
    tasks = find_products(quantized, profile)
    writer = Writer(path, target, _about(quantized, profile.vta, trials))
    second = 1e-6 / profile.vta.board.megahertz

    def found(name: str, schedule: Schedule | None, cycles: int) -> None:
        records.append(Record(name, dict(schedule) if schedule else None, [cycles * second]))
        writer.add(records[-1])

    done = 0
    for name, task in tasks.items():
        known = [record for record in records if record.kernel == name]
        if not any(record.schedule is None for record in known):
            found(name, None, task.default)
        for record in known:
            if record.schedule is not None:
                task.found(record.schedule, round(record.fastest / second))
                done += 1
    end = time.monotonic() + seconds if seconds else float("inf")
    with tqdm(
        total=trials, initial=min(done, trials), desc="tune", unit="trial", disable=not progress
    ) as bar:
        for name, schedule in _candidates(tasks):
            if done >= trials or time.monotonic() > end:
                break
            cycles = tasks[name].choice.cycles(schedule)
            found(name, schedule, cycles)
            tasks[name].found(schedule, cycles)
            done += 1
            bar.update()
    return _report(tasks, records, path)


def find_products(quantized: QuantizedModel, profile: TargetProfile) -> dict[str, _Task]:
    """What has a schedule in a model, by signature."""
    assert profile.vta is not None
    calls: dict[str, int] = {}
    choices: dict[str, Choice] = {}

    def note(choice: Choice) -> None:
        calls[choice.signature] = calls.get(choice.signature, 0) + 1
        choices.setdefault(choice.signature, choice)

    offload = Offload(profile.vta, note, profile.residual)
    passes = lower_passes(profile, offload=offload)
    last = [name for name, _ in passes].index("offload")
    with profile.target:
        run_passes(quantized.mod, passes[: last + 1], first=1)
    if not choices:
        raise VitqError("no product of the model runs on VTA", where=quantized.name, got=offload.notes)
    return {signature: _Task(choice, calls[signature]) for signature, choice in choices.items()}


def _candidates(tasks: dict[str, _Task]) -> Iterator[tuple[str, Schedule]]:
    """Schedules of what has most cycles for each of its trials."""
    left = dict(tasks)
    while left:
        name = max(left, key=lambda name: left[name].calls * left[name].default / len(left[name].tried))
        schedule = left[name].next()
        if schedule is None:
            del left[name]
            continue
        yield name, schedule


def _about(quantized: QuantizedModel, config: VtaConfig, trials: int) -> dict[str, Any]:
    return {
        "model": quantized.name,
        "bits": quantized.plan.bits,
        "batch": quantized.input_shape[0],
        "config": config.to_json(),
        "device": "cycle model",
        "trials": trials,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(Path(a).name if n == 0 else a for n, a in enumerate(sys.argv)),
        "versions": {name: importlib.metadata.version(name) for name in ("tvm-vitq", "numpy")},
    }


def _report(tasks: dict[str, _Task], records: list[Record], path: Path) -> dict[str, Any]:
    """As that of `run.report`."""
    chosen = best(records)
    rows = []
    for name, task in tasks.items():
        own = [record for record in records if record.kernel == name]
        record = chosen[name]
        rows.append(
            {
                "kernel": name,
                "calls": task.calls,
                "trials": sum(r.schedule is not None for r in own),
                "failed": 0,
                "default": min(s for r in own if r.schedule is None for s in r.seconds),
                "best": record.fastest,
                "schedule": dict(record.schedule) if record.schedule else None,
            }
        )
    return {"path": str(path), "kernels": rows, "trials": sum(row["trials"] for row in rows), "wrong": []}
