"""Error reduction by regression: closed form, no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class ERQ(Recipe):
    """ERQ (Zhong et al., ICML 2024): quantizers as `percentile` fits them, then every linear layer is moved
    to its quantized input by ridge regression and quantized by halves of its columns, with refined roundings
    and compensation (`calibrate.regression`).

    Departures: probabilities are relative to their row as in `percentile`, not logarithmic; the target is
    the float model's output of the layer, so errors of the layers in front are made up for as well; the bias
    takes part in the compensation.

    Parameters
    ----------
    ridge : regularization relative to the mean square of the inputs.
    refinements : roundings changed per row and half at most.
    """

    name = "erq"
    calibration_images: ClassVar[int] = 32
    trains: ClassVar[bool] = True
    ridge: float = 0.5
    refinements: int = 100

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import searches
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.frame import percentile_frame
        from tvm_vitq.calibrate.regression import regress

        percentile_frame(job)
        rule = searches.by_bits(searches.mse(), searches.minmax)
        regress(job, find_units(job.mod), rule, self.ridge, self.refinements)
