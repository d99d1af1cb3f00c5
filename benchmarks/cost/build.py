"""Quantize, compile and export in a fresh process: `python -m cost.build MODEL FOLDER`.

FOLDER holds images.npy; library.so and answer.npy, the logits of the first image, are written there. Prints
one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np


def main(model: str, folder: Path) -> None:
    """Times each step in seconds."""
    marks = [("start", time.perf_counter())]

    def mark(step: str) -> None:
        marks.append((step, time.perf_counter()))

    import timm  # noqa: F401  # both are imported here to be timed apart from the work
    import tvm  # noqa: F401

    import tvm_vitq

    mark("import")
    quantized = tvm_vitq.quantize(model, calibration=np.load(folder / "images.npy"), progress=False)
    mark("quantize")
    library = tvm_vitq.compile(quantized, "llvm")
    mark("compile")
    library.export_library(folder / "library.so")
    mark("export")
    np.save(folder / "answer.npy", library(np.load(folder / "images.npy")[:1]))
    steps = {step: now - marks[number][1] for number, (step, now) in enumerate(marks[1:])}
    report = {
        key: library.report[key] for key in ("isa", "recipe", "bits", "weight_count", "integer_coverage")
    }
    sys.__stdout__.write(json.dumps({"steps": steps, "report": report}) + "\n")  # type: ignore[union-attr]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
