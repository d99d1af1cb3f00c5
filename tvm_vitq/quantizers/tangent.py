"""Steps that are fine at both ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_vitq.quantizers.codebook import Book, Codebook, parameter


class Tangent(Codebook):
    """``q = round((tan(alpha * (u - 1/2)) + L) / (2L) * (N - 1))``, ``level = 1/2 + atan((2q / (N - 1) - 1) *
    L) / alpha`` with ``L = tan(alpha / 2)`` and N = 2**bits; 2 to 8 bits. For attention probabilities: fine
    steps for the many near 0 and for the few near 1, which logarithms starve.

    After the TanQ of DopQ-ViT (arXiv 2408.03291); the formula is our reconstruction. 0 and 1 are levels.
    Thresholds lie half way between codes in the tangent; the one at u = 1/2 is met and goes to the larger
    level.

    params : "alpha", 0.01 (nearly uniform) to 3.14, 2.25 by default.
    """

    name = "tangent"
    own = ("alpha",)

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        alpha = parameter(self.name, params, "alpha", 0.01, 3.14, 2.25)
        largest, last = math.tan(alpha / 2), 2**bits - 1

        def level(q: Any) -> Any:
            return 0.5 + np.arctan((2 * q / last - 1) * largest) / alpha

        q = np.arange(2**bits)
        return Book(level(q[:-1] + 0.5), level(q))
