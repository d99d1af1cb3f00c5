"""Powers of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_vitq.quantizers.codebook import Book, Codebook, descending, zero_of


class Log2(Codebook):
    """``k = round(-log2 u)``, ``level = 2**-k``, for attention probabilities; 2 to 8 bits.

    Thresholds at ``2**-(k + 1/2)``, which no float meets. Code 0 is zero or the smallest level, the last code
    is k = 0. Without scale, the logarithmic quantizer of FQ-ViT (IJCAI'22), whose zero is implicit: all u
    below ``2**-(2**bits - 1/2)``.

    params : "zero", see `codebook.ZEROS`.
    """

    name = "log2"
    own = ("zero",)

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        k = np.arange(2**bits)
        return descending(np.exp2(-k), np.exp2(-k - 0.5), zero_of(self.name, params))
