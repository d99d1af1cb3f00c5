"""Powers of the square root of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_vitq.quantizers.codebook import Book, Codebook, descending, zero_of


class LogSqrt2(Codebook):
    """``k = round(-2 log2 u)``, ``level = 2**(-k / 2)``, for attention probabilities; 2 to 8 bits.

    Thresholds at ``2**(-k / 2 - 1/4)``, which no float meets. Code 0 is zero or the smallest level, the last
    code is k = 0. RepQ-ViT (ICCV'23), whose released code has an implicit zero.

    params : "zero", see `codebook.ZEROS`.
    """

    name = "log_sqrt2"
    own = ("zero",)

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        k = np.arange(2**bits)
        return descending(np.exp2(-k / 2), np.exp2(-k / 2 - 0.25), zero_of(self.name, params))
