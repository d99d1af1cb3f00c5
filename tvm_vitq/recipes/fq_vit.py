"""FQ-ViT: whole ranges, powers of two for probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class FQViT(Recipe):
    """FQ-ViT (Lin et al., IJCAI 2022).

    Weights per output channel and activations per tensor from their smallest and largest value. Softmax
    probabilities: log-int-softmax, ``2**-k`` with k the rounded integer logarithm of ``rint(1 / p)``.

    Departures: the power-of-two factor of the paper gives each channel of a LayerNorm *input*, 8 bits wide
    there, its own step. Here LayerNorm reads the residual stream, which stays in 32-bit fixed point: finer
    than any such factor, so there is nothing to fit, and the recipe is at least as accurate as the paper's.
    Weights are limited to +-127 instead of -128.

    Parameters
    ----------
    attention_bits : bits of probabilities where 8 are asked for, as in the paper's 8/8/4; None: those asked
        for, its 8/8/8.
    zero : "reserved": zero is one of the 2**bits codes of a probability; "implicit": it is one more level, as
        in the released code.
    """

    name = "fq-vit"
    calibration_images: ClassVar[int] = 1000
    attention_bits: int | None = 4
    zero: str = "reserved"

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.codebooks import probability_codebook
        from tvm_vitq.calibrate.fit import softmax_sites
        from tvm_vitq.calibrate.frame import Rules, fit_frame
        from tvm_vitq.calibrate.searches import minmax, symmetric

        for site, spec in softmax_sites(job, "log_int_softmax"):
            bits = self.attention_bits if spec.bits == 8 and self.attention_bits else spec.bits
            job.quantizers[site.name] = probability_codebook("log_int_softmax", bits, zero=self.zero)
        fit_frame(job, Rules(minmax, minmax, symmetric(minmax)))
