"""Times tvm-vitq beside the engines that users would pick instead: the same timm model, the same run.

    python benchmarks/peers.py --model deit_small_patch16_224 --batch 1 --threads 1 [--json]

Method
------
Every engine builds the same timm model from the same seed (weights are random, time does not depend on them)
and, where it calibrates, sees the same 32 synthesized images. Each lives in a process of its own, so that
thread pools and allocators do not meet, and checks its logits against torch float32: the column "SQNR" shows
that the engines compute the same function.

Engines take turns, in an order drawn anew for every round. A turn is a few calls that are not timed (the
caches have been another engine's) and then calls for a fixed time; a call includes whatever an engine does
between NumPy images in memory and NumPy logits in memory. A round gives one median per engine. An engine's
figure is the median over the rounds. Ratios are formed within a round, where the machine's clock and its
other load are nearly the same for all, and then their median is taken; the spread is the 10th to 90th
percentile.

Two clocks: wall time, and processor time of the whole process. On a machine of its own they agree for one
thread. Where the kernel says that engines had to wait for a core for more than 2 % of the time, and with one
thread, ratios are those of processor time: what another process took is not counted against an engine.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer import PEERS, machine
from peer.client import Client, environment
from peer.interface import Job
from peer.statistics import QUIET, Spread, per_round, ratios, waiting_share
from peer.table import table

OURS = "tvm-vitq"
GOALS = {"openvino-int8": 0.9, "onnxruntime-u8s8": 0.7}
"""Our latency over that of an engine, at most; every other engine must be slower than ours."""


def arguments() -> argparse.Namespace:
    """The command line."""
    default = [name for name, peer in PEERS.items() if peer.by_default]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.4, help="timed in each turn")
    parser.add_argument("--warm", type=int, default=3, help="calls before them that are not timed")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and order")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=default, metavar="NAME", help="of " + ", ".join(PEERS)
    )
    parser.add_argument("--library", type=Path, help="time this library of tvm-vitq, build none")
    parser.add_argument(
        "--work-dir", type=Path, help="keeps the other engines' prepared models for next time"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with the figures of every round")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 unless {OURS} reaches its goals")
    options = parser.parse_args()
    if min(options.batch, options.threads, options.rounds) < 1:
        parser.error("--batch, --threads and --rounds are 1 or more")
    return options


def prepare(names: list[str], job: Job) -> list[Client]:
    """Makes the engines ready, one after the other: each has the machine to itself."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "peer.model", job.to_json()],
        env=environment(job.threads),
        stdout=sys.stderr,
    )
    if done.returncode:
        raise SystemExit(f"the model {job.model} cannot be built")
    clients = []
    for name in names:
        print(f"preparing {name} ...", file=sys.stderr, flush=True)
        client = Client(PEERS[name], job)
        if client.state["status"] == "failed":
            print(f"{name} failed: {client.state['note']}\n{_tail(client.log)}", file=sys.stderr)
        clients.append(client)
    return clients


def measure(clients: list[Client], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Turns of every engine that stayed alive, by name."""
    order = random.Random(options.seed)
    rounds: dict[str, list[dict[str, Any]]] = {client.peer.name: [] for client in clients if client.ready}
    for number in range(options.rounds):
        print(f"round {number + 1}/{options.rounds}", file=sys.stderr, flush=True)
        turns = [client for client in clients if client.ready]
        order.shuffle(turns)
        for client in turns:
            answer = client.measure(seconds=options.seconds, warm=options.warm, least=3)
            if answer:
                rounds[client.peer.name].append(answer)
    return {client.peer.name: rounds[client.peer.name] for client in clients if client.ready}


def summarize(
    clients: list[Client], rounds: dict[str, list[dict[str, Any]]], job: Job, state: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is printed, as plain data; `state` is the machine's before the run."""
    waited = waiting_share(rounds)
    disturbed = waited is not None and waited > QUIET
    clock = "cpu" if disturbed and job.threads == 1 else "wall"
    base = OURS if OURS in rounds else next(iter(rounds), None)
    rows, versions = [], {}
    for client in clients:
        slices = rounds.get(client.peer.name)
        row: dict[str, Any] = {
            "name": client.peer.name,
            "engine": client.peer.title,
            "precision": client.peer.precision,
            **{key: value for key, value in client.state.items() if key != "versions"},
        }
        versions.update(client.state.get("versions", {}))
        if slices and base is not None:
            for kind in ("wall", "cpu"):
                row[f"{kind}_ms"] = vars(Spread.of(per_round(slices, kind)))
                row[f"{kind}_ms_rounds"] = per_round(slices, kind)
            row["min_ms"] = 1e3 * min(min(part["wall"]) for part in slices)
            row["calls"] = sum(len(part["wall"]) for part in slices)
            row["ratio"] = vars(ratios(slices, rounds[base], clock))
        rows.append(row)
    return {
        "model": job.model,
        "batch": job.batch,
        "threads": job.threads,
        "seed": job.seed,
        "machine": state,
        "versions": dict(sorted(versions.items())),
        "clock": clock,
        "waited_for_a_core": waited,
        "disturbed": disturbed,
        "base": base,
        "peers": rows,
        "goals": goals(rounds, clock),
    }


def goals(rounds: dict[str, list[dict[str, Any]]], clock: str) -> list[dict[str, Any]]:
    """Each goal with its ratio and whether it is met, as far as the engines ran."""
    found = []
    for name in rounds:
        if OURS in rounds and name != OURS:
            limit = GOALS.get(name, 1.0)
            ratio = ratios(rounds[OURS], rounds[name], clock)
            found.append(
                {"against": name, "at_most": limit, "ratio": vars(ratio), "met": ratio.median <= limit}
            )
    return found


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prepares, measures, summarizes."""
    folder = work / f"{options.model}-batch{options.batch}-seed{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(options.model, options.batch, options.threads, options.seed, folder.resolve(), options.library)
    state = machine.describe()
    clients: list[Client] = []
    try:
        clients = prepare(options.peers, job)
        return summarize(clients, measure(clients, options), job, state)
    finally:
        for client in clients:
            client.close()


def main() -> int:
    """See the module's text."""
    options = arguments()
    if options.work_dir is not None:
        summary = run(options, options.work_dir)
    else:
        with tempfile.TemporaryDirectory(prefix="vitq-peers-") as work:
            summary = run(options, Path(work))
    print(json.dumps(summary, indent=1) if options.json else table(summary))
    met = OURS in {goal_row["name"] for goal_row in summary["peers"] if "ratio" in goal_row} and all(
        goal["met"] for goal in summary["goals"]
    )
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
