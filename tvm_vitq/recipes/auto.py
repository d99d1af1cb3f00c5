"""Our own combination: what measured best, without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.statistics import Summary


@dataclass(frozen=True)
class Auto(Recipe):
    """`percentile`, with free levels behind scalar functions.

    The output of GELU has a long tail above and a short one below, which no formula of few parameters fits.
    Its codes come out of a table in any case, so below `uniform_from` bits its levels are those of smallest
    squared error (`quantizers.lloyd_max`). All else as in `percentile`: probabilities relative to their row,
    LayerNorm scales folded.
    """

    name = "auto"
    uniform_from: int = 7

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import percentile_frame

        percentile_frame(job, special=self._free_levels)

    def _free_levels(self, job: Job, summaries: dict[str, Summary]) -> None:
        from tvm_vitq.calibrate.codebooks import Moments
        from tvm_vitq.calibrate.lloyd_max import fit_lloyd_max

        for site, spec in job.fitted_sites("input"):
            if site.kind and spec.bits < self.uniform_from and spec.granularity == "tensor":
                job.quantizers[site.name] = fit_lloyd_max(Moments.of(summaries[site.name]), spec.bits)
