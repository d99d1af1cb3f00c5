"""What a long step has finished, kept in files from which it is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tvm_vitq.calibrate.job import Job
from tvm_vitq.errors import VitqError
from tvm_vitq.files import written_whole


@dataclass(frozen=True)
class Fitted:
    """What training one unit gives: constants (or what becomes of them) by name, scales by site."""

    constants: dict[str, Tensor]
    scales: dict[str, Tensor]


class Store:
    """Fitted units in ``job.work``, one file each; nothing where that is None.

    `settings` and `units` tell by their repr whether a file belongs to the same calibration.
    """

    def __init__(self, job: Job, label: str, settings: object, units: Sequence[object]) -> None:
        self.folder, self.label = job.work, label
        if self.folder is None:
            return
        digest = hashlib.sha256(f"{settings} {units} {job.seed} {job.quantizers}".encode())
        for value in [job.images, *job.executor.constants.values()]:
            digest.update(value.numpy().tobytes())
        self.key = digest.hexdigest()

    def path(self, number: int) -> Path:
        assert self.folder is not None  # asked by load and save only
        return self.folder / f"{self.label}-{number:03d}.npz"

    def load(self, number: int) -> Fitted | None:
        if self.folder is None or not self.path(number).is_file():
            return None
        try:
            with np.load(self.path(number)) as stored:
                arrays = dict(stored)
        except (OSError, ValueError) as error:
            raise VitqError(
                "unreadable state of a reconstruction", where=self.path(number), got=error
            ) from error
        if str(arrays.pop("key", "")) != self.key:
            raise VitqError(
                "the work folder holds another calibration",
                where=self.path(number),
                fix="empty the folder, or name another one",
            )
        split: dict[str, dict[str, Tensor]] = {"constant": {}, "scale": {}}
        for name, value in arrays.items():
            kind, _, rest = name.partition(":")
            split[kind][rest] = torch.from_numpy(value)
        return Fitted(split["constant"], split["scale"])

    def save(self, number: int, fitted: Fitted) -> None:
        if self.folder is None:
            return
        arrays = {f"constant:{name}": value.numpy() for name, value in fitted.constants.items()}
        arrays |= {f"scale:{site}": value.numpy() for site, value in fitted.scales.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path(number)) as part, part.open("wb") as file:
            np.savez(file, key=np.array(self.key), **arrays)
