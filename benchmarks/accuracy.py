"""Accuracy of the reference models: float, simulation of the plan in float, and the compiled integer program.

python benchmarks/accuracy.py [--models vit,swin] [--bits w8a8,w4a4] [--recipes percentile] [--images 20000]

The simulation is float fake-quantization of the same plan (tvm_vitq.calibrate.simulate); SQNR and agreement
compare its logits with those of the compiled program, which are the NumPy reference's bit for bit
(tests/test_exact.py). A value that lies close to a rounding boundary may be rounded to another code by the
two, and every layer behind it sees the difference, so they agree up to the noise of quantization itself. The
+- is half the 95 % confidence interval of the compiled program's top-1; the difference between simulation and
program is known better, since both see the same images.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

import tvm_vitq
from tvm_vitq import refmodels
from tvm_vitq.calibrate import calibrate
from tvm_vitq.calibrate.simulate import simulate
from tvm_vitq.evaluation import Accuracy, evaluate, sqnr
from tvm_vitq.frontend import import_model
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel

BATCH = 50
COLUMNS = (
    "model",
    "bits",
    "recipe",
    "float",
    "simulation",
    "compiled",
    "+-",
    "SQNR dB",
    "agreement",
    "SQNR float",
)


def measure(
    name: str, bits: str, recipe: str, data: tuple[np.ndarray, np.ndarray], float_run: Accuracy
) -> dict:
    """One row: top-1 in percent; SQNR in dB of the program against the simulation, and against float."""
    model = import_model(refmodels.load_model(name), input_shape=data[0].shape[1:], batch=BATCH)
    found = calibrate(
        model, bits=bits, recipe=recipe, calibration=refmodels.calibration_images(), progress=False
    )
    simulated = evaluate(simulate(found.mod, found.plan), data, batch=BATCH)
    quantized = QuantizedModel(run_passes(found.mod, realize_passes(found.plan)), found.plan)
    compiled = evaluate(tvm_vitq.compile(quantized), data)
    figures = (
        float_run.top1,
        simulated.top1,
        compiled.top1,
        compiled.interval,
        sqnr(simulated.logits, compiled.logits),
        compiled.agreement(simulated),
        sqnr(float_run.logits, compiled.logits),
    )
    return dict(zip(COLUMNS, (name, bits, recipe, *(round(v, 2) for v in figures)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(refmodels.names()))
    parser.add_argument("--bits", default="w8a8,w4a4")
    parser.add_argument("--recipes", default="percentile")
    parser.add_argument("--images", type=int, default=0, help="draw so many test images; 0: the shipped 3000")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    arguments = parser.parse_args()
    data = refmodels.more_test_images(arguments.images) if arguments.images else refmodels.test_set()
    if not arguments.json:
        print("".join(f"{c:>12}" for c in COLUMNS))
    for name in arguments.models.split(","):
        float_run = evaluate(refmodels.load_model(name), data)
        for bits in arguments.bits.split(","):
            for recipe in arguments.recipes.split(","):
                row = measure(name, bits, recipe, data, float_run)
                text = json.dumps(row) if arguments.json else "".join(f"{v!s:>12}" for v in row.values())
                print(text, flush=True)


if __name__ == "__main__":
    main()
