"""int32 values as inputs of products: four digits, for multiples of the identity as weights, a cycle each for
a block of channels.

    ``v = d0 - 128 d1 + 2**15 (d2 - 128 d3)``,   d0 and d2 from -64 to 63, d1 and d3 from -128 to 127
"""

from __future__ import annotations

import numpy as np

from tvm_vitq.numerics import Array

DIGITS = 4
LOW_BITS = 15
"""Of the two lower digits."""

LARGEST = (64 + 127 * 128) * (2**LOW_BITS + 1)
"""Largest magnitude that four digits have on both sides of 0."""


def digits(values: Array) -> list[Array]:
    """d0 to d3 of int32 values of at most `LARGEST` in magnitude, int8 each."""
    found = []
    rest = np.asarray(values, np.int64)
    for _ in range(DIGITS // 2):
        low = (rest + 64) % 128 - 64
        rest = (rest - low) // 128
        high = (-rest + 128) % 256 - 128
        rest = (rest + high) // 256
        found += [low.astype(np.int8), high.astype(np.int8)]
    return found


def digit_weights(block: int) -> Array:
    """Of an even digit and of an odd one, int8 [2, block, block]."""
    return np.stack([np.eye(block), -128 * np.eye(block)]).astype(np.int8)
