"""Powers of two, with the rounding of an integer logarithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_vitq.quantizers.codebook import Book, Codebook, choice, descending, zero_of

QUOTIENTS = ("rounded", "exact")


class LogIntSoftmax(Codebook):
    """``r = rint(1 / u)``, ``k = floor(log2 r) + [r >= 1.5 * 2**floor(log2 r)]``, ``level = 2**-k``: the
    log-int-softmax of FQ-ViT (IJCAI'22) for attention probabilities; 2 to 8 bits.

    Thresholds at ``1 / u = 1.5 * 2**k`` instead of the `Log2` quantizer's ``sqrt(2) * 2**k``; as r is whole,
    at ``1.5 * 2**k - 0.5`` for k > 0. Of these, a float meets none. Code 0 is zero or the smallest level, the
    last code is k = 0. The published zero is implicit.

    params : "quotient", "rounded" (published, the default) or "exact": ``r = 1 / u``; "zero", see
    `codebook.ZEROS`.
    """

    name = "log_int_softmax"
    own = ("quotient", "zero")

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        k = np.arange(2**bits)
        whole = choice(self.name, params, "quotient", QUOTIENTS) == "rounded"
        largest = 1.5 * np.exp2(k) - np.where(whole & (k > 0), 0.5, 0.0)
        return descending(np.exp2(-k), 1 / largest, zero_of(self.name, params))
