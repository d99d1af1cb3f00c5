"""I&S-ViT: shifted uniform logarithms, trained in three stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.statistics import Summary


@dataclass(frozen=True)
class ISViT(Recipe):
    """I&S-ViT (Zhong et al., TPAMI 2025, arXiv 2311.10126).

    Softmax probabilities: shift-uniform-log2 quantizer, eta by squared error
    (`quantizers.shift_uniform_log2`). Smoothed optimization strategy in three stages (`calibrate.staged`):
    float weights trained on float inputs with activations quantized, LayerNorm outputs per channel; those
    folded as in RepQ-ViT; weights quantized per output channel, by nine percentiles, and trained through
    their rounding on quantized inputs. Patch embedding, reductions and head are units of their own.

    Departures: 2**bits levels of probabilities at calibration and inference (released code infers with one
    more); the common zero point is whole; weights of 8 bits are symmetric; learning rates count in steps of a
    weight's quantizer; all LayerNorm outputs that can be are folded, also those in front of reductions and
    head; a unit that training does not improve, on its quantized input, stays as it was.

    Parameters
    ----------
    iterations : per unit in stages 1 and 3 each;  batch : images per step.
    rate, rate_biases : see `calibrate.reconstruct.Settings`.
    """

    name = "is-vit"
    calibration_images: ClassVar[int] = 1024
    trains: ClassVar[bool] = True
    iterations: int = 300
    batch: int = 16
    rate: float = 1.0
    rate_biases: float = 1e-3

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import searches
        from tvm_vitq.calibrate.frame import Rules
        from tvm_vitq.calibrate.staged import Stages, fit_in_stages

        rule = searches.percentile()
        weights = searches.percentile(searches.WEIGHT_PERCENTILES)
        rules = Rules(rule, rule, weights, rule, 1.0 - min(searches.PERCENTILES))
        stages = Stages(self.iterations, self.batch, self.rate, self.rate_biases)
        fit_in_stages(job, rules, self._logarithms, stages)

    def _logarithms(self, job: Job, summaries: dict[str, Summary]) -> None:
        from tvm_vitq.calibrate.probabilities import fit_shift_uniform_log2

        fit_shift_uniform_log2(job, summaries)
