"""Tuned schedules for a build: which records there are, and which kernel gets which."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from tvm_vitq.errors import VitqError
from tvm_vitq.relax_passes.lower_kernels import Site
from tvm_vitq.schedules.space import scheduled
from tvm_vitq.targets import TargetProfile
from tvm_vitq.tuning.records import Record, Run, best, read_run, target_name
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.stream.choice import Choice, Schedule

FOLDER = "tuning_logs"
"""Where `tvm_vitq.tune` writes and `tvm_vitq.compile` looks, besides what the package brings along."""

VTA_FOLDER = "vta"
"""In it, that of records for VTA, of any configuration."""


def vta_name(config: VtaConfig) -> str:
    """Names a VTA in records: its sizes, and the board, whose memory port decides as well."""
    return f"vta-{config.name}"


def find_runs(profile: TargetProfile, where: str | os.PathLike[str] | bool | None = None) -> list[Run]:
    """Runs for a target: for VTA if it has one, whose records `where` then means, and for its CPU.

    Parameters
    ----------
    where : a file of records, a folder of them, or a folder of folders by target. None: ``tuning_logs`` in
        the working directory and in the package, where there may be none (so does True). False: nowhere.

    Raises
    ------
    VitqError : a given place does not exist or has nothing for this target; a damaged file.
    """
    cpu = target_name(profile)
    if profile.vta is None:
        return _find(cpu, cpu, where)
    return _find(vta_name(profile.vta), VTA_FOLDER, where) + _find(cpu, cpu, where is not False)


def _find(name: str, folder: str, where: str | os.PathLike[str] | bool | None) -> list[Run]:
    if where is False:
        return []
    if where is None or where is True:
        package = importlib.import_module("tvm_vitq.tuning_logs")
        places = {Path(place).resolve() for place in (FOLDER, *package.__path__)}
        files = sorted(file for place in places for file in (place / folder).glob("*.jsonl"))
        return [run for run in map(read_run, files) if run.target == name]
    given = Path(where)
    if not given.exists():
        raise VitqError("no such tuning records", where=given, fix="make them with `vitq tune`")
    if given.is_file():
        files = [given]
    else:
        files = sorted((given / folder).glob("*.jsonl")) or sorted(given.glob("*.jsonl"))
    runs = [read_run(file) for file in files]
    own = [run for run in runs if run.target == name]
    others = sorted({run.target for run in runs if run.target != name})
    if not own:
        raise VitqError(
            "tuning records of another target" if others else "no tuning records of this target",
            where=given,
            got=", ".join(others or sorted(p.name for p in given.iterdir() if p.is_dir())) or "nothing",
            expected=name,
            fix="tune for this target, or leave tuning_logs out to build with default schedules",
        )
    return own


class TunedTiles:
    """Chooses for VTA: the schedule of the best record, or the one with the best estimate.

    Attributes
    ----------
    tuned : names of the products and launches that have a record.
    notes : those whose record could not be used.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.records = best(record for run in runs for record in run.records)
        self.tuned: set[str] = set()
        self.notes: dict[str, str] = {}

    def __call__(self, choice: Choice) -> Schedule | None:
        record = self.records.get(choice.signature)
        if record is None:
            return None
        if record.schedule is not None and not choice.accepts(record.schedule):
            self.notes[choice.name] = f"default tile: that of its record does not fit ({record.schedule})"
            return None
        self.tuned.add(choice.name)
        return record.schedule


class TunedSchedules:
    """Chooses for `lower_kernels`: the best record of a kernel, or its default schedule.

    Records made with as many threads as the library is built for (0: one per core) go before others, of
    which those with more threads come first; times are compared only within the same number.

    Attributes
    ----------
    tuned : names of the kernels, as scheduled, that have a record.
    notes : kernels whose record could not be used, with the reason.
    """

    def __init__(self, runs: list[Run], threads: int = 0) -> None:
        self.records: dict[str, Record] = {}
        for count in sorted({run.threads for run in runs}, key=lambda n: (n != threads, n != 0, -n)):
            found = best(record for run in runs if run.threads == count for record in run.records)
            self.records = {**found, **self.records}
        self.tuned: set[str] = set()
        self.notes: dict[str, str] = {}

    def __call__(self, site: Site) -> Any:
        record = self.records.get(site.spec.name)
        if record is None:
            return site.spec
        try:
            spec = site.spec if record.schedule is None else scheduled(site.spec, record.schedule)
        except VitqError as error:
            self.notes[site.spec.name] = f"default schedule: {error.what} ({error.got})"
            return site.spec
        self.tuned.add(spec.name)
        return spec
