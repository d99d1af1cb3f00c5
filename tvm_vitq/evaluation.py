"""Top-1 accuracy of anything that returns logits: a compiled library, the NumPy reference, a torch model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array


@dataclass(frozen=True)
class Accuracy:
    """Logits [count, classes] of an evaluation and the labels [count] of its images.

    `interval` is the half width of the 95 % confidence interval of top1 (normal approximation), in percent.
    """

    logits: Array
    labels: Array

    @property
    def right(self) -> Array:
        """Whether each image is classified correctly."""
        return self.logits.argmax(-1) == self.labels

    @property
    def correct(self) -> int:
        return int(self.right.sum())

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def top1(self) -> float:
        """Percent."""
        return 100.0 * self.correct / self.count

    @property
    def interval(self) -> float:
        p = self.correct / self.count
        return 196.0 * math.sqrt(p * (1 - p) / self.count)

    def paired_interval(self, other: Accuracy) -> float:
        """Half width, in points, of the 95 % confidence interval of the difference to another's top1 on the
        same images: only those that exactly one of them gets right count.
        """
        difference = self.right.astype(np.float64) - other.right
        return 196.0 * float(difference.std()) / math.sqrt(self.count)

    def agreement(self, other: Accuracy) -> float:
        """Percent of images on which both choose the same class."""
        return 100.0 * float((self.logits.argmax(-1) == other.logits.argmax(-1)).mean())

    def __str__(self) -> str:
        return f"{self.top1:.2f} % ({self.correct}/{self.count}, +-{self.interval:.1f})"


def evaluate(model: Any, dataset: Any, *, batch: int = 64, progress: bool = False) -> Accuracy:
    """Top-1 accuracy.

    Parameters
    ----------
    model : Library, QuantizedModel (its NumPy reference), torch.nn.Module, or a function from images to
        logits.
    dataset : (images, labels), float32 (N, 3, H, W) normalized and integers (N,); or an iterable of such
        batches.
    batch : images per call for models that take any number; a Library has its own.

    Raises
    ------
    VitqError : an empty dataset, images and labels of different length.
    """
    run, size = _runner(model, batch)
    batches = [(run(images), labels) for images, labels in _batches(dataset, size, progress)]
    if not batches:
        raise VitqError("the dataset is empty", where="evaluate", expected="at least one image")
    logits, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Accuracy(logits, labels)


def sqnr(signal: Array, approximation: Array) -> float:
    """Signal-to-noise ratio in dB: 10 log10(sum signal**2 / sum (signal - approximation)**2)."""
    noise = float(((signal.astype(np.float64) - approximation) ** 2).sum())
    power = float((signal.astype(np.float64) ** 2).sum())
    return math.inf if noise == 0 else 10 * math.log10(power / noise)


def _runner(model: Any, batch: int) -> tuple[Callable[[Array], Array], int]:
    from tvm_vitq.quantized_model import QuantizedModel
    from tvm_vitq.runtime import Library

    if isinstance(model, Library):
        size = model.info.input_shape[0]
        return lambda x: model(_padded(x, size))[: len(x)], size
    if isinstance(model, QuantizedModel):
        return model.reference, max(batch, model.input_shape[0])
    if hasattr(model, "state_dict"):
        return _torch_runner(model), batch
    return model, batch


def _padded(x: Array, size: int) -> Array:
    return x if len(x) == size else np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])


def _torch_runner(model: Any) -> Callable[[Array], Array]:
    import torch

    def run(x: Array) -> Array:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return run


def _batches(dataset: Any, size: int, progress: bool) -> Iterator[tuple[Array, Array]]:
    if isinstance(dataset, tuple) and len(dataset) == 2:
        images, labels = (np.asarray(v) for v in dataset)
        if len(images) != len(labels):
            raise VitqError(
                "images and labels differ in number", where="evaluate", got=f"{len(images)} and {len(labels)}"
            )
        parts: Iterable = [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]
    else:
        parts = (
            (x[i : i + size], y[i : i + size])
            for x, y in ((np.asarray(x), np.asarray(y)) for x, y in dataset)
            for i in range(0, len(x), size)
        )
    if progress:
        from tqdm import tqdm

        parts = tqdm(parts, unit="batch", leave=False)
    for x, y in parts:
        yield np.ascontiguousarray(x, np.float32), y
