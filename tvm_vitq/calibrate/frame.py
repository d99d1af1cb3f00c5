"""The frame that most recipes share: one pass of statistics, folded LayerNorm scales, ranges, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm_vitq.calibrate import fit, searches
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.reparameterize import find_folds, fold_layer_norms, observe_with_folds
from tvm_vitq.calibrate.statistics import Summary

Special = Callable[[Job, dict[str, Summary]], None]


def percentile_frame(
    job: Job,
    percentiles: Sequence[float] = searches.PERCENTILES,
    fold: bool = True,
    special: Special | None = None,
) -> None:
    """Fit everything as the recipe `percentile` says, except what `special` fits.

    Parameters
    ----------
    percentiles, fold : see the recipe.
    special : called with the summaries of all activation sites after folding; sites for which it puts a
        quantizer into ``job.quantizers`` are left as they are.
    """
    widest = searches.percentile((max(percentiles),))
    rule = searches.by_bits(searches.percentile(percentiles), searches.whole(widest))
    folds = find_folds(job) if fold else []
    views = fit.activation_views(job) | fit.probability_views(job)
    summaries = observe_with_folds(job, folds, views, 1.0 - min(percentiles))
    fold_layer_norms(job, folds, summaries, searches.by_bits(rule, searches.unseen(searches.minmax)))
    if special is not None:
        special(job, summaries)
    fit.fit_activations(job, summaries, rule)
    fit.fit_probabilities(job, summaries, searches.by_bits(rule, searches.minmax))
    fit.fit_weights(job, searches.by_bits(searches.mse(), searches.minmax))
