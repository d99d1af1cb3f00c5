"""Folders of image files: read as timm's evaluation does, drawn from at random, labelled by class folder."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_vitq.errors import VitqError

if TYPE_CHECKING:
    import torch

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"))

IMAGENET = 1000
"""Classes of ImageNet-1k, whose folders are named by WordNet id ("n01440764")."""


def read_image(file: Path, shape: Sequence[int], preprocessing: Mapping[str, Any]) -> torch.Tensor:
    """One image, resized and cropped to the model's size as timm's evaluation transform does."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise VitqError(
            "unreadable image", where=file, got=error, fix="remove the file or repair it"
        ) from error
    from timm.data import create_transform

    transform = create_transform(
        input_size=tuple(shape),
        is_training=False,
        interpolation=preprocessing.get("interpolation", "bicubic"),
        mean=preprocessing.get("mean", (0.485, 0.456, 0.406)),
        std=preprocessing.get("std", (0.229, 0.224, 0.225)),
        crop_pct=preprocessing.get("crop_pct", 0.875),
    )
    return transform(image).float()


def images_below(folder: Path) -> list[Path]:
    """Image files in a folder and the folders below it, sorted."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())


@dataclass(frozen=True)
class Drawn:
    """Files drawn from a folder, and how to say so: "32 images of 1000 classes"."""

    files: list[Path]
    text: str


def draw(folder: Path, wanted: int, seed: int) -> Drawn:
    """At most so many image files of a folder, at random.

    In a folder of nothing but folders, such as ImageNet's training set, each is taken for a class: no class
    gives a second image before all have given one, and folders that are not drawn from are not even listed.
    """
    rng = random.Random(seed)
    entries = sorted(folder.iterdir())
    classes = [entry for entry in entries if entry.is_dir()]
    if len(classes) > 1 and not any(f.suffix.lower() in SUFFIXES for f in entries if f.is_file()):
        rng.shuffle(classes)
        return _by_class(classes, wanted, rng)
    files = images_below(folder)
    if len(files) <= wanted:
        return Drawn(files, f"{len(files)} images")
    return Drawn(rng.sample(files, wanted), f"{wanted} of {len(files)} images")


def _by_class(classes: list[Path], wanted: int, rng: random.Random) -> Drawn:
    left: dict[Path, list[Path]] = {}
    chosen: list[Path] = []
    alive = classes
    while alive and len(chosen) < wanted:
        for entry in alive[: wanted - len(chosen)]:
            if entry not in left:
                left[entry] = images_below(entry)
                rng.shuffle(left[entry])
            if left[entry]:
                chosen.append(left[entry].pop())
        alive = [entry for entry in alive if left.get(entry, True)]
    return Drawn(chosen, f"{len(chosen)} images of {len(classes)} classes")


def labelled(
    folder: Path, classes: int | None = None, names: Sequence[str] | None = None
) -> list[tuple[Path, int]]:
    """Image files with their labels, sorted by class folder and name.

    Parameters
    ----------
    folder : one folder per class, ``folder/<class>/*.JPEG``.
    classes : logits of the model; None: unknown, nothing is checked.
    names : class folders in the order of the model's classes. None: the folders present, sorted by name; if
        they are fewer than the 1000 classes of a model but all named by WordNet id, ImageNet's 1000.

    Raises
    ------
    VitqError : no class folders, none for some class, one that is not in `names`.
    """
    folders = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if not folders:
        loose = len(images_below(folder))
        raise VitqError(
            "the folder holds no labelled images",
            where=folder,
            got=f"{loose} images without class folders" if loose else "no class folders",
            expected="one folder of images per class, <folder>/<class>/*",
            fix="move the images into one folder per class; for ImageNet's, docs/imagenet.md shows how",
        )
    if names is None:
        names = _class_names(folder, [entry.name for entry in folders], classes)
    elif classes is not None and len(names) != classes:
        raise VitqError(
            "the class list is not as long as the model has classes", got=len(names), expected=classes
        )
    index = {name: number for number, name in enumerate(names)}
    unknown = [entry.name for entry in folders if entry.name not in index]
    if unknown:
        raise VitqError(
            "class folders that the class list does not name",
            where=folder,
            got=", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""),
            expected=f"some of {len(index)} names such as {names[0]!r}",
        )
    found = [(file, index[entry.name]) for entry in folders for file in images_below(entry)]
    if not found:
        raise VitqError(
            "the folder holds no labelled images",
            where=folder,
            got=f"{len(folders)} class folders without images",
            expected="files ending in " + ", ".join(sorted(SUFFIXES)),
        )
    return found


def _class_names(folder: Path, present: list[str], classes: int | None) -> list[str]:
    if classes is None or len(present) == classes:
        return present
    if classes == IMAGENET:
        from timm.data import ImageNetInfo

        synsets = list(ImageNetInfo().label_names())
        if set(present) <= set(synsets):
            return synsets
    inner = next((name for name in ("val", "validation", "test") if name in present), None)
    raise VitqError(
        "the folder has another number of class folders than the model has classes",
        where=folder,
        got=f"{len(present)} folders: " + ", ".join(present[:4]) + (", ..." if len(present) > 4 else ""),
        expected=f"{classes} folders, whose alphabetical order is that of the model's classes",
        fix=f"name {folder / inner}"
        if inner
        else "give a file with the folder name of every class, one a line in the model's order, as --classes",
    )
