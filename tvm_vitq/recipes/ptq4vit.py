"""PTQ4ViT: twin uniform quantizers, scales by the Hessian-weighted error of each layer's output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe
from tvm_vitq.site_rules import Granularities

if TYPE_CHECKING:
    from torch import Tensor

    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.output_search import Error, Step
    from tvm_vitq.plan import SiteQuantizer


@dataclass(frozen=True)
class PTQ4ViT(Recipe):
    """PTQ4ViT (Yuan et al., ECCV 2022).

    Weights per tensor, a fused qkv in three; activations symmetric per tensor. Softmax probabilities and
    outputs of GELU have two uniform steps, ``D2 = 2**m D1`` (`quantizers.twin_uniform`, `twin_uniform_gelu`,
    the selection of the paper, not the sum of the released code). Every scale and m minimizes ``E[sum (g (o -
    o^))**2]`` over the layer's output o, in rounds of weight, then input; q, k, probabilities, v alike.

    Departures: g is the gradient of the likelihood of labels drawn from the model's own prediction, a true
    Fisher weight (that of the released code is the divergence of the float model from itself, whose gradient
    is rounding noise). Factors of a scale from 0.01 to 1.2, coarse first, instead of 100 in a row. The
    image has 8 bits, the patch embedding is as every other layer.

    Parameters
    ----------
    images, rounds : calibration images that outputs are compared on, and rounds of search.
    hessian : whether outputs are weighted by g.
    """

    name = "ptq4vit"
    calibration_images: ClassVar[int] = 32
    images: int = 32
    rounds: int = 3
    hessian: bool = True

    def granularities(self, requantize: str) -> Granularities:
        return replace(super().granularities(requantize), weight="tensor")

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import Rules, fit_frame
        from tvm_vitq.calibrate.fused import fused_parts
        from tvm_vitq.calibrate.output_search import COARSE, FINE, by_output
        from tvm_vitq.calibrate.samples import record
        from tvm_vitq.calibrate.searches import minmax, symmetric

        self._twins(job)
        fit_frame(job, Rules(symmetric(minmax), minmax, symmetric(minmax)))
        blocks = {
            f"{layer}.weight": parts
            for layer, parts in fused_parts(job.mod).items()
            if job.quantizers[f"{layer}.weight"].granularity == "tensor"
        }
        for site, parts in blocks.items():
            job.quantizers[site] = _in_blocks(job.quantizers[site], job.executor.constants[site], parts)
        samples = record(job, self.images, self.hessian)
        rows = [COARSE, *[FINE] * (self.rounds - 1)]
        by_output(job, samples, [_step(row, blocks) for row in rows])

    def _twins(self, job: Job) -> None:
        from tvm_vitq.calibrate.codebooks import probability_codebook
        from tvm_vitq.calibrate.fit import gelu_sites, softmax_sites
        from tvm_vitq.plan import SiteQuantizer

        for site, spec in softmax_sites(job, "twin_uniform"):
            job.quantizers[site.name] = probability_codebook("twin_uniform", spec.bits)
        for site, spec in gelu_sites(job, "twin_uniform_gelu"):
            job.quantizers[site.name] = _gelu(SiteQuantizer(spec.bits, [], [0], "twin_uniform_gelu"), 2)


def _gelu(quantizer: SiteQuantizer, m: int) -> SiteQuantizer:
    from tvm_vitq.quantizers.twin_uniform_gelu import TwinUniformGelu

    scale = TwinUniformGelu.paper_scale(quantizer.bits, m)
    return replace(quantizer, scale=[scale], params={"m": m})


def _in_blocks(quantizer: SiteQuantizer, weight: Tensor, parts: int) -> SiteQuantizer:
    """One scale for each of so many equal blocks of rows."""
    rows = len(weight) // parts
    largest = weight.abs().reshape(parts, -1).amax(1) / (2 ** (quantizer.bits - 1) - 0.5)
    scale = largest.clamp(min=quantizer.scale[0] * 2.0**-20).repeat_interleave(rows).tolist()
    zero = quantizer.zero_point * len(scale)
    return replace(quantizer, scale=scale, zero_point=zero, granularity="channel", axis=0)


def _step(factors: tuple[float, ...], blocks: dict[str, int]) -> Step:
    from tvm_vitq.calibrate.output_search import search, search_scale

    def step(site: str, quantizer: SiteQuantizer, x: Tensor, error: Error) -> SiteQuantizer:
        if quantizer.codec == "twin_uniform":
            options = [
                replace(quantizer, params={**quantizer.params, "m": m}) for m in range(1, quantizer.bits + 1)
            ]
            return search(options, x, error)
        if quantizer.codec == "twin_uniform_gelu":
            return search([_gelu(quantizer, m) for m in range(-5, 12)], x, error)
        if site.endswith(".probs"):
            return quantizer
        if site in blocks:
            return search_scale(quantizer, x, lambda w: error(w).reshape(blocks[site], -1).sum(1), factors)
        return search_scale(quantizer, x, error, factors)

    return step
