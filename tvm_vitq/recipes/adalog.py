"""AdaLog: logarithms to a fitted base, scale and zero point searched together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe
from tvm_vitq.site_rules import Granularities

if TYPE_CHECKING:
    from torch import Tensor

    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.output_search import Error
    from tvm_vitq.calibrate.statistics import Summary
    from tvm_vitq.plan import SiteQuantizer


@dataclass(frozen=True)
class AdaLog(Recipe):
    """AdaLog (Wu et al., ECCV 2024), calibration without retraining.

    Softmax probabilities: `quantizers.adalog` with scale 1. Outputs of GELU: the same of ``x + 0.17``, whose
    constant goes into the bias of the layer behind. Both bases, and the scale behind GELU, are those with
    the smallest squared error of the matmul's output. LayerNorm outputs: per channel, folded as in RepQ-ViT,
    then searched per tensor like all other inputs; q, k and v per head; weights per output channel. Scales
    and zero points by progressive search of the output's error (`calibrate.progressive`).

    Departures: candidates are compared by the tensor's own error first, and fewer by the output's; zero
    points are searched around those of their range; of weights only the scale is searched.

    Parameters
    ----------
    images : calibration images that outputs are compared on.
    rounds : of search; the paper's 3 start anew each time, here those after the first refine.
    zero : "reserved": zero is one of the 2**bits codes of a logarithm; "implicit": it is one more level, as
        in the released code.
    """

    name = "adalog"
    calibration_images: ClassVar[int] = 32
    images: int = 32
    rounds: int = 2
    zero: str = "reserved"

    def granularities(self, requantize: str) -> Granularities:
        return replace(super().granularities(requantize), heads="head")

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import Rules, fit_frame
        from tvm_vitq.calibrate.output_search import by_output
        from tvm_vitq.calibrate.samples import record
        from tvm_vitq.calibrate.searches import PERCENTILES, minmax, percentile

        rule = percentile()
        rules = Rules(rule, rule, minmax, rule, 1.0 - min(PERCENTILES))
        fit_frame(job, rules, self._logarithms, softmax=True)
        by_output(job, record(job, self.images), [_search] + [_refine] * (self.rounds - 1))

    def _logarithms(self, job: Job, summaries: dict[str, Summary]) -> None:
        from tvm_vitq.calibrate.codebooks import probability_codebook
        from tvm_vitq.calibrate.fit import gelu_sites, softmax_sites
        from tvm_vitq.plan import SiteQuantizer
        from tvm_vitq.quantizers.codebook import GELU_SHIFT

        for site, spec in softmax_sites(job, "adalog"):
            job.quantizers[site.name] = probability_codebook("adalog", spec.bits, zero=self.zero)
        for site, spec in gelu_sites(job, "adalog"):
            largest = float(summaries[site.name].maximum[0]) + GELU_SHIFT
            params = {"shift": GELU_SHIFT, "zero": self.zero}
            job.quantizers[site.name] = SiteQuantizer(spec.bits, [largest], [0], "adalog", params=params)


def _search(site: str, quantizer: SiteQuantizer, x: Tensor, error: Error) -> SiteQuantizer:
    from tvm_vitq.calibrate.codebooks import every, fit_codebook, scales_below
    from tvm_vitq.calibrate.output_search import quantized
    from tvm_vitq.calibrate.progressive import progressive_search
    from tvm_vitq.quantizers.adalog import BASES

    if quantizer.codec == "adalog":
        scales = (1.0,) if site.endswith(".probs") else scales_below(quantizer.scale[0], 0.1, 32)
        params = every(base=BASES)

        def of_output(candidate: SiteQuantizer) -> float:
            return float(error(quantized(x, candidate)).sum())

        return fit_codebook(x, quantizer, params, scales, error=of_output, keep=16)[0]
    return quantizer if site.endswith(".probs") else progressive_search(quantizer, x, error)


def _refine(site: str, quantizer: SiteQuantizer, x: Tensor, error: Error) -> SiteQuantizer:
    from tvm_vitq.calibrate.output_search import FINE, search_scale

    if quantizer.codec == "adalog" or site.endswith(".probs"):
        return quantizer
    return search_scale(quantizer, x, error, FINE)
