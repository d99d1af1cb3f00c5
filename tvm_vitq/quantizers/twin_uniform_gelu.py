"""Two uniform quantizers, one for negative and one for positive values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_vitq.quantizers.codebook import GELU_SHIFT, Book, Codebook, parameter


class TwinUniformGelu(Codebook):
    """``x^ = d * clip(round(x / d), -Q, 0)`` for negative x and ``2**m * d * clip(round(x / (2**m * d)), 0, Q
    - 1)`` for positive x, with ``Q = 2**(bits - 1)``; 2 to 8 bits. For the output of GELU.

    PTQ4ViT (ECCV'22), the form of the paper: one bit of a code tells the sign, the others count. ``scale`` is
    what all levels span, ``d * span(bits, m)``; the paper's d is ``GELU_SHIFT / Q``, see `paper_scale`. So
    values fit a byte with the default grid, and with ``params["grid"] = span(bits, m)`` all levels are whole.
    Thresholds lie half way between levels; ties go to the larger level, in released code to the even
    multiple.

    params : "m", whole, -5 to 24, 2 by default. (The released code searches the positive step freely.)
    """

    name = "twin_uniform_gelu"
    own = ("m",)

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        m = parameter(self.name, params, "m", -5, 24, 2, whole=True)
        count = 2 ** (bits - 1)
        levels = np.concatenate([np.arange(-count, 0), 2.0**m * np.arange(count)]) / self.span(bits, m)
        return Book((levels[:-1] + levels[1:]) / 2, levels)

    @staticmethod
    def span(bits: int, m: int) -> float:
        """Distance of the outer levels in units of the negative step."""
        count = 2 ** (bits - 1)
        return count + (count - 1) * 2.0**m

    @classmethod
    def paper_scale(cls, bits: int, m: int) -> float:
        """The scale with which the smallest level is GELU's minimum."""
        return GELU_SHIFT / 2 ** (bits - 1) * cls.span(bits, m)
