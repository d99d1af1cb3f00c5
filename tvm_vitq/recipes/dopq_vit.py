"""DopQ-ViT: tangent probabilities, median scales, trained in three stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.statistics import Summary


@dataclass(frozen=True)
class DopQViT(Recipe):
    """DopQ-ViT (Yang et al. 2024, arXiv 2408.03291).

    Softmax probabilities: tangent quantizer, shape and scale by squared error (`quantizers.tangent`, our
    reconstruction of TanQ, whose formula could not be verified). MOSF: LayerNorm scales per channel are
    folded into the median of them instead of the mean, likewise the zero point. Training in the three stages
    of `is-vit` (`calibrate.staged`), the protocol family that the paper belongs to.

    The median changes nothing that could be measured: with one weight scale per output channel any common
    scale and whole zero point give the same codes (`calibrate.reparameterize`). Departures: no code was
    released, so details of the training are those of `is-vit`, and so are its departures.

    Parameters
    ----------
    iterations : per unit in stages 1 and 3 each;  batch : images per step.
    rate, rate_biases : see `calibrate.reconstruct.Settings`.
    target : see `calibrate.reparameterize.TARGETS`.
    """

    name = "dopq-vit"
    calibration_images: ClassVar[int] = 1024
    trains: ClassVar[bool] = True
    iterations: int = 300
    batch: int = 16
    rate: float = 1.0
    rate_biases: float = 1e-3
    target: str = "median"

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import searches
        from tvm_vitq.calibrate.frame import Rules
        from tvm_vitq.calibrate.staged import Stages, fit_in_stages

        rule = searches.percentile()
        weights = searches.percentile(searches.WEIGHT_PERCENTILES)
        rules = Rules(rule, rule, weights, rule, 1.0 - min(searches.PERCENTILES), self.target)
        stages = Stages(self.iterations, self.batch, self.rate, self.rate_biases)
        fit_in_stages(job, rules, self._tangents, stages)

    def _tangents(self, job: Job, summaries: dict[str, Summary]) -> None:
        from tvm_vitq.calibrate.probabilities import fit_tangent

        fit_tangent(job, summaries)
