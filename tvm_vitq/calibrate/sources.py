"""Calibration images from whatever the user has: a loader, an array, a folder of images, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvm_vitq.calibrate.synthesize import synthesize
from tvm_vitq.errors import VitqError
from tvm_vitq.image_folders import SUFFIXES, draw, read_image

LIMIT = 128
"""Images used of an array or a loader, if a recipe does not want more: more hardly move ranges."""

SYNTHESIZED = 32

FORM = "float32 (N, 3, H, W), already normalized"

ENOUGH = "32 to 128 images"


@dataclass
class Images:
    """Normalized calibration images, float32 [N, 3, H, W], with where they came from for the plan."""

    values: torch.Tensor
    source: str
    ids: list[str]


def load_images(
    calibration: Any,
    input_shape: tuple[int, ...],
    preprocessing: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
    wanted: int = LIMIT,
    seed: int = 0,
) -> Images:
    """Calibration images of a model.

    Parameters
    ----------
    calibration : None (images are synthesized), a NumPy array or torch tensor (N, 3, H, W), a folder, or an
        iterable of such arrays or of ``(images, labels)``.
    input_shape : of the model, (batch, 3, H, W).
    preprocessing : of the model, for folders: "mean", "std", "crop_pct", "interpolation" as in timm.
    limit : images used, or made, at most: a folder is drawn from at random, across its folders, which count
        as classes (`image_folders.draw`); others give their first. None: `wanted` of a folder, at least LIMIT
        of others, which a user chose one by one.
    wanted : images that the recipe asks for.
    seed : of what is drawn or synthesized.

    Raises
    ------
    VitqError : no images, another shape or type, NaN or infinity, an unreadable file (named).
    """
    shape = tuple(input_shape[1:])
    check_request(calibration, limit)
    if calibration is None:
        made = SYNTHESIZED if limit is None else limit
        values = synthesize(made, shape, preprocessing, seed)
        return Images(values, f"synthesized: {made} images, 1/f noise and shapes", [])
    if isinstance(calibration, (str, os.PathLike)):
        count = wanted if limit is None else limit
        return _from_folder(Path(calibration), shape, preprocessing, count, seed)
    limit = max(wanted, LIMIT) if limit is None else limit
    if isinstance(calibration, (np.ndarray, torch.Tensor)):
        values = _checked(calibration, shape, "calibration")
        return Images(_limited(values, limit), _counted("array", len(values), limit), [])
    if isinstance(calibration, Iterable):
        return _from_loader(calibration, shape, limit)
    raise VitqError(
        "calibration data of an unknown kind",
        where="calibration",
        got=type(calibration).__name__,
        expected=f"an array {FORM}, an iterable of them, a folder of images, or None",
    )


def check_request(calibration: Any, limit: int | None) -> None:
    """VitqError if no images can come of these arguments, as far as that shows without reading any."""
    if limit is not None and limit < 1:
        raise VitqError("too few calibration images", where="calibration", got=limit, expected="1 or more")
    if isinstance(calibration, (str, os.PathLike)) and not Path(calibration).is_dir():
        raise VitqError(
            "not a folder" if Path(calibration).exists() else "no such folder",
            where="calibration",
            got=calibration,
            expected="a folder of images",
            fix="check the path; arrays are given as such, to `vitq` as .npy file",
        )


def _from_loader(loader: Iterable[Any], shape: tuple[int, ...], limit: int) -> Images:
    parts: list[torch.Tensor] = []
    count = 0
    for number, item in enumerate(loader):
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        if not isinstance(batch, (np.ndarray, torch.Tensor)):
            raise VitqError(
                "the loader gives something else than arrays",
                where=f"calibration, batch {number}",
                got=type(batch).__name__,
                expected=f"an array {FORM}, or a tuple that starts with one",
            )
        parts.append(_checked(batch, shape, f"calibration, batch {number}"))
        count += len(parts[-1])
        if count >= limit:
            break
    if not count:
        raise VitqError("no calibration images", where="calibration", got="an empty loader", expected=ENOUGH)
    return Images(torch.cat(parts)[:limit], f"loader: first {min(count, limit)} images", [])


def _checked(batch: Any, shape: tuple[int, ...], where: str) -> torch.Tensor:
    kind = str(batch.dtype).removeprefix("torch.")
    if kind == "uint8":
        raise VitqError(
            "calibration images are not normalized",
            where=where,
            got="uint8",
            expected=FORM,
            fix="divide by 255, subtract the mean and divide by the std of the model's preprocessing",
        )
    if kind != "float32":
        raise VitqError(
            "calibration images of the wrong type",
            where=where,
            got=kind,
            expected=FORM,
            fix="normalize the images as the model's preprocessing does, then convert them to float32",
        )
    if batch.ndim != 4 or tuple(batch.shape[1:]) != shape:
        raise VitqError(
            "calibration images of the wrong shape",
            where=where,
            got=tuple(batch.shape),
            expected=f"(N, {', '.join(map(str, shape))})",
            fix="resize and crop the images, channels first; or give a folder of images, which is prepared",
        )
    if not len(batch):
        raise VitqError("no calibration images", where=where, got=tuple(batch.shape), expected=ENOUGH)
    if isinstance(batch, np.ndarray):
        # torch takes no negative strides, and warns of read-only memory
        batch = np.require(batch, requirements=["C", "W"])
    values = torch.as_tensor(batch).detach().cpu().contiguous()
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
        raise VitqError(
            "calibration images hold NaN or infinity",
            where=f"{where}, image {bad}",
            expected=FORM,
            fix="check how the images are read and normalized",
        )
    return values


def _limited(values: torch.Tensor, limit: int) -> torch.Tensor:
    return values[:limit]


def _counted(kind: str, count: int, limit: int) -> str:
    return f"{kind}: {count} images" if count <= limit else f"{kind}: first {limit} of {count} images"


def _from_folder(
    folder: Path, shape: tuple[int, ...], preprocessing: Mapping[str, Any] | None, count: int, seed: int
) -> Images:
    drawn = draw(folder, count, seed)
    if not drawn.files:
        raise VitqError(
            "the folder holds no images",
            where=folder,
            expected="files ending in " + ", ".join(sorted(SUFFIXES)),
            fix="check the path: images in folders below it count",
        )
    values = torch.stack([read_image(file, shape, preprocessing or {}) for file in drawn.files])
    ids = [file.relative_to(folder).as_posix() for file in drawn.files]
    return Images(values, f"folder {folder.resolve().name}: {drawn.text}", ids)
