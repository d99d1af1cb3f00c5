"""Logarithm to an adaptive base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_vitq.quantizers.codebook import Book, Codebook, choice, descending, parameter, zero_of

R = 37
"""Denominator of the base's exponent."""

BASES = range(10, 138)
"""Those that the paper searches."""

MANTISSAS = ("table", "exact")


class AdaLog(Codebook):
    """``k = round(-log2(u) * R / base)``, ``level = 2**-(k * base / R)``; 2 to 8 bits. AdaLog (ECCV'24), for
    attention probabilities and, with ``params["shift"]`` = `codebook.GELU_SHIFT`, for the output of GELU.

    With N = 2**bits and ``k * base = R * t + e``, 0 <= e < R, the published level is ``2**-t * m / (2N -
    2)``, where ``m = rint(2**(-e / R) * (2N - 2))`` is a table of bits + 1 bits. Neighbouring levels may
    coincide.

    Thresholds at ``2**-((k + 1/2) * base / R)`` with either mantissa. Only bases 74 and 148 have ties, at
    powers of two: they go to the larger level, in the published form to even k. Code 0 is zero or the
    smallest level, the last code is k = 0. The published zero is implicit; u below 1e-15 is not taken for
    1e-15, as it is there, which no grid tells from 0.

    params : "base", whole, 1 to 148 (`BASES` in the paper; `R`, powers of two, is the default); "mantissa",
    "table" (default) or "exact"; "zero", see `codebook.ZEROS`.
    """

    name = "adalog"
    own = ("base", "mantissa", "zero")

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        base = parameter(self.name, params, "base", 1, 4 * R, R, whole=True)
        k = np.arange(2**bits)
        levels = np.exp2(-k * base / R)
        if choice(self.name, params, "mantissa", MANTISSAS) == "table":
            last = 2 * 2**bits - 2
            shift, fraction = np.divmod(k * base, R)
            levels = np.ldexp(np.rint(np.exp2(-fraction / R) * last) / last, -shift)
        return descending(levels, np.exp2(-(k + 0.5) * base / R), zero_of(self.name, params))
