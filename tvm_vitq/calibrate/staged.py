"""Training in stages: activations first, while weights are float, then weights (the smoothed optimization
strategy of I&S-ViT, Zhong et al. 2023).

With one range per channel a LayerNorm output loses little, but no integer layer can have that; with folded
ranges it can, but weights then carry the differences between channels. So:

1. activations are quantized, LayerNorm outputs per channel, and float weights are trained to live with it;
2. the ranges of that stage are folded (`reparameterize`), which changes no number;
3. weights are quantized and trained through their rounding, on what the quantized units in front give.

Targets are those of the original float model throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm_vitq.calibrate import fit
from tvm_vitq.calibrate.blocks import find_units
from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.frame import Rules, Special
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.reconstruct import Settings, reconstruct
from tvm_vitq.calibrate.reparameterize import (
    channel_ranges,
    find_folds,
    fit_channels,
    fold_quantizers,
    observe_with_folds,
)
from tvm_vitq.calibrate.rounding import StraightThrough, Unquantized


@dataclass(frozen=True)
class Stages:
    """How both training stages train: iterations per unit, images per step, and learning rates of weights and
    biases as in `reconstruct.Settings`.
    """

    iterations: int = 300
    batch: int = 16
    rate: float = 1.0
    rate_biases: float = 1e-3


def fit_in_stages(job: Job, rules: Rules, special: Special, stages: Stages) -> None:
    """Fit everything by rules, except what `special` fits, and train it in the stages above.

    Parameters
    ----------
    rules : with a rule for folded sites.
    special : see `frame.fit_frame`; it gets summaries of all softmax probabilities.
    """
    assert rules.folded is not None  # by the recipe
    folds = find_folds(job)
    views = fit.activation_views(job) | fit.probability_views(job, softmax=True)
    summaries = observe_with_folds(job, folds, views, rules.tail)
    special(job, summaries)
    fit_channels(job, folds, channel_ranges(job, folds, summaries, rules.folded))
    fit.fit_activations(job, summaries, rules.activations)
    fit.fit_probabilities(job, summaries, rules.probabilities)
    fit.fit_weights(job, rules.weights)  # their steps are the unit of the learning rate of stage 1
    last = Settings(
        stages.iterations,
        stages.batch,
        float_inputs=0.0,
        drop=0.0,
        weights=StraightThrough,
        rate=stages.rate,
        rate_scales=0.0,
        rate_biases=stages.rate_biases,
    )
    first = replace(last, weights=Unquantized, float_inputs=1.0)
    teacher, units = Executor(job.mod), find_units(job.mod)
    reconstruct(job, units, first, teacher, "stage-1")
    fold_quantizers(job, folds, rules.target)
    fit.fit_weights(job, rules.weights)
    reconstruct(job, units, last, teacher, "stage-3")
