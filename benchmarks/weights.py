"""Weights below 8 bits, packed and unpacked at load, against W8A8: latency, library, memory.

python benchmarks/weights.py --models deit_tiny_patch16_224 deit_small_patch16_224

First of all, every library must return the logits of the NumPy reference bit for bit, so that both forms of
one model are equal. Weights of the models are random and few images calibrate: neither changes the programs.
One thread; all libraries in turns, and the median of the ratios of the rounds counts. Times are processor
time of that thread, so that other work on the machine costs precision, not truth. Memory and first answer are
those of fresh processes that load the library without torch, as in build_cost.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from build_cost import GIB, first_answer
from kernels import seconds_per_call
from peer.statistics import Spread
from recipes import quantize, quick, synthetic

import tvm_vitq
from tvm_vitq.compiler import WEIGHTS
from tvm_vitq.frontend import import_model
from tvm_vitq.runtime import Library
from tvm_vitq.sweep import BASELINE
from tvm_vitq.sweep_tables import markdown_table

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")


def build(name: str, bits: str, recipe: str, images: int, folder: Path) -> dict[str, Path]:
    """A folder for each program: its library, one image, and the reference's logits of it."""
    model = import_model(name)
    calibration = synthetic(model, images)
    made = {}
    for width, method, forms in ((*BASELINE, WEIGHTS[:1]), (bits, recipe, WEIGHTS)):
        quantized = quantize(model, width, quick(method), calibration)
        answer = quantized.reference(calibration[:1])
        for weights in forms:
            label = f"{width} {method}" + (f", {weights}" if len(forms) > 1 else "")
            made[label] = folder / label.replace(", ", " ").replace(" ", "-")
            made[label].mkdir()
            np.save(made[label] / "images.npy", calibration[:1])
            np.save(made[label] / "answer.npy", answer)
            tvm_vitq.compile(quantized, weights=weights).export_library(made[label] / "library.so")
    return made


def check(name: str, label: str, library: Library, folder: Path) -> None:
    """Ends the program unless the library returns every bit of the reference's logits."""
    got, want = library(np.load(folder / "images.npy")), np.load(folder / "answer.npy")
    if not np.array_equal(got, want):
        sys.exit(f"{name}, {label}: {np.sum(got != want)} of {want.size} logits are not the reference's")


def milliseconds(
    libraries: Mapping[str, Library], image: np.ndarray, rounds: int, seconds: float
) -> np.ndarray:
    """[round, library]: processor time of a call, which checks its input first, in turns."""
    calls = [partial(library, image) for library in libraries.values()]
    times = [[seconds_per_call(call, seconds) for call in calls] for _ in range(rounds)]
    return 1e3 * np.array(times)


def measure(name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each program of a model, the baseline first."""
    folders = build(name, options.bits, options.recipe, options.images, folder)
    libraries = {
        label: tvm_vitq.load_library(at / "library.so", num_threads=1) for label, at in folders.items()
    }
    for label, library in libraries.items():
        check(name, label, library, folders[label])
    image = np.load(folders[label] / "images.npy")
    times = milliseconds(libraries, image, options.rounds, options.seconds)
    rows = []
    for column, (label, at) in enumerate(folders.items()):
        started = first_answer(at, options.loads)
        rows.append({
            "model": name, "weights": label, "ms": float(np.median(times[:, column])),
            "ratio": vars(Spread.of(times[:, column] / times[:, 0])),
            "library_bytes": (at / "library.so").stat().st_size,
            "peak_bytes": started["first_answer_peak_gib"] * GIB,
            "first_answer_seconds": started["first_answer_seconds"],
        })  # fmt: skip
    return rows


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    ratio = row["ratio"]
    return (
        row["model"],
        row["weights"],
        f"{row['ms']:.2f}",
        f"{ratio['median']:.3f} ({ratio['p10']:.3f}–{ratio['p90']:.3f})",
        f"{row['library_bytes'] / 1e6:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['first_answer_seconds']:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names; random weights")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--recipe", default="fq-vit", metavar="NAME", help="default: fq-vit, log2 softmax")
    parser.add_argument("--images", type=int, default=4, help="synthetic images for calibration")
    parser.add_argument("--rounds", type=int, default=15, help="of all libraries in turns")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each library per round")
    parser.add_argument("--loads", type=int, default=3, help="fresh processes that load each library")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    options = parser.parse_args()

    rows = []
    for name in options.models:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="vitq-weights-") as folder:
            rows += measure(name, options, Path(folder))
    if options.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    ratio = f"times {BASELINE[0]} (p10–p90)"
    headers = ("model", "program", "ms", ratio, "library MB", "peak MB", "first answer s")
    print(markdown_table(headers, map(cells, rows)), end="")


if __name__ == "__main__":
    main()
