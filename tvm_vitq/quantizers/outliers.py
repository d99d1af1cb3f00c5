"""Uniform quantizer whose outliers have codes beyond the others'."""

from __future__ import annotations

from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.uniform import Uniform


class UniformOutliers(Uniform):
    """`Uniform` with the step and zero point of b bits and the limits of a byte: codes from ``2**(b-1) -
    128`` to ``2**(b-1) + 127`` instead of 0 to ``2**b - 1``.

    The integer form of ADFQ-ViT's outlier-aware quantizer (Neural Networks'25), whose outliers stay in float
    beside the matmul. Operands of integer matmuls are bytes whatever their bits, so codes that b bits do not
    have cost nothing there; what they hold is as exact as the step, not exact. At 8 bits it is `Uniform`.
    """

    name = "uniform_outliers"

    def limits(self, site: SiteQuantizer) -> tuple[int, int]:
        centre = 2 ** (site.bits - 1)
        return centre - 128, centre + 127
