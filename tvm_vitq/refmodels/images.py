"""Calibration and test images of the reference models (NumPy only)."""

from __future__ import annotations

import json
import zipfile
import zlib
from importlib import resources
from typing import Any, cast

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.refmodels.packing import unpack

MEAN = (0.5, 0.49, 0.5)
STD = (0.21, 0.21, 0.21)

_FILE = "images.npz"


def normalize(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W): (image / 255 − MEAN) / STD."""
    scaled = images.astype(np.float32) / np.float32(255)
    scaled = (scaled - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def data_file(name: str) -> Any:
    """The package data file `name`, as a traversable path.

    Raises
    ------
    VitqError
        The installation lacks the file.
    """
    path = resources.files("tvm_vitq.refmodels") / "data" / name
    if not path.is_file():
        raise VitqError(
            "a data file of the reference models is missing",
            where=str(path),
            fix="reinstall the package (from a checkout: `pip install .`)",
        )
    return path


def _arrays(*keys: str) -> list[np.ndarray]:
    path = data_file(_FILE)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return [archive[key] for key in keys]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise VitqError(
            "the images of the reference models cannot be read",
            where=str(path),
            got=str(error),
            fix="reinstall the package",
        ) from error


def meta() -> dict[str, Any]:
    """How images and weights were made: classes, training commands and times, versions, float accuracies."""
    return cast("dict[str, Any]", json.loads(data_file("meta.json").read_text(encoding="utf-8")))


def class_names() -> list[str]:
    """The 36 class names, in label order."""
    return cast("list[str]", meta()["classes"])


def calibration_images_uint8() -> np.ndarray:
    """uint8 (256, 32, 32, 3), from the training sources, none of them trained on."""
    residuals, levels = _arrays("calibration", "levels")
    return unpack(residuals, int(levels))


def calibration_images(count: int = 256) -> np.ndarray:
    """float32 (count, 3, 32, 32), normalized as the models expect: the shipped ones, then further ones of the
    same sources, drawn now.
    """
    shipped = calibration_images_uint8()
    if count <= len(shipped):
        return normalize(shipped[:count])
    from tvm_vitq.refmodels import scenes

    recorded = meta()["images"]["calibration"]
    drawn, _ = scenes.draw(scenes.TRAIN, count - len(shipped), recorded["seed"] + 1, recorded["severity"])
    return normalize(np.concatenate([shipped, drawn]))


def test_set_uint8() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (3000, 32, 32, 3) and labels int64 (3000,), from the test sources."""
    residuals, labels, levels = _arrays("test", "labels", "levels")
    return unpack(residuals, int(levels)), labels.astype(np.int64)


def more_test_images(count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """`count` further images of the test sources, drawn now, with labels; else as `test_set`.

    Seed 0 begins a stream of the shipped kind; any other seed gives images that are not among those.
    """
    from tvm_vitq.refmodels import scenes

    images, labels = scenes.draw(scenes.TEST, count, seed, meta()["images"]["test"]["severity"])
    return normalize(images), labels


def test_set() -> tuple[np.ndarray, np.ndarray]:
    """Images float32 (3000, 3, 32, 32), normalized, and labels int64 (3000,)."""
    images, labels = test_set_uint8()
    return normalize(images), labels
