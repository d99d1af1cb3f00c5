"""Powers of the square root of two, of values that are shifted to be positive."""

from __future__ import annotations

from tvm_vitq.quantizers.codebook import GELU_SHIFT
from tvm_vitq.quantizers.log_sqrt2 import LogSqrt2


class ShiftLog2(LogSqrt2):
    """`LogSqrt2` of ``x + shift``, for the output of GELU: ADFQ-ViT (Neural Networks'25).

    The released code shifts by the smallest value of each tensor at run time plus 1e-6; here the shift is a
    constant, GELU's minimum, which a linear layer that follows takes into its bias.

    params : "shift", `GELU_SHIFT` by default; "zero", see `codebook.ZEROS`: the level that stands for
    ``-shift``.
    """

    name = "shift_log2"
    default_shift = GELU_SHIFT
