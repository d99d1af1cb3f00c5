"""Finds EXP2_COEFFICIENTS of tvm_vitq/numerics_attention.py: the cubic for 2**-f, 0 <= f < 1, in its integer
arithmetic.

python tools/fit_exp2.py prints the coefficients and their largest relative error.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from tvm_vitq.numerics_attention import EXP_BITS, SCORE_BITS

FRACTIONS = np.arange(2**SCORE_BITS)
EXACT = 2.0 ** (EXP_BITS - FRACTIONS / 2**SCORE_BITS)
LARGEST = 2**EXP_BITS


def integer_cubic(c1: int, c2: int, c3: int) -> np.ndarray:
    """``c0 - f*(c1 - f*(c2 - f*c3))`` with every product cut off to EXP_BITS, as int_exp2 computes it."""
    e = c2 - ((FRACTIONS * c3) >> SCORE_BITS)
    e = c1 - ((FRACTIONS * e) >> SCORE_BITS)
    return LARGEST - ((FRACTIONS * e) >> SCORE_BITS)


def error(c1: int, c2: int, c3: int) -> float:
    """Largest relative error over all fractions."""
    return float(np.abs(integer_cubic(c1, c2, c3) / EXACT - 1).max())


def real_minimax() -> np.ndarray:
    """c1, c2, c3 with the smallest largest relative error in real arithmetic (Lawson's algorithm), c0
    fixed.
    """
    f = FRACTIONS / 2**SCORE_BITS
    basis = np.stack([-f, f**2, -(f**3)], axis=1) * (LARGEST / EXACT)[:, None]
    target = 1 - LARGEST / EXACT
    weight = np.ones(len(f))
    for _ in range(200):
        root = np.sqrt(weight)
        c = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
        weight *= np.abs(basis @ c - target)
        weight /= weight.sum()
    return c * LARGEST


def fit() -> tuple[tuple[int, int, int, int], float]:
    """The best integers near the real solution, and their error."""
    start = np.rint(real_minimax()).astype(int)
    around = (range(-6, 7), range(-12, 13), range(-12, 13))
    candidates = ([int(s + d) for s, d in zip(start, delta, strict=True)] for delta in product(*around))
    best = min(candidates, key=lambda c: error(*c))
    return (LARGEST, *best), error(*best)


if __name__ == "__main__":
    coefficients, largest = fit()
    print(f"EXP2_COEFFICIENTS = {coefficients}, largest relative error {largest:.3g}")
