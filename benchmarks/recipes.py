"""Latency of every recipe's program relative to that of minmax W8A8.

python benchmarks/recipes.py --model deit_small_patch16_224 --bits w8a8 w4a4

Weights are random and recipes see few images and train for one step: neither changes the program's structure,
which alone decides its time. Baseline and candidate run in turns, and the median of the ratios counts, so
that other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import numpy as np

import tvm_vitq
from tvm_vitq.calibrate import calibrate
from tvm_vitq.calibrate.synthesize import synthesize
from tvm_vitq.errors import VitqError
from tvm_vitq.frontend import import_model
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.recipes import RECIPES, find_recipe
from tvm_vitq.recipes.base import Recipe
from tvm_vitq.render import table
from tvm_vitq.sweep import BASELINE

COSTLY = {
    "iterations": 1,
    "clipping": 1,
    "rounding": 1,
    "refit": 1,
    "images": 2,
    "rounds": 1,
    "refinements": 1,
}
"""Parameters of recipes that cost time and change no structure, with their least values."""


def quick(name: str) -> Recipe:
    """A recipe that does everything, but little of it."""
    recipe = find_recipe(name)
    known = {f.name for f in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **{k: v for k, v in COSTLY.items() if k in known})


def synthetic(model: Any, count: int) -> np.ndarray:
    """Images for calibration."""
    return synthesize(count, model.input_shape[1:], model.preprocessing, seed=0).numpy()


def quantize(model: Any, bits: str, recipe: Recipe, images: np.ndarray) -> QuantizedModel:
    """The integer program of an imported model."""
    found = calibrate(model, bits, recipe, images, progress=False)
    return QuantizedModel(run_passes(found.mod, realize_passes(found.plan)), found.plan)


def build(model: Any, bits: str, recipe: Recipe, images: np.ndarray) -> Any:
    """The compiled library, on one thread."""
    library = tvm_vitq.compile(quantize(model, bits, recipe, images))
    library.num_threads = 1
    return library


def ratio(baseline: Any, library: Any, rounds: int, calls: int) -> tuple[float, float, float]:
    """Median of the ratios of all rounds, and the milliseconds of baseline and candidate."""
    times = np.array(
        [[one.benchmark(repeat=calls)["median_ms"] for one in (baseline, library)] for _ in range(rounds)]
    )
    return float(np.median(times[:, 1] / times[:, 0])), *np.median(times, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name; random weights")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--images", type=int, default=16, help="synthetic images for calibration")
    parser.add_argument("--rounds", type=int, default=9, help="of baseline and candidate in turns")
    parser.add_argument("--calls", type=int, default=5, help="per round")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    arguments = parser.parse_args()

    model = import_model(arguments.model, batch=arguments.batch)
    images = synthetic(model, arguments.images)
    baseline = build(model, BASELINE[0], find_recipe(BASELINE[1]), images)
    rows = []
    for bits in arguments.bits:
        for name in arguments.recipes:
            began = time.perf_counter()
            try:
                library = build(model, bits, quick(name), images)
            except VitqError as error:
                print(f"{name} {bits}: {error}", flush=True)
                continue
            seconds = time.perf_counter() - began
            relative, base, candidate = ratio(baseline, library, arguments.rounds, arguments.calls)
            row = {"recipe": name, "bits": bits, "ratio": relative, "ms": candidate, "baseline_ms": base}
            print(
                json.dumps(row) if arguments.json else f"{name} {bits} {relative:.2f} ({seconds:.0f} s)",
                flush=True,
            )
            rows.append((name, bits, f"{relative:.2f}", f"{candidate:.2f}", f"{base:.2f}"))
    if not arguments.json:
        print(table(("recipe", "bits", "ratio", "ms", "baseline ms"), rows))


if __name__ == "__main__":
    main()
