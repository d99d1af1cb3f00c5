"""Finds LOG2_COEFFICIENTS of tvm_vitq/numerics_attention.py: what int_log2 adds to the line log2(1 + f) ~ f.

python tools/fit_log2.py prints the coefficients and the largest error of int_log2 before it rounds.
"""

from __future__ import annotations

import numpy as np

ONE = 2**15
FRACTIONS = np.arange(1, 2**16) / 2**16
ARCH = FRACTIONS * (1 - FRACTIONS)


def fit() -> tuple[tuple[int, ...], float]:
    """c with the smallest largest error of ``f (1 - f) (c0 - f c1 + f**2 c2 - f**3 c3)``, rounded, and that
    error (Lawson's algorithm).
    """
    exact = np.log2(1 + FRACTIONS) - FRACTIONS
    basis = np.stack([ARCH * (-FRACTIONS) ** k for k in range(4)], axis=1)
    weight = np.ones(len(FRACTIONS))
    for _ in range(200):
        root = np.sqrt(weight)
        c = np.linalg.lstsq(basis * root[:, None], exact * root, rcond=None)[0]
        weight *= np.abs(basis @ c - exact)
        weight /= weight.sum()
    rounded = np.rint(c * ONE).astype(int)
    return tuple(rounded.tolist()), float(np.abs(basis @ rounded / ONE - exact).max())


if __name__ == "__main__":
    coefficients, largest = fit()
    print(f"LOG2_COEFFICIENTS = {coefficients}, largest error {largest:.3g}")
