"""The process of one engine: `python -m peer.worker NAME JOB`.

Prepares the engine, then answers one JSON line per line of standard input until that ends. Everything that
an engine prints goes to standard error, which the parent keeps as a log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from peer import PEERS
from peer.interface import Job, Run, Unsupported


def measure(run: Run, x: np.ndarray, *, seconds: float, warm: int, least: int) -> dict[str, Any]:
    """Calls `run` for `seconds` and at least `least` times, after `warm` calls that are not timed.

    Returns
    -------
    wall, cpu : seconds of each call; cpu is the processor time of all threads.
    waited : seconds that threads of this process had no core to run on; None where the kernel does not say.
    """
    for _ in range(warm):
        run(x)
    wall: list[float] = []
    cpu: list[float] = []
    before = _waited()
    end = time.perf_counter() + seconds
    while len(wall) < least or time.perf_counter() < end:
        start, start_cpu = time.perf_counter(), time.process_time()
        run(x)
        cpu.append(time.process_time() - start_cpu)
        wall.append(time.perf_counter() - start)
    after = _waited()
    return {"wall": wall, "cpu": cpu, "waited": None if before is None or after is None else after - before}


def _waited() -> float | None:
    """Seconds that the threads of this process have spent runnable without a core so far."""
    total = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            total += int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return total * 1e-9


def sqnr(reference: np.ndarray, got: np.ndarray) -> float:
    """10·log10(Σ r² / Σ (r − g)²) in dB, capped at 200."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - got).sum())
    return 10 * float(np.log10(signal / max(noise, signal * 1e-20)))


def _prepare(name: str, job: Job) -> tuple[Run | None, dict[str, Any]]:
    start = time.perf_counter()
    try:
        run, note = PEERS[name].prepare(job)
        logits = np.concatenate([np.array(run(batch)) for batch in job.batches()])
    except Unsupported as error:
        return None, {"status": "unsupported", "note": str(error)}
    except Exception as error:  # whatever an engine raises is reported in the table, with a log beside it
        traceback.print_exc()
        return None, {"status": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0]}
    return run, {
        "status": "ready",
        "note": note,
        "versions": PEERS[name].versions(),
        "prepare_seconds": time.perf_counter() - start,
        "sqnr_db": sqnr(np.load(job.folder / "logits.npy"), logits),
    }


def main(name: str, job: Job, answers: TextIO) -> None:
    """Prepares, reports, then measures as asked."""
    run, state = _prepare(name, job)
    print(json.dumps(state), file=answers, flush=True)
    if run is None:
        return
    x = np.ascontiguousarray(next(job.batches()))
    for line in sys.stdin:
        print(json.dumps(measure(run, x, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], Job.from_json(sys.argv[2]), channel)
