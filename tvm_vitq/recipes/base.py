"""What a recipe is: one method, as steps of `tvm_vitq.calibrate` in order."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import MAX_BITS, MIN_BITS
from tvm_vitq.site_rules import Granularities, SiteSpec

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


TRAINING_IMAGES = 16
"""Weights that are trained on fewer images fit those and nothing else."""


@dataclasses.dataclass(frozen=True)
class Recipe(ABC):
    """A calibration method; its dataclass fields are the method's parameters and go into the plan.

    A subclass composes shared steps: observe the statistics it needs, choose ranges, change constants of the
    module, fill ``job.quantizers`` for every site. It lives in a file of its own and is listed in
    ``recipes/__init__.py``.

    requantize : what the method implies ("shift": all its scales are powers of two), whatever else is asked;
        None: nothing.
    calibration_images : drawn from a folder of images if nothing else is said, as many as the paper takes.
    least_images : with fewer the method cannot work, and the calibration is refused; methods that train need
        `TRAINING_IMAGES` in any case.
    widths : that the method defines.
    trains : whether it changes weights so that the float function changes; widths are chosen (bits="auto")
        by the default recipe's quantizers then.
    """

    name: ClassVar[str]
    requantize: ClassVar[str | None] = None
    calibration_images: ClassVar[int] = 128
    least_images: ClassVar[int] = 1
    widths: ClassVar[range] = range(MIN_BITS, MAX_BITS + 1)
    trains: ClassVar[bool] = False

    @abstractmethod
    def fit(self, job: Job) -> None:
        """Fit every quantizer of the job and fill its ranges."""

    def granularities(self, requantize: str) -> Granularities:
        """The method's defaults, for plans that requantize so."""
        return Granularities(probs="tensor" if requantize == "shift" else "token")

    def check_widths(self, specs: Mapping[str, SiteSpec]) -> None:
        """VitqError naming the first site that asks for a width that the method does not define."""
        for site, spec in specs.items():
            if spec.bits not in self.widths:
                raise VitqError(
                    f"recipe {self.name} does not define this width",
                    where=site,
                    got=f"{spec.bits} bits",
                    expected=f"{self.widths[0]} to {self.widths[-1]} bits",
                    fix="choose other bits, or another recipe: percentile takes all",
                )

    def check_images(self, count: int) -> None:
        """VitqError if so many calibration images are too few for the method."""
        least = max(self.least_images, TRAINING_IMAGES if self.trains else 1)
        if count < least:
            raise VitqError(
                f"too few calibration images for recipe {self.name}",
                where="calibration",
                got=count,
                expected=f"{least} or more; from a folder it draws {self.calibration_images}",
                fix="give more images, or choose a recipe without training such as percentile",
            )

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
