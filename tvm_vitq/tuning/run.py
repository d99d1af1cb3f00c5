"""`tvm_vitq.tune`: a tuning run from beginning to end, resumable, and what it found."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvm_vitq import cpu
from tvm_vitq.errors import VitqError
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.targets import TargetProfile, parse
from tvm_vitq.tuning.apply import FOLDER
from tvm_vitq.tuning.measuring import Measuring
from tvm_vitq.tuning.records import Record, Writer, best, earlier_records, model_name, target_name
from tvm_vitq.tuning.search import Budget, search
from tvm_vitq.tuning.tasks import Task, find_tasks
from tvm_vitq.tuning.vta import tune_vta
from tvm_vitq.tuning.workers import Device

FINALISTS, ROUNDS = 2, 3
"""The best of each kernel, and its default schedule, measured in turns at the end, and how often."""


def tune_model(
    quantized: QuantizedModel,
    target: Any,
    *,
    trials: int,
    seconds: float | None,
    work_dir: str | os.PathLike[str] | None,
    runner: str,
    threads: int,
    resume: bool,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """See tvm_vitq.tune."""
    profile = parse(target)
    if trials < 1:
        raise VitqError("nothing to try", where="trials", got=trials, expected="at least 1")
    if profile.vta:
        if runner != "local" or threads:
            raise VitqError(
                "VTA is tuned by its cycle model, on one core of this machine",
                where="runner, threads",
                got=f"{runner}, {threads}",
                expected="local, 0",
            )
        how: dict[str, Any] = {"work_dir": work_dir, "resume": resume, "progress": progress}
        return tune_vta(quantized, profile, trials=trials, seconds=seconds, **how)
    device = Device(read_runner(runner, profile), threads or profile.threads)
    servers = 1 if device.tracker is None else count_servers(device.tracker)
    path = Path(work_dir or FOLDER) / target_name(profile) / f"{run_name(quantized, device)}.jsonl"
    earlier = earlier_records(path, resume, target_name(profile))
    tasks = find_tasks(quantized, profile, seed)
    names = {task.name for task in tasks}
    records = [record for record in earlier if record.kernel in names]
    writer = Writer(path, target_name(profile), about(quantized, profile, device, runner, trials))
    tried = [r for r in records if not r.final and r.schedule is not None]
    with tqdm(
        total=trials, initial=min(len(tried), trials), desc="tune", unit="trial", disable=not progress
    ) as bar:

        def found(record: Record) -> None:
            writer.add(record)
            records.append(record)
            if not record.final and record.schedule is not None:
                bar.update()

        measuring = Measuring({t.name: t for t in tasks}, profile, device, found, servers=servers)
        try:
            search(tasks, profile, measuring, tried, Budget(trials, seconds), seed)
            bar.set_description("compare")
            _compare(tasks, measuring, records)
        finally:
            measuring.close()
    return report(tasks, records, path)


def run_name(quantized: QuantizedModel, device: Device) -> str:
    """The file of a run: model, widths, batch and threads."""
    return f"{model_name(quantized)}-t{device.threads or 'all'}"


def about(
    quantized: QuantizedModel, profile: TargetProfile, device: Device, runner: str, trials: int
) -> dict[str, Any]:
    """How records were made, for people and for `vitq inspect`."""
    cores = cpu.usable_cores()
    return {
        "model": quantized.name,
        "bits": quantized.plan.bits,
        "batch": quantized.input_shape[0],
        "compiled_for": str(profile),
        "device": f"{cpu.host().name}, {cores} cores" if device.tracker is None else runner,
        "threads": device.threads or "one per core",
        "trials": trials,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(Path(a).name if n == 0 else a for n, a in enumerate(sys.argv)),
        "versions": {
            name: importlib.metadata.version(name) for name in ("tvm-vitq", "apache-tvm", "xgboost", "numpy")
        },
    }


def read_runner(runner: str, profile: TargetProfile) -> tuple[str, int, str] | None:
    """ "local", or "rpc://host:port/key" as (host, port, key)."""
    if runner == "local":
        if missing := profile.missing_here():
            raise VitqError(
                "this machine cannot run kernels of the target",
                where="target",
                got=str(profile),
                expected=f"a machine with {', '.join(missing[:6])}",
                fix='measure on a device: runner="rpc://<tracker>:<port>/<key>"',
            )
        return None
    match = re.fullmatch(r"rpc://([^:/]+):(\d+)/([\w.-]+)", runner)
    if match is None:
        raise VitqError(
            "malformed runner", where="runner", got=runner, expected='"local" or "rpc://<host>:<port>/<key>"'
        )
    return match[1], int(match[2]), match[3]


def count_servers(tracker: tuple[str, int, str]) -> int:
    """Devices that wait behind a tracker; VitqError if it cannot be reached or has none."""
    from tvm import rpc

    host, port, key = tracker
    try:
        socket.create_connection(tracker[:2], timeout=10).close()  # TVM's client goes on trying for a minute
        summary = rpc.connect_tracker(host, port).summary()
    except (RuntimeError, OSError) as error:
        raise VitqError(
            "the RPC tracker cannot be reached",
            where=f"{host}:{port}",
            got=str(error).strip().split("\n")[-1],
            fix=f"start one: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}",
        ) from error
    keys = [str(server["key"]).partition(":")[2] for server in summary["server_info"]]
    if key not in keys:
        raise VitqError(
            "no device of this key at the RPC tracker",
            where=f"{host}:{port}",
            got=", ".join(sorted(set(keys))) or "no devices",
            expected=key,
            fix=f"on the device: python -m tvm.exec.rpc_server --tracker {host}:{port} --key {key}",
        )
    return keys.count(key)


def _compare(tasks: list[Task], measuring: Measuring, records: list[Record]) -> None:
    """Measures the best schedules of each kernel in turns with the default one.

    The best of many noisy measurements is partly luck; compared in turns, luck is gone.
    """
    for task in tasks:
        found = [r for r in records if r.kernel == task.name and r.seconds and r.schedule is not None]
        ordered: list[Mapping[str, Any]] = []
        for record in sorted(found, key=lambda r: r.fastest):
            if record.schedule not in ordered:
                ordered.append(record.schedule)  # type: ignore[arg-type]
        if not ordered:
            continue
        finalists: list[Mapping[str, Any] | None] = [None, *ordered[:FINALISTS]]
        measuring.compare(task.name, finalists, ROUNDS)


def report(tasks: list[Task], records: list[Record], path: Path) -> dict[str, Any]:
    """What a run found: per kernel, the default's and the best time, in seconds, and how many candidates were
    tried and failed.
    """
    chosen = best(records)
    rows = []
    for task in tasks:
        own = [r for r in records if r.kernel == task.name and not r.final and r.schedule is not None]
        default = [s for r in records if r.kernel == task.name and r.schedule is None for s in r.seconds]
        record = chosen.get(task.name)
        rows.append(
            {
                "kernel": task.name,
                "calls": task.calls,
                "trials": len(own),
                "failed": sum(not r.seconds for r in own),
                "default": min(default, default=None),
                "best": record.fastest if record else None,
                "schedule": dict(record.schedule) if record and record.schedule else None,
            }
        )
    wrong = [r for r in records if r.error and "wrong result" in r.error]
    return {
        "path": str(path),
        "kernels": rows,
        "trials": sum(row["trials"] for row in rows),
        "wrong": [{"kernel": r.kernel, "schedule": r.schedule, "error": r.error} for r in wrong],
    }
