"""What an engine offers to the comparison, and what it is given."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class Unsupported(Exception):
    """The engine is installed but cannot do this job here; the text says why."""


@dataclass(frozen=True)
class Job:
    """One model, to be made ready by every engine.

    Attributes
    ----------
    model : timm name; weights are random, from `seed`, so every process builds the same ones.
    batch : images per call.
    threads : threads per call.
    folder : where prepared models are kept; holds images.npy and logits.npy (see model.py).
    library : a library of tvm-vitq to be timed instead of building one.
    """

    model: str
    batch: int
    threads: int
    seed: int
    folder: Path
    library: Path | None = None

    def to_json(self) -> str:
        """For the command line of a worker."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Inverse of `to_json`."""
        fields = json.loads(text)
        fields["folder"] = Path(fields["folder"])
        fields["library"] = Path(fields["library"]) if fields["library"] else None
        return cls(**fields)

    def torch_model(self) -> torch.nn.Module:
        """The model in eval mode, float32."""
        import timm
        import torch

        torch.manual_seed(self.seed)
        return timm.create_model(self.model, pretrained=False).eval()

    def images(self) -> np.ndarray:
        """Calibration images, float32 (N, 3, H, W), N a multiple of `batch`."""
        return np.load(self.folder / "images.npy")

    def batches(self) -> Iterator[np.ndarray]:
        """The calibration images, `batch` at a time."""
        images = self.images()
        for start in range(0, len(images), self.batch):
            yield images[start : start + self.batch]

    def made_once(self, name: str, packages: tuple[str, ...], make: Callable[[Path], None]) -> Path:
        """A folder of files that `make` writes; kept under its name and the versions of `packages`."""
        versions = "-".join(f"{package}-{version(package)}" for package in packages)
        kept = self.folder / f"{name}-{versions}"
        if not kept.exists():
            part = Path(tempfile.mkdtemp(dir=self.folder))
            try:
                make(part)
                os.replace(part, kept)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return kept


Run = Callable[[np.ndarray], np.ndarray]
"""float32 (batch, 3, H, W) in memory -> float32 (batch, classes) in memory."""


@dataclass(frozen=True)
class Peer:
    """An engine with one way of running the model.

    Attributes
    ----------
    name : on the command line.
    title, precision : in the table.
    requires : packages that must be installed.
    prepare : makes the callable that is timed, and a note on what was chosen; may raise Unsupported.
    by_default : whether it runs without being asked for.
    """

    name: str
    title: str
    precision: str
    requires: tuple[str, ...]
    prepare: Callable[[Job], tuple[Run, str]]
    by_default: bool = True

    def missing(self) -> list[str]:
        """The required packages that are not installed."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]

    def versions(self) -> dict[str, str]:
        """Of the required packages."""
        return {name: version(name) for name in self.requires}


def version(package: str) -> str:
    """Installed version of an import package."""
    return importlib.metadata.version(package.replace("_", "-"))
