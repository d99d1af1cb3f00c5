"""What tuning has found: one file per run, in one folder per target.

``tuning_logs/<target>/<run>.jsonl``: the first line says how the records were made, every further one is a
record. Lines are appended as they are found, so an interrupted run loses nothing but the candidate it was at.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tvm_vitq.errors import VitqError
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.targets import TargetProfile

FORMAT, FORMAT_VERSION = "tvm-vitq tuning records", 1


GAIN = 1.01
"""See `best`."""


@dataclass(frozen=True)
class Record:
    """One measured candidate.

    kernel : name of the kernel under its default schedule.
    schedule : decision -> candidate, see schedules/space.py; None: the default schedule.
    seconds : of calls; empty for a candidate that failed, with `error`.
    final : measured in turns with the others of the kernel's best, at the end of a run.
    """

    kernel: str
    schedule: Mapping[str, Any] | None
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    final: bool = False

    @property
    def fastest(self) -> float:
        """The least of `seconds`, for other work on a machine only ever adds; infinity if there are none."""
        return min(self.seconds, default=float("inf"))


@dataclass(frozen=True)
class Run:
    """A file of records.

    target : canonical name of the target, as `target_name`.
    about : device, versions, date, threads, command, model: for people.
    """

    path: Path
    target: str
    about: Mapping[str, Any]
    records: list[Record]

    @property
    def threads(self) -> int:
        """Of the kernels' thread pool; 0: one per core."""
        stated = self.about.get("threads")
        return stated if isinstance(stated, int) else 0


def target_name(profile: TargetProfile) -> str:
    """Names the folder of a target: kernels' instruction set and CPU. Records are for exactly these."""
    return f"{profile.key}-{profile.mcpu or 'generic'}"


def model_name(quantized: QuantizedModel) -> str:
    """Names the file of a run: model, widths and batch."""
    model = re.sub(r"[^\w.-]+", "_", quantized.name)
    return f"{model}-{quantized.plan.bits}-b{quantized.input_shape[0]}"


def read_run(path: str | os.PathLike[str]) -> Run:
    """A file of records; VitqError if it is missing, foreign or damaged. An incomplete last line, of a run
    that was killed, is left out.
    """
    file = Path(path)
    try:
        text = file.read_text()
    except OSError as error:
        raise VitqError("cannot read tuning records", where=file, got=error.strerror) from error
    lines = text.split("\n")[:-1]
    try:
        head = dict(json.loads(lines[0]))
        if head.get("format") != FORMAT or head.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{head.get('format')} version {head.get('format_version')}")
        records = [Record(**json.loads(line)) for line in lines[1:]]
    except (ValueError, TypeError, IndexError) as error:
        raise VitqError(
            "not a file of tuning records",
            where=file,
            got=str(error) or "an empty file",
            expected=f"{FORMAT}, version {FORMAT_VERSION}, one JSON object a line",
            fix="remove the file, or tune anew",
        ) from error
    return Run(file, str(head["target"]), head["about"], records)


def earlier_records(path: Path, resume: bool, target: str) -> list[Record]:
    """What an earlier run has found.

    Raises
    ------
    VitqError : there is one, but it is not to be resumed, or is for another target.
    """
    if not path.exists():
        return []
    if not resume:
        raise VitqError(
            "there are records of such a run already",
            where=path,
            fix="go on with it (--resume, resume=True), or remove the file to start anew",
        )
    run = read_run(path)
    if run.target != target:
        raise VitqError("tuning records of another target", where=path, got=run.target, expected=target)
    return run.records


class Writer:
    """Appends records to a file, each whole and at once."""

    def __init__(self, path: Path, target: str, about: Mapping[str, Any]) -> None:
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            head = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "target": target,
                "about": dict(about),
            }
            self._append(head)
        elif not path.read_bytes().endswith(b"\n"):
            whole = path.read_bytes().rpartition(b"\n")
            path.write_bytes(whole[0] + whole[1])

    def add(self, record: Record) -> None:
        """Appends a record."""
        kept = {name: value for name, value in asdict(record).items() if value or name == "schedule"}
        kept["seconds"] = [round(value, 9) for value in record.seconds]
        self._append(kept)

    def _append(self, data: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(data) + "\n")


def best(records: Iterable[Record]) -> dict[str, Record]:
    """The fastest record of each kernel: of those that were compared in turns, if there are any. There, the
    default schedule yields only to one that is faster by `GAIN`: it suits other numbers of threads as well.
    """
    found: dict[str, Record] = {}
    rank: dict[str, tuple[bool, float]] = {}
    for record in records:
        handicap = GAIN if record.final and record.schedule is not None else 1.0
        own = (not record.final, record.fastest * handicap)
        if record.seconds and own < rank.get(record.kernel, (True, float("inf"))):
            found[record.kernel], rank[record.kernel] = record, own
    return found
