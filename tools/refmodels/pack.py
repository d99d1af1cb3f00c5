"""Writes the package data of the reference models: `python tools/refmodels/pack.py vit.pt swin.pt`.

Draws the calibration and test images, stores the averaged weights of the checkpoints in float16 and records
how they were made and how accurate they are as stored.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch

from tvm_vitq import refmodels
from tvm_vitq.refmodels import scenes
from tvm_vitq.refmodels.packing import pack, unpack

DATA = Path(refmodels.__file__).parent / "data"
TEST_SEED, TEST_COUNT = 0, 3000
CALIBRATION_SEED, CALIBRATION_COUNT = 20_000_000, 256
SEVERITY = 0.85
"""Of the shipped images; training is a little harder."""


def write_images() -> None:
    calibration, _ = scenes.draw(scenes.TRAIN, CALIBRATION_COUNT, CALIBRATION_SEED, SEVERITY)
    test, labels = scenes.draw(scenes.TEST, TEST_COUNT, TEST_SEED, SEVERITY)
    packed = {"calibration": pack(calibration, scenes.LEVELS), "test": pack(test, scenes.LEVELS)}
    if not np.array_equal(unpack(packed["test"], scenes.LEVELS), test):
        raise RuntimeError("packing lost something")
    np.savez_compressed(DATA / "images.npz", labels=labels.astype(np.uint8), levels=scenes.LEVELS, **packed)


def top1(name: str) -> float:
    model = refmodels.load_model(name)
    images, labels = refmodels.test_set()
    with torch.inference_mode():
        guesses = torch.cat([model(batch).argmax(1) for batch in torch.from_numpy(images).split(250)])
    return round(100 * float((guesses.numpy() == labels).mean()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="files of train.py, named after the model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    DATA.mkdir(exist_ok=True)
    write_images()
    training = {}
    for path in arguments.checkpoints:
        state = torch.load(path, weights_only=True)
        weights = {
            key.removeprefix("module."): value.half() if value.is_floating_point() else value
            for key, value in state["average"].items()
            if key.startswith("module.")
        }
        (DATA / f"{path.stem}.safetensors").write_bytes(safetensors.torch.save(weights))
        training[path.stem] = {
            "command": state["command"],
            "chunks": state["chunks"],
            "minutes": round(state["seconds"] / 60, 1),
            "parameters": sum(value.numel() for value in weights.values()),
        }
    record = {
        "classes": list(scenes.CLASSES),
        "images": {
            "test": {"source": "TEST", "count": TEST_COUNT, "seed": TEST_SEED, "severity": SEVERITY},
            "calibration": {
                "source": "TRAIN",
                "count": CALIBRATION_COUNT,
                "seed": CALIBRATION_SEED,
                "severity": SEVERITY,
            },
        },
        "training": training,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "top1_percent": {
            name: top1(name) for name in refmodels.names() if name.removesuffix("_outlier") in training
        },
    }
    (DATA / "meta.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["top1_percent"]))


if __name__ == "__main__":
    main()
