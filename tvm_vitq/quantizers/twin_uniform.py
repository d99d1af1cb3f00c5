"""Two uniform quantizers of probabilities, a fine one near zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_vitq.quantizers.codebook import Book, Codebook, parameter


class TwinUniform(Codebook):
    """``level = d * clip(round(u / d), 0, Q - 1)`` with ``Q = 2**(bits - 1)``, where ``d = 1 / Q``, and
    ``d = 2**-m / Q`` for u below ``2**-m``; 2 to 8 bits. For attention probabilities.

    PTQ4ViT (ECCV'22), the form of the paper: one bit of a code tells the step, the others count. (The
    released code adds both quantizers, which yields up to ``u + 2**-m``.) Codes here are ranks: those of the
    coarse step that lie below ``2**-m`` are not counted. The largest level is ``1 - 1 / Q``. Thresholds lie
    half way between multiples of d, and at ``2**-m``; ties go to the larger level, in the paper's code to the
    even multiple.

    params : "m", whole, 1 to bits, 2 by default. Larger ones would make the steps overlap.
    """

    name = "twin_uniform"
    own = ("m",)

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        m = parameter(self.name, params, "m", 1, bits, 2, whole=True)
        count = 2 ** (bits - 1)
        fine = np.arange(count) / count * 2.0**-m
        coarse = np.arange(max(count >> m, 1), count) / count
        fine_edges = fine[1:] - 2.0**-m / count / 2
        coarse_edges = coarse[1:] - 0.5 / count
        return Book(np.concatenate([fine_edges, [2.0**-m], coarse_edges]), np.concatenate([fine, coarse]))
