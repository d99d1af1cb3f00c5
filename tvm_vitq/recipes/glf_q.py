"""GLF-Q: rotations, ReLU, and blocks reconstructed by what reaches the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class GLFQ(Recipe):
    """GLF-Q (2026; no code is public): uniform quantizers behind preprocessing that leaves the float model
    nearly as it is, then global and local reconstruction.

    The residual stream, q with k, and v with the projection are rotated, offline (`calibrate.rotation`). GELU
    becomes ReLU and MLPs are refitted as in APHQ-ViT (`calibrate.mlp_relu`). LayerNorm outputs are quantized
    per channel and folded with the median scale, as in DopQ-ViT. Blocks are reconstructed by training weights
    and activation scales straight through the rounding; the loss is ``global + 2 local``, of the features in
    front of the head and of the block's own output.

    Departures: the stream keeps LayerNorm instead of RMSNorm, with rotations that map ones to ones; scales
    are folded not only in Swin, but also where the stream is rotated (they hardly differ there, and it
    measures better); of Swin's streams the last stage is rotated too, which no patch merging reads;
    probabilities are relative to their row (`quantizers.row_maximum`); scales of weights are not trained;
    training has hundreds of steps instead of 3000, with learning rates in steps of each quantizer.

    Parameters
    ----------
    refit, iterations : steps per MLP, and per block.
    batch : images per step.
    share : of the global loss, for one of the local.
    streams, heads, relu : whether the stream is rotated, whether heads are, whether GELU is replaced.
    """

    name = "glf-q"
    calibration_images: ClassVar[int] = 1024
    trains: ClassVar[bool] = True
    refit: int = 200
    iterations: int = 100
    batch: int = 16
    share: float = 0.5
    streams: bool = True
    heads: bool = True
    relu: bool = True

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.executor import Executor
        from tvm_vitq.calibrate.frame import percentile_frame
        from tvm_vitq.calibrate.losses import PerturbationHessian, WithSuffix
        from tvm_vitq.calibrate.mlp_relu import Refit, gelu_to_relu
        from tvm_vitq.calibrate.reconstruct import Settings, reconstruct
        from tvm_vitq.calibrate.rotation import rotate_heads, rotate_streams
        from tvm_vitq.calibrate.rounding import StraightThrough

        if self.streams:
            rotate_streams(job)
        if self.heads:
            rotate_heads(job)
        refit = Refit(self.refit, self.batch, loss=PerturbationHessian())
        teacher = gelu_to_relu(job, refit) if self.relu else Executor(job.mod)
        percentile_frame(job, target="median")
        loss = WithSuffix(self.share)
        settings = Settings(self.iterations, self.batch, 0.0, 0.0, StraightThrough, loss=loss)
        reconstruct(job, find_units(job.mod), settings, teacher)
