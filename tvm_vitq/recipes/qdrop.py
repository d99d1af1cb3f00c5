"""Learned rounding and activation scales, block by block, with randomly dropped quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class QDrop(Recipe):
    """The uniform baseline of the literature (Wei et al. 2022): quantizers as `percentile` fits them, then
    AdaRound and learned activation scales, against the float output of every block.

    Parameters
    ----------
    iterations, batch : steps per block, images per step.
    drop : share of a block's input, and of the activations inside it, that stays in float in a step.
    """

    name = "qdrop"
    calibration_images: ClassVar[int] = 1024
    trains: ClassVar[bool] = True
    iterations: int = 300
    batch: int = 8
    drop: float = 0.5

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.frame import percentile_frame
        from tvm_vitq.calibrate.reconstruct import Settings, reconstruct

        percentile_frame(job)
        settings = Settings(self.iterations, self.batch, self.drop, self.drop)
        reconstruct(job, find_units(job.mod), settings)
