"""PEG: LayerNorm outputs in groups of channels of similar range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_vitq.errors import VitqError
from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class PerEmbeddingGroup(Recipe):
    """Per-embedding-group quantization (Bondarenko et al., EMNLP 2021), with the range-based permutation.

    The channels of a LayerNorm output are sorted by range and cut into equal groups, each with the scale and
    zero point of its smallest and largest value. All else per tensor (weights per output channel), whole
    ranges.

    Departures: instead of permuting channels so that groups are neighbours, and adding up one product per
    group, the groups' scales and zero points are folded into LayerNorm and weights
    (`calibrate.reparameterize`): the same codes, one product, and no permutation that the residual stream
    would have to share. Weights are quantized after that. The paper also groups the output of the MLP and the
    residual sum; those stay in 32-bit fixed point here.

    Parameters
    ----------
    groups : per tensor.
    """

    name = "peg"
    groups: int = 6

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import Rules, fit_frame
        from tvm_vitq.calibrate.searches import grouped, minmax

        if self.groups < 1:
            raise VitqError("groups must be 1 or more", where="groups of recipe peg", got=self.groups)
        fit_frame(job, Rules(minmax, minmax, minmax, grouped(minmax, self.groups)))
