"""Ranges from the smallest and largest value seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class MinMax(Recipe):
    """Nothing is clipped, activations and weights alike: the naive baseline."""

    name = "minmax"

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import fit, searches
        from tvm_vitq.calibrate.observe import observe

        summaries = observe(job, fit.activation_views(job) | fit.probability_views(job))
        fit.fit_activations(job, summaries, searches.minmax)
        fit.fit_probabilities(job, summaries, searches.minmax)
        fit.fit_weights(job, searches.minmax)
