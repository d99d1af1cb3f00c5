"""Our own combination: what measured best."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class Auto(Recipe):
    """Quantizers as in `percentile`, LayerNorm scales folded and probabilities relative to their row, but
    activations of few bits have free levels instead of uniform ones (`lloyd_max.free_levels`).

    Every block then trains its weights, biases, LayerNorms and scales on the output of the quantized blocks
    in front of it, against the float block (`calibrate.reconstruct`).

    Parameters
    ----------
    iterations, batch : steps per block, and images per step.
    uniform_from : bits of an activation from which its levels are uniform.
    exact_from : if all operands have so many bits, nothing is trained: rounding is no loss any more.
    """

    name = "auto"
    calibration_images: ClassVar[int] = 1024
    trains: ClassVar[bool] = True
    iterations: int = 400
    batch: int = 16
    uniform_from: int = 7
    exact_from: int = 8

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.frame import percentile_frame
        from tvm_vitq.calibrate.lloyd_max import free_levels
        from tvm_vitq.calibrate.reconstruct import Settings, reconstruct
        from tvm_vitq.calibrate.rounding import StraightThrough

        percentile_frame(job, special=partial(free_levels, uniform_from=self.uniform_from))
        if all(spec.bits >= self.exact_from for _, spec in job.fitted_sites("input", "weight")):
            return
        settings = Settings(
            self.iterations,
            self.batch,
            float_inputs=0.0,
            drop=0.0,
            weights=StraightThrough,
            rate_biases=1e-2,
            rate_norms=5e-3,
        )
        reconstruct(job, find_units(job.mod), settings)
