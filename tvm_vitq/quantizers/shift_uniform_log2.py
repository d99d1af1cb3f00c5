"""Uniform steps of a shifted logarithm, rounded to powers of two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.quantizers.codebook import Book, Codebook, parameter

ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Those that the released code searches."""


class ShiftUniformLog2(Codebook):
    """``q = UQ(log2(u + eta))``, ``level = 2**rint(UQ^-1(q)) - eta``: the SULQ of I&S-ViT (TPAMI'25) for
    attention probabilities; 2 to 8 bits.

    UQ has N = 2**bits codes from "low" to "high" in steps of ``(high - low) / (N - 1)``, here at calibration
    and inference; released code infers with N + 1 codes and a smaller step. Thresholds lie half way between
    codes, ``2**(low + (q + 1/2) * step) - eta``, which no float meets but by chance. Codes ascend with u,
    against the paper's -log2. Levels below 0, which rounding downwards yields near u = 0, are 0. Neighbouring
    codes whose exponents round to the same whole number have equal levels and stay separate codes.

    params : "eta", 1e-6 to 1, relative to the scale (`ETAS` in the released code, 0.005 by default); "low"
    and "high", -40 to 1, the range of ``log2(u + eta)``: by default that of u from 0 to 1.
    """

    name = "shift_uniform_log2"
    own = ("eta", "low", "high")

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        eta = parameter(self.name, params, "eta", 1e-6, 1, 0.005)
        low = parameter(self.name, params, "low", -40, 1, math.log2(eta))
        high = parameter(self.name, params, "high", -40, 1, math.log2(1 + eta))
        if not low < high:
            raise VitqError(
                f"the range of the {self.name} quantizer is empty",
                where="params['low'], params['high']",
                got=f"{low:g} to {high:g}",
                expected="low < high",
            )
        step = (high - low) / (2**bits - 1)
        q = np.arange(2**bits)
        levels = np.maximum(np.exp2(np.rint(low + q * step)) - eta, 0.0)
        return Book(np.exp2(low + (q[:-1] + 0.5) * step) - eta, levels)
