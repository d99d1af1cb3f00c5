"""What a recipe is: one method, as steps of `tvm_vitq.calibrate` in order."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from tvm_vitq.site_rules import Granularities

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclasses.dataclass(frozen=True)
class Recipe(ABC):
    """A calibration method; its dataclass fields are the method's parameters and go into the plan.

    A subclass composes shared steps: observe the statistics it needs, choose ranges, change constants of the
    module, fill ``job.quantizers`` for every site. It lives in a file of its own and is listed in
    ``recipes/__init__.py``.

    requantize : what the method implies ("shift": all its scales are powers of two), whatever else is asked;
        None: nothing.
    calibration_images : drawn from a folder of images if nothing else is said, as many as the paper takes.
    least_images : with fewer the method cannot work, and the calibration is refused.
    """

    name: ClassVar[str]
    requantize: ClassVar[str | None] = None
    calibration_images: ClassVar[int] = 128
    least_images: ClassVar[int] = 1

    @abstractmethod
    def fit(self, job: Job) -> None:
        """Fit every quantizer of the job and fill its ranges."""

    def granularities(self, requantize: str) -> Granularities:
        """The method's defaults, for plans that requantize so."""
        return Granularities(probs="tensor" if requantize == "shift" else "token")

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
