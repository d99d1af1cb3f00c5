"""Ranges that minimize the squared quantization error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class MeanSquaredError(Recipe):
    """Search over shrunken ranges for the smallest squared error of each tensor.

    Parameters
    ----------
    tail : share of each tensor's extreme values, at either end, that is kept exactly for the search.
    """

    name = "mse"
    tail: float = 1e-3

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import fit, searches
        from tvm_vitq.calibrate.observe import observe

        rule = searches.mse()
        views = fit.activation_views(job) | fit.probability_views(job)
        summaries = observe(job, views, self.tail)
        fit.fit_activations(job, summaries, rule)
        fit.fit_probabilities(job, summaries, rule)
        fit.fit_weights(job, searches.by_bits(rule, searches.minmax))
