"""Percentile ranges, with the per-channel scales of LayerNorm outputs folded into the weights: the
default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class Percentile(Recipe):
    """The quantization frame of RepQ-ViT with uniform quantizers only.

    Activations: of the quantiles in `percentiles` the one with the smallest squared error; at 8 bits the
    whole range, as far as the widest of them justifies it (`searches.whole`), since clipped values hurt the
    logits more than their squared error says. Probabilities: relative to their row
    (`quantizers.row_maximum`). LayerNorm outputs: a range per channel, at 8 bits with room for unseen values
    (`searches.unseen`), folded exactly into gamma, beta and the following linear layers
    (`calibrate.reparameterize`). Weights: their whole range at 8 bits, below it a squared-error search, after
    folding.

    Parameters
    ----------
    percentiles : candidates for the upper end; the lower end is at one minus each.
    fold : whether per-channel scales are folded.
    """

    name = "percentile"
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    fold: bool = True

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import percentile_frame

        percentile_frame(job, self.percentiles, self.fold)
