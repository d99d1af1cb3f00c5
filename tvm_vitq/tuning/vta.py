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
from dataclasses import asdict
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
from tvm_vitq.vta.config import VtaConfig
from tvm_vitq.vta.matmul import Product
from tvm_vitq.vta.tiles import Tile, estimate, tiles


class _Task:
    """A product, its tiles from the best estimate on, and how often the model has it."""

    def __init__(self, product: Product) -> None:
        self.product, self.calls, self.tried = product, 0, 0
        sizes, config = product.sizes, product.config
        ordered = sorted(tiles(sizes, config), key=lambda tile: estimate(sizes, tile, config))
        self.left: Iterator[Tile] = iter([tile for tile in ordered if tile != product.tile])
        self.default = product.cycles(product.tile)


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

    def found(name: str, tile: Tile | None, cycles: int) -> None:
        records.append(Record(name, asdict(tile) if tile else None, [cycles * second]))
        writer.add(records[-1])

    for name, task in tasks.items():
        if not any(record.kernel == name and record.schedule is None for record in records):
            found(name, None, task.default)
    known = {name: [r.schedule for r in records if r.kernel == name] for name in tasks}
    done = sum(schedule is not None for schedules in known.values() for schedule in schedules)
    end = time.monotonic() + seconds if seconds else float("inf")
    with tqdm(
        total=trials, initial=min(done, trials), desc="tune", unit="trial", disable=not progress
    ) as bar:
        for name, tile in _candidates(tasks):
            if asdict(tile) in known[name]:
                continue
            if done >= trials or time.monotonic() > end:
                break
            found(name, tile, tasks[name].product.cycles(tile))
            done += 1
            bar.update()
    return _report(tasks, records, path)


def find_products(quantized: QuantizedModel, profile: TargetProfile) -> dict[str, _Task]:
    """The products of a model whose tile is free, by signature."""
    assert profile.vta is not None
    found: dict[str, _Task] = {}
    calls: dict[str, int] = {}
    products: dict[str, Product] = {}

    def note(product: Product) -> None:
        calls[product.signature] = calls.get(product.signature, 0) + 1
        products.setdefault(product.signature, product)

    offload = Offload(profile.vta, note)
    passes = lower_passes(profile, offload=offload)
    last = [name for name, _ in passes].index("offload")
    with profile.target:
        run_passes(quantized.mod, passes[: last + 1], first=1)
    for signature, product in products.items():
        found[signature] = _Task(product)
        found[signature].calls = calls[signature]
    if not found:
        raise VitqError("no product of the model runs on VTA", where=quantized.name, got=offload.notes)
    return found


def _candidates(tasks: dict[str, _Task]) -> Iterator[tuple[str, Tile]]:
    """Tiles of the product that has most cycles for each of its trials."""
    left = dict(tasks)
    while left:
        name = max(left, key=lambda name: left[name].calls * left[name].default / (1 + left[name].tried))
        tile = next(left[name].left, None)
        if tile is None:
            del left[name]
            continue
        left[name].tried += 1
        yield name, tile


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
