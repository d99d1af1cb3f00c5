"""FIMA-Q: blocks reconstructed by a Fisher matrix approximated along the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe
from tvm_vitq.site_rules import Granularities

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class FIMAQ(Recipe):
    """FIMA-Q (Wu et al., CVPR 2025, arXiv 2506.11543).

    Uniform quantizers only: q, k and v per head, weights per output channel, LayerNorm outputs per channel
    and folded as in RepQ-ViT. Blocks are reconstructed with AdaRound, learned activation scales and random
    drop; errors count by a diagonal plus a low-rank Fisher matrix (its section on DPLR-FIM,
    `losses.LowRankFisher`).

    Departures: rows of the low-rank part are means over the images of one step, and B has a ridge;
    probabilities are relative to their row (`quantizers.row_maximum`) instead of per head; training has
    hundreds of steps instead of 20 000, with learning rates in steps of each quantizer.

    Parameters
    ----------
    iterations, batch : steps per block, images per step.
    drop : share of a block's input, and of the activations inside it, that stays in float in a step.
    rank : rows of the low-rank part;  low_rank, diagonal : weights of the two parts.
    token_scales : whether inputs of linear layers have a learned scale per token position, as in the released
        best configurations (where q, k and v have some as well). LayerNorm scales are not folded then.
    """

    name = "fima-q"
    calibration_images: ClassVar[int] = 1024
    trains: ClassVar[bool] = True
    iterations: int = 200
    batch: int = 16
    drop: float = 0.5
    rank: int = 5
    low_rank: float = 1.0
    diagonal: float = 1.0
    token_scales: bool = False

    def granularities(self, requantize: str) -> Granularities:
        inputs = "token" if self.token_scales else "tensor"
        return replace(super().granularities(requantize), heads="head", input=inputs)

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.frame import percentile_frame
        from tvm_vitq.calibrate.losses import LowRankFisher
        from tvm_vitq.calibrate.reconstruct import Settings, reconstruct

        percentile_frame(job)
        loss = LowRankFisher(self.rank, self.low_rank, self.diagonal)
        settings = Settings(self.iterations, self.batch, self.drop, self.drop, loss=loss)
        reconstruct(job, find_units(job.mod), settings)
