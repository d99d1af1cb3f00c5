"""Our own combination without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class AutoFast(Recipe):
    """The quantizers of `auto`; then, instead of training, layers are moved to their quantized inputs by
    ridge regression and quantized by halves of their columns, with compensation, as in ERQ
    (`calibrate.regression`).

    Parameters
    ----------
    ridge : regularization relative to the mean square of the inputs.
    uniform_from, exact_from : see `auto`.
    """

    name = "auto-fast"
    calibration_images: ClassVar[int] = 256
    trains: ClassVar[bool] = True
    ridge: float = 0.5
    uniform_from: int = 7
    exact_from: int = 8

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import searches
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.frame import percentile_frame
        from tvm_vitq.calibrate.lloyd_max import free_levels
        from tvm_vitq.calibrate.regression import regress

        percentile_frame(job, special=partial(free_levels, uniform_from=self.uniform_from))
        if any(spec.bits < self.exact_from for _, spec in job.fitted_sites("input", "weight")):
            rule = searches.by_bits(searches.mse(), searches.minmax)
            regress(job, find_units(job.mod), rule, self.ridge)
