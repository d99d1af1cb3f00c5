"""VS-Quant: a scale for every few neighbouring channels, of inputs and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.recipes.base import Recipe
from tvm_vitq.site_rules import Granularities

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.plan import SiteQuantizer

MOST_VECTORS = 127
"""Per row: as many partial sums as an integer layer adds up."""


@dataclass(frozen=True)
class VSQuant(Recipe):
    """VS-Quant (Dai et al., MLSys 2021): per-vector scales in two levels.

    Vectors of `vector` neighbouring input channels have a scale each, from whole ranges; scales are multiples
    1 to ``2**scale_bits - 1`` of one step per output channel (weights) or per layer (inputs), rounded up.

    Departures: inputs have zero points; operands of attention are quantized per tensor, probabilities
    relative to their row. A layer of more than `MOST_VECTORS` vectors gets longer ones, with a note.

    Parameters
    ----------
    vector : channels per scale;  scale_bits : of the multiples.
    """

    name = "vs-quant"
    vector: int = 16
    scale_bits: int = 6

    def granularities(self, requantize: str) -> Granularities:
        return replace(super().granularities(requantize), weight_group=self.vector, input_group=self.vector)

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import Rules, fit_frame
        from tvm_vitq.calibrate.searches import minmax

        if not 2 <= self.scale_bits <= 16:
            raise VitqError(
                "scales have 2 to 16 bits", where="scale_bits of recipe vs-quant", got=self.scale_bits
            )
        for site, spec in job.fitted_sites("input", "weight"):
            size, channels = spec.group_size, site.shape[-1]
            if size is None or channels % size or channels // size <= MOST_VECTORS:
                continue
            sizes = range(size, channels + 1, size)
            longer = next(n for n in sizes if channels % n == 0 and channels // n <= MOST_VECTORS)
            job.specs[site.name] = replace(spec, group_size=longer)
            job.notes[site.name] = f"vectors of {longer}: {channels} channels are too many for {size}"
        fit_frame(job, Rules(minmax, minmax, minmax))
        for site, _ in job.fitted_sites("input", "weight"):
            if job.quantizers[site.name].granularity == "group":
                job.quantizers[site.name] = self._two_levels(job.quantizers[site.name], site.shape)

    def _two_levels(self, quantizer: SiteQuantizer, shape: tuple[int, ...]) -> SiteQuantizer:
        rows = 1 if quantizer.axis is None else shape[0]
        scale = np.array(quantizer.scale, np.float64).reshape(rows, -1)
        step = scale.max(1, keepdims=True) / (2**self.scale_bits - 1)
        coarse = (np.maximum(np.ceil(scale / step - 1e-6), 1) * step).astype(np.float32)
        zero = np.rint(scale * np.array(quantizer.zero_point).reshape(scale.shape) / coarse).astype(int)
        return replace(quantizer, scale=coarse.ravel().tolist(), zero_point=zero.ravel().tolist())
