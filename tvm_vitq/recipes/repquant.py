"""RepQuant: RepQ-ViT with learned ranges of LayerNorm channels and learned rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.reparameterize import Fold, Range
    from tvm_vitq.calibrate.statistics import Summary


@dataclass(frozen=True)
class RepQuant(Recipe):
    """RepQuant (Li et al. 2024, arXiv 2402.05628), which extends `repq-vit` by two steps.

    Per-channel dual clipping: both ends of each LayerNorm channel's range are learned on the output error of
    the float layers behind (`calibrate.clipping`) and folded as they are. Quantized-weight reconstruction:
    after the fold, which widens the range of weights, their roundings are learned layer by layer on the
    quantized input (`calibrate.layer_rounding`). Probabilities, other ranges and the fold are those of
    `repq-vit`, its departures included.

    No code was released; the parameterization is built from descriptions. Departures: clipping starts from
    the percentile range instead of nearly the whole one; rounding is trained on second moments of the inputs,
    which is the same loss over all tokens at once.

    Parameters
    ----------
    percentiles, zero : see `repq-vit`.
    clipping, rounding : iterations per LayerNorm and per linear layer.
    """

    name = "repquant"
    calibration_images: ClassVar[int] = 32
    trains: ClassVar[bool] = True
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    zero: str = "reserved"
    clipping: int = 200
    rounding: int = 500

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import searches
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.frame import Rules, fit_frame
        from tvm_vitq.calibrate.layer_rounding import LayerRounding, round_layers

        rule = searches.percentile(self.percentiles)
        rules = Rules(rule, rule, rule, rule, 1.0 - min(self.percentiles))
        fit_frame(job, rules, self._logarithms, softmax=True, learn=self._clipped)
        round_layers(job, find_units(job.mod), LayerRounding(self.rounding))

    def _clipped(self, job: Job, folds: list[Fold], ranges: dict[str, Range]) -> dict[str, Range]:
        from tvm_vitq.calibrate.clipping import Clipping, learn_ranges

        return learn_ranges(job, folds, ranges, Clipping(self.clipping))

    def _logarithms(self, job: Job, summaries: dict[str, Summary]) -> None:
        from tvm_vitq.calibrate.probabilities import fit_log_sqrt2

        fit_log_sqrt2(job, summaries, self.percentiles, self.zero)
