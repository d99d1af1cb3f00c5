"""The frame that most recipes share: one pass of statistics, folded LayerNorm scales, ranges, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm_vitq.calibrate import fit, searches
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.reparameterize import (
    Fold,
    Range,
    channel_ranges,
    find_folds,
    fit_channels,
    fold_quantizers,
    observe_with_folds,
)
from tvm_vitq.calibrate.searches import RangeRule
from tvm_vitq.calibrate.statistics import Summary

Special = Callable[[Job, dict[str, Summary]], None]

Learn = Callable[[Job, list[Fold], dict[str, Range]], dict[str, Range]]


@dataclass(frozen=True)
class Rules:
    """How the sites of a model are ranged.

    activations : of inputs, q, k and v;  weights;  probabilities : of those that count from 0 to an end.
    folded : of each channel of a LayerNorm output; None: nothing is folded.
    tail : share of each tensor's extreme values that the rules want exactly.
    target : see `reparameterize.TARGETS`.
    """

    activations: RangeRule
    probabilities: RangeRule
    weights: RangeRule
    folded: RangeRule | None = None
    tail: float = 0.0
    target: str = "mean"


def fit_frame(
    job: Job,
    rules: Rules,
    special: Special | None = None,
    softmax: bool = False,
    learn: Learn | None = None,
) -> None:
    """Fit everything by rules, except what `special` fits.

    Parameters
    ----------
    special : called with the summaries of all activation sites after folding; sites for which it puts a
        quantizer into ``job.quantizers`` are left as they are.
    softmax : whether it wants summaries of all softmax probabilities too.
    learn : makes better ranges of the channels of LayerNorm outputs, by LayerNorm, of those of the rules.
    """
    folds = find_folds(job) if rules.folded is not None else []
    views = fit.activation_views(job) | fit.probability_views(job, softmax)
    summaries = observe_with_folds(job, folds, views, rules.tail)
    if rules.folded is not None:
        ranges = channel_ranges(job, folds, summaries, rules.folded)
        fit_channels(job, folds, ranges if learn is None else learn(job, folds, ranges))
        fold_quantizers(job, folds, rules.target)
    if special is not None:
        special(job, summaries)
    fit.fit_activations(job, summaries, rules.activations)
    fit.fit_probabilities(job, summaries, rules.probabilities)
    fit.fit_weights(job, rules.weights)


def percentile_frame(
    job: Job,
    percentiles: Sequence[float] = searches.PERCENTILES,
    fold: bool = True,
    special: Special | None = None,
    target: str = "mean",
) -> None:
    """Fit everything as the recipe `percentile` says, except what `special` fits.

    Parameters
    ----------
    percentiles, fold : see the recipe.
    special : see `fit_frame`.
    target : see `reparameterize.TARGETS`.
    """
    widest = searches.percentile((max(percentiles),))
    rule = searches.by_bits(searches.percentile(percentiles), searches.whole(widest))
    rules = Rules(
        rule,
        searches.by_bits(rule, searches.minmax),
        searches.by_bits(searches.mse(), searches.minmax),
        searches.by_bits(rule, searches.unseen(searches.minmax)) if fold else None,
        1.0 - min(percentiles),
        target,
    )
    fit_frame(job, rules, special)
