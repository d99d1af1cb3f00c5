"""A child process with its time and its peak memory."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.05  # seconds between looks at memory


@dataclass(frozen=True)
class Watched:
    """What a process printed and took; seconds of processor time and peak memory include its own children.

    `others` is the share of all the machine's cores that processes other than these took meanwhile.
    `peak_bytes` is the larger of the highest sum of resident memory over the process and its descendants,
    seen every INTERVAL, and the highest of any one of them, which the kernel keeps exactly.
    """

    output: str
    started: float
    wall: float
    cpu: float
    others: float
    peak_bytes: int


def run(
    command: list[str], *, cores: int | None = None, environment: dict[str, str] | None = None
) -> Watched:
    """Runs `command` on at most `cores` cores; raises CalledProcessError if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    busy, total = _machine_seconds()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    os.sched_setaffinity(process.pid, allowed)
    peaks = [0]
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    watcher.start()
    output, _ = process.communicate()
    wall = time.monotonic() - started
    watcher.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    busy_after, total_after = _machine_seconds()
    others = max(0.0, busy_after - busy - cpu) / max(total_after - total, 1e-9)
    return Watched(output, started, wall, cpu, others, max(peaks))


def _machine_seconds() -> tuple[float, float]:
    """Seconds that all cores have been busy, and have been there, since the machine started."""
    fields = (
        Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )  # user nice system idle iowait irq ...
    ticks = [int(field) for field in fields]
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / per_second, sum(ticks) / per_second


def _watch(process: subprocess.Popen[str], peaks: list[int]) -> None:
    while process.poll() is None:
        fields = [_memory(pid) for pid in _family(process.pid)]
        peaks.append(sum(resident for resident, _ in fields))
        peaks.extend(highest for _, highest in fields)
        time.sleep(INTERVAL)


def _family(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for member in found:  # grows while it is walked
        try:
            for children in Path(f"/proc/{member}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
        except OSError:
            continue  # it ended meanwhile
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Resident bytes now and at most so far."""
    values = {"VmRSS": 0, "VmHWM": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in values:
                values[key] = int(rest.split()[0]) * 1024
    except OSError:
        pass  # it ended meanwhile
    return values["VmRSS"], values["VmHWM"]
