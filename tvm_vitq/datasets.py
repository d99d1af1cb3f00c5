"""Labelled images for evaluation: the reference models' test set, .npz files, folders of class folders."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_vitq.cpu import usable_cores
from tvm_vitq.errors import VitqError
from tvm_vitq.image_folders import labelled, read_image

REFMODEL = "refmodel"


@dataclass(frozen=True)
class Dataset:
    """Batches of (images, labels): float32 (n, 3, H, W), normalized, and int64 (n,). May be iterated again.

    name : where the images came from; count : how many there are.
    """

    name: str
    count: int
    make: Any

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.make()


def load_dataset(
    source: str | os.PathLike[str],
    input_shape: tuple[int, ...],
    preprocessing: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
    classes: int | None = None,
    class_list: str | os.PathLike[str] | None = None,
) -> Dataset:
    """A dataset by what a user writes.

    Parameters
    ----------
    source : "refmodel" (test images of the reference models) or "refmodel:20000" (so many others); an .npz
        file with arrays `labels` and `images` (float32 (N, 3, H, W), normalized; or uint8 (N, H, W, 3), then
        normalized as `preprocessing` says); or a folder with one folder per class, in alphabetical order of
        their labels (torchvision's ImageFolder, ImageNet's val/<WordNet id>/*.JPEG).
    input_shape : of the model, (batch, 3, H, W).
    preprocessing : of the model: mean, std, and for folders crop_pct and interpolation.
    limit : images used at most, evenly spread.
    classes : logits of the model, to check labels and class folders by; None: unknown.
    class_list : text file with the folder name of every class, one a line, in the model's order; see
        `image_folders.labelled` for what holds without one.

    Raises
    ------
    VitqError : no such source, no images, wrong shape or type, class folders that do not fit the model.
    """
    if limit is not None and limit < 1:
        raise VitqError("limit is too small", where="limit", got=limit, expected="1 or more")
    if str(source) == REFMODEL:
        from tvm_vitq import refmodels

        return _arrays(*refmodels.test_set(), REFMODEL, input_shape, limit, classes)
    drawn = re.fullmatch(f"{REFMODEL}:([1-9][0-9]*)", str(source))
    if drawn:
        from tvm_vitq import refmodels

        return _arrays(*refmodels.more_test_images(int(drawn[1])), str(source), input_shape, limit, classes)
    path = Path(source)
    if path.is_dir():
        names = None if class_list is None else _names(Path(class_list))
        return _folder(path, input_shape, preprocessing, limit, labelled(path, classes, names))
    if path.is_file():
        return _npz(path, input_shape, preprocessing, limit, classes)
    raise VitqError(
        "no such dataset",
        where="data",
        got=source,
        expected=f'"{REFMODEL}", an .npz file, or a folder with one folder of images per class',
    )


def _spread(count: int, limit: int | None) -> np.ndarray:
    """Indices of at most `limit` of `count` items, evenly spread."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.arange(limit) * count // limit


def _names(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise VitqError(
            "cannot read the class list", where=file, got=error, expected="a text file, one name a line"
        ) from error


def _arrays(
    images: np.ndarray,
    labels: np.ndarray,
    name: str,
    input_shape: tuple[int, ...],
    limit: int | None,
    classes: int | None,
) -> Dataset:
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != tuple(input_shape[1:]):
        raise VitqError(
            "images of the wrong type or shape",
            where=name,
            got=f"{images.dtype} {images.shape}",
            expected=f"float32 (N, {', '.join(map(str, input_shape[1:]))}), normalized",
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise VitqError(
            "labels do not fit the images",
            where=name,
            got=f"{labels.dtype} {labels.shape}",
            expected=f"whole numbers ({len(images)},)",
        )
    if not len(images):
        raise VitqError("the dataset is empty", where=name, expected="at least one image")
    if classes is not None and not 0 <= labels.min() <= labels.max() < classes:
        raise VitqError(
            "labels of other classes than the model has",
            where=name,
            got=f"{labels.min()} to {labels.max()}",
            expected=f"0 to {classes - 1}",
        )
    chosen = _spread(len(images), limit)
    return Dataset(name, len(chosen), lambda: iter([(images[chosen], labels[chosen].astype(np.int64))]))


def _npz(
    path: Path,
    input_shape: tuple[int, ...],
    preprocessing: Mapping[str, Any] | None,
    limit: int | None,
    classes: int | None,
) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise VitqError(
            "not a dataset",
            where=path,
            got=error,
            expected="an .npz file with arrays `images` and `labels`",
        ) from error
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3:
        images = _normalized(images, preprocessing, path)
    return _arrays(images, labels, path.name, input_shape, limit, classes)


def _normalized(images: np.ndarray, preprocessing: Mapping[str, Any] | None, where: Path) -> np.ndarray:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W): (image / 255 - mean) / std."""
    if preprocessing is None:
        raise VitqError(
            "the model does not say how its images are normalized",
            where=where,
            got="uint8 images",
            expected="float32 (N, 3, H, W), normalized",
        )
    mean, std = (np.asarray(preprocessing[key], np.float32) for key in ("mean", "std"))
    scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _folder(
    folder: Path,
    input_shape: tuple[int, ...],
    preprocessing: Mapping[str, Any] | None,
    limit: int | None,
    found: list[tuple[Path, int]],
) -> Dataset:
    shape = tuple(input_shape[1:])
    chosen = [found[i] for i in _spread(len(found), limit)]

    def read(item: tuple[Path, int]) -> np.ndarray:
        return read_image(item[0], shape, preprocessing or {}).numpy()

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # Threads: decoding and resizing give the interpreter free.
        with ThreadPoolExecutor(usable_cores()) as pool:
            for start in range(0, len(chosen), 64):
                part = chosen[start : start + 64]
                yield np.stack(list(pool.map(read, part))), np.array([label for _, label in part])

    return Dataset(folder.resolve().name, len(chosen), batches)
