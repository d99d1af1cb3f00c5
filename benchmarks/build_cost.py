"""What a build costs, and what loading its library costs: time, memory, bytes.

    python benchmarks/build_cost.py [MODEL ...] [--json] [--check]

Each model is built in a fresh process on two cores, by its timm name with the default recipe on 32 images
(random weights, synthesized images: neither changes the work). "build" is the whole process: starting Python,
importing, quantizing, compiling, linking, writing the library, and one inference. Memory is that of the
process and its descendants, resident. "Bytes per weight" is the size of the library file over the weights of
all matmuls.

The library is then loaded by several fresh processes in which torch, torchvision and timm cannot be imported;
"first answer" runs from starting the process to its first logits, which must be those of the building
process, bit for bit; medians.

Times are wall times. Beside them stand the processor time, all cores together, and the share of all cores
that other processes took meanwhile: above a few percent, wall time says more about those.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cost import watch
from peer import machine
from peer.client import environment
from peer.interface import Job

CORES = 2
GIB = 1 << 30
GOALS: dict[str, dict[str, float]] = {
    "deit_small_patch16_224": {
        "build_seconds": 90,
        "peak_gib": 4,
        "bytes_per_weight": 1.15,
        "first_answer_seconds": 1,
    },
    "vit_base_patch16_224": {"build_seconds": 300},
}
"""Figures to reach, at most."""


def build(model: str, folder: Path) -> dict[str, Any]:
    """Build in a fresh process; see cost/build.py."""
    job = Job(model, 1, CORES, 0, folder)
    python = [sys.executable, "-W", "ignore", "-m"]
    subprocess.run(
        [*python, "peer.model", job.to_json()], env=environment(CORES), stdout=sys.stderr, check=True
    )
    command = [*python, "cost.build", model, str(folder)]
    watched = watch.run(command, cores=CORES, environment=environment(CORES))
    answer = json.loads(watched.output.splitlines()[-1])
    size = (folder / "library.so").stat().st_size
    return {
        "build_seconds": watched.wall,
        "build_cpu_seconds": watched.cpu,
        "build_others": watched.others,
        "peak_gib": watched.peak_bytes / GIB,
        "steps": answer["steps"],
        "library_bytes": size,
        "bytes_per_weight": size / answer["report"]["weight_count"],
        **answer["report"],
    }


def first_answer(folder: Path, times: int) -> dict[str, Any]:
    """Load and run once in `times` fresh processes; see cost/first_run.py."""
    answers = []
    for _ in range(times):
        command = [sys.executable, "-m", "cost.first_run", str(folder)]
        watched = watch.run(command, cores=CORES, environment=environment(CORES))
        answer = json.loads(watched.output)
        answer["from_start"] = answer["ready"] - watched.started
        answer["peak"] = watched.peak_bytes / GIB
        answer["others"] = watched.others
        answers.append(answer)

    def median(key: str) -> float:
        return statistics.median(answer[key] for answer in answers)

    return {
        "first_answer_seconds": median("from_start"),
        "first_answer_cpu_seconds": median("cpu"),
        "first_answer_others": median("others"),
        "first_answer_steps": {key: median(key) for key in ("import", "load", "first_call", "second_call")},
        "first_answer_peak_gib": median("peak"),
        "same_bits": all(answer["same_bits"] for answer in answers),
        "blocked": answers[0]["blocked"],
    }


def text(row: dict[str, Any]) -> str:
    """One model, for people."""
    goals = GOALS.get(row["model"], {})

    def figure(key: str, unit: str = "") -> str:
        goal = ""
        if key in goals:
            goal = f" (goal at most {goals[key]}: {'met' if row[key] <= goals[key] else 'MISSED'})"
        return f"{row[key]:.2f}{unit}{goal}"

    def time(key: str) -> str:
        busy = f"{row[f'{key}_cpu_seconds']:.2f} s, other processes {row[f'{key}_others']:.0%} of the cores"
        return f"{figure(f'{key}_seconds', ' s')}, processor {busy}"

    def steps(parts: dict[str, float]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {seconds:.2f}" for name, seconds in parts.items())

    lines = {
        "build": time("build"),
        "": steps(row["steps"]),
        "peak memory": figure("peak_gib", " GiB"),
        "library": f"{row['library_bytes'] / 1e6:.2f} MB, {row['weight_count'] / 1e6:.2f} M weights",
        "bytes per weight": figure("bytes_per_weight"),
        "first answer": time("first_answer"),
        " ": steps(row["first_answer_steps"]),
        "  ": f"{row['first_answer_peak_gib']:.2f} GiB, without {', '.join(row['blocked'])}",
        "same bits": "yes" if row["same_bits"] else "NO",
    }
    kind = f"{row['bits']} {row['recipe']} {row['isa']}, {row['integer_coverage']:.1%} of MACs integer"
    return "\n".join([f"{row['model']}  {kind}", *(f"  {name:18}{value}" for name, value in lines.items())])


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(GOALS), metavar="MODEL", help="timm names")
    parser.add_argument("--loads", type=int, default=5, help="fresh processes that load the library")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every goal is met")
    options = parser.parse_args()
    state = machine.describe()
    rows = []
    for model in options.models:
        print(f"building {model} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="vitq-cost-") as folder:
            row = {"model": model, **build(model, Path(folder)), **first_answer(Path(folder), options.loads)}
        rows.append(row)
        if not options.json:
            print(text(row), flush=True)
    if options.json:
        print(json.dumps({"machine": state, "cores": CORES, "models": rows}, indent=1))
    else:
        print(
            f"{state['cpu']} ({state['family/model/stepping']}), {CORES} cores, load before {state['load']}"
        )
    met = all(
        row["same_bits"] and all(row[key] <= goal for key, goal in GOALS.get(row["model"], {}).items())
        for row in rows
    )
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
