"""APHQ-ViT: ReLU instead of GELU, and blocks reconstructed by an average perturbation Hessian."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe
from tvm_vitq.site_rules import Granularities

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class APHQViT(Recipe):
    """APHQ-ViT (Wu et al., CVPR 2025, arXiv 2504.02508).

    Uniform quantizers only; q, k and v per head, weights per output channel, LayerNorm outputs per channel
    and folded as in RepQ-ViT. First GELU becomes ReLU, and every MLP with its LayerNorm is refitted in float
    (its section on MLP reconstruction, `calibrate.mlp_relu`). Then blocks are reconstructed with AdaRound,
    learned activation scales and random drop. In both, errors count by the average perturbation Hessian (its
    section on importance, `losses.PerturbationHessian`).

    Departures: perturbations have a random sign per channel, since LayerNorm removes the released code's
    common one; probabilities are relative to their row (`quantizers.row_maximum`) instead of per head; both
    trainings have hundreds of steps instead of 20 000, with learning rates in steps of each quantizer; the
    target of both is the model with GELU; sites are fitted to float inputs before training.

    Parameters
    ----------
    refit, iterations : steps per MLP, and per block.
    batch : images per step.
    drop : share of a block's input, and of the activations inside it, that stays in float in a step.
    percentile : of positive hidden activations at which the refit clamps them; None: 0.99 at 3 bits, 0.98
        else.
    """

    name = "aphq-vit"
    calibration_images: ClassVar[int] = 1024
    trains: ClassVar[bool] = True
    refit: int = 200
    iterations: int = 200
    batch: int = 16
    drop: float = 0.5
    percentile: float | None = None

    def granularities(self, requantize: str) -> Granularities:
        return replace(super().granularities(requantize), heads="head")

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.frame import percentile_frame
        from tvm_vitq.calibrate.losses import PerturbationHessian
        from tvm_vitq.calibrate.mlp_relu import Refit, gelu_to_relu
        from tvm_vitq.calibrate.reconstruct import Settings, reconstruct

        loss = PerturbationHessian()
        refit = Refit(self.refit, self.batch, percentile=self.percentile, loss=loss)
        teacher = gelu_to_relu(job, refit)
        percentile_frame(job)
        settings = Settings(self.iterations, self.batch, self.drop, self.drop, loss=loss)
        reconstruct(job, find_units(job.mod), settings, teacher)
