"""VS-Quant: a scale for every few neighbouring channels, of inputs and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.recipes.base import Recipe
from tvm_vitq.site_rules import Granularities, SiteSpec

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.relax_passes.sites import Site

MOST_VECTORS = 127
"""Per row, where scales are no multiples: as many partial sums as an integer layer adds up."""

NARROW = 4
"""Bits of weights up to which a code times its multiple fits a byte, with enough multiples left."""


@dataclass(frozen=True)
class VSQuant(Recipe):
    """VS-Quant (Dai et al., MLSys 2021): per-vector scales in two levels.

    Vectors of `vector` neighbouring input channels have a scale each, from whole ranges. What a layer needs
    is the product of a vector's scales, of its weights and its inputs; these products are whole multiples of
    one step per output channel, rounded up. The layer adds up integers, ``sum_v multiple_v * dot_v``, as the
    paper's accelerator does, and one scale per output channel is left for the end.

    =========  ==========================  =========================================================
    weights    multiples                   in the program
    =========  ==========================  =========================================================
    5-8 bits   1 .. ``2**scale_bits - 1``  a multiplication for each vector's dot product
    2-4 bits   ``127 / |q - z|`` at most   the weights' bytes hold ``multiple * (q - z)``: a layer as any
                                           other. About 15 multiples at 4 bits, 31 at 3
    =========  ==========================  =========================================================

    Departures: the paper makes the scales of inputs and of weights whole multiples by themselves (4 to 6 bits
    each) and multiplies them in the accelerator; here scales of inputs are any, and those of weights bend.
    Inputs have zero points, as weights have below 8 bits (symmetric ones cost 2 points of top-1 at w4a8).
    Rows whose sum could overflow get wider steps. Operands of attention are quantized per tensor,
    probabilities relative to their row. The image has vectors as well.

    Where the granularities asked for are others, so that weights have no vectors or inputs have finer ones,
    and in shift plans, scales of vectors are any and sums are rounded for each; then a layer may have
    `MOST_VECTORS` vectors, and gets longer ones, with a note.

    Parameters
    ----------
    vector : channels per scale;  scale_bits : of the multiples, 2 to 15.
    """

    name = "vs-quant"
    vector: int = 16
    scale_bits: int = 6

    def granularities(self, requantize: str) -> Granularities:
        return replace(super().granularities(requantize), weight_group=self.vector, input_group=self.vector)

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import Rules, fit_frame
        from tvm_vitq.calibrate.searches import minmax

        if not 2 <= self.scale_bits <= 15:
            raise VitqError(
                "scales have 2 to 15 bits", where="scale_bits of recipe vs-quant", got=self.scale_bits
            )
        for site, spec in job.fitted_sites("input", "weight"):
            if not _has_multiples(job, site.layer):
                job.specs[site.name] = _lengthened(job, site, spec)
        fit_frame(job, Rules(minmax, minmax, minmax))
        for site, _ in job.fitted_sites("input"):
            _mend_empty(job, site.name)
        for site, _ in job.fitted_sites("weight"):
            if _has_multiples(job, site.layer):
                self._fit_multiples(job, site)

    def _fit_multiples(self, job: Job, site: Site) -> None:
        from tvm_vitq.calibrate.whole_multiples import whole_multiples

        quantizer = job.quantizers[site.name]
        if quantizer.granularity != "group":
            return  # the channels do not divide into vectors, as the notes say
        inputs = job.quantizers[_input_of(job, site.layer)]
        bias = job.executor.constants[f"{site.layer}.bias"].numpy()
        job.quantizers[site.name] = whole_multiples(
            job.weight(site.layer).numpy(),
            bias,
            quantizer,
            np.array(inputs.scale),
            2**self.scale_bits - 1,
            quantizer.bits <= NARROW,
        )


def _input_of(job: Job, layer: str) -> str:
    name = f"{layer}.input"
    return job.aliases.get(name, name)


def _has_multiples(job: Job, layer: str) -> bool:
    """Whether the inputs' scales hold for whole vectors of weights."""
    x, weight = job.specs[_input_of(job, layer)], job.specs[f"{layer}.weight"]
    if weight.group_size is None or x.granularity not in ("tensor", "group"):
        return False
    return x.group_size is None or x.group_size % weight.group_size == 0


def _lengthened(job: Job, site: Site, spec: SiteSpec) -> SiteSpec:
    size, channels = spec.group_size, site.shape[-1]
    if size is None or channels % size or channels // size <= MOST_VECTORS:
        return spec
    sizes = range(size, channels + 1, size)
    longer = next(n for n in sizes if channels % n == 0 and channels // n <= MOST_VECTORS)
    job.notes[site.name] = f"vectors of {longer}: {channels} channels are too many for {size}"
    return replace(spec, group_size=longer)


def _mend_empty(job: Job, name: str) -> None:
    """Vectors of inputs that were constantly 0 have the scale 1, beside which others would count for
    nothing: they get the largest of the others.
    """
    quantizer = job.quantizers[name]
    scale = np.array(quantizer.scale)
    empty = (scale == 1.0) & (np.array(quantizer.zero_point) == 0)
    if empty.any() and not empty.all():
        mended = np.where(empty, scale[~empty].max(), scale)
        job.quantizers[name] = replace(quantizer, scale=mended.tolist())
