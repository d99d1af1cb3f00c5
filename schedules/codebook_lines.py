"""Codebooks whose codes are nearly linear in the distance: a guess, and comparisons with edges next to it.

The distances 0 .. 2**16 - 1 are cut into equal blocks. Within one, with f the position in the block as a
16-bit fraction,

    guess = (base[block] - ((f * slope[block]) >> 16)) >> FRACTION

is at most as large as the code, the number of edges above the distance, and too small by no more than
`comparisons`. Logarithmic books are linear in the distance and others are smooth, so that books of 8 bits
need no more instructions than those of 4: a few lookups of tables that fit registers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics_attention import DISTANCE_MAX

Array = npt.NDArray

FRACTION = 7
"""Fraction bits of a guess: codes of 8 bits are below 2**(16 - FRACTION - 1)."""

DESIGNS = ((32, 1), (64, 1), (64, 2))
"""(blocks, comparisons), the cheapest first."""

SLOPES = 256
"""Slopes tried for a block."""


@dataclass(frozen=True)
class Lines:
    """base, slope : uint16, one of each block of 2**`bits` distances."""

    bits: int
    comparisons: int
    base: Array
    slope: Array

    @property
    def blocks(self) -> int:
        return len(self.base)

    def guesses(self, distances: Array) -> Array:
        """The guess of each distance, int64: what the kernel computes."""
        block, f = distances >> self.bits, (distances << (16 - self.bits)) & 0xFFFF
        return (self.base[block] - (f * self.slope[block] >> 16)) >> FRACTION


def lines(edges: Array) -> Lines | None:
    """The cheapest design for descending edges, at most 255 of them; None if none of DESIGNS does."""
    return _lines(edges.astype(np.int64).tobytes())


@functools.lru_cache(1024)
def _lines(edges: bytes) -> Lines | None:
    descending = np.frombuffer(edges, np.int64)
    if len(descending) >= 2 ** (15 - FRACTION):
        return None
    for blocks, comparisons in DESIGNS:
        found = _fit(descending, blocks, comparisons)
        if found is not None:
            return found
    return None


def _fit(edges: Array, blocks: int, comparisons: int) -> Lines | None:
    size = (DISTANCE_MAX + 1) // blocks
    bits = size.bit_length() - 1
    base, slope = np.zeros((2, blocks), np.int64)
    for block in range(blocks):
        line = _line(edges, block * size, size, comparisons)
        if line is None:
            return None
        base[block], slope[block] = line
    return Lines(bits, comparisons, base, slope)


def _line(edges: Array, first: int, size: int, comparisons: int) -> tuple[int, int] | None:
    """(base, slope) of the block of distances from `first` on.

    Guess and code only fall within a block, so that both ends of each run of equal codes tell of all of it.
    """
    last = first + size - 1
    inside = edges[(edges > first) & (edges <= last)]
    points = np.unique(np.concatenate([[first, last], inside, inside - 1]))
    codes = len(edges) - np.searchsorted(edges[::-1], points, side="right")
    f = (points - first) * (2**16 // size)
    steepest = (2 * (codes[0] - codes[-1]) + 2) << FRACTION
    slopes = np.unique(np.linspace(0, steepest, SLOPES).astype(np.int64))
    fall = f * slopes[:, None] >> 16
    most = ((codes + 1) << FRACTION) - 1
    bases = (most + fall).min(1)  # a larger one exceeds a code
    guesses = (bases[:, None] - fall) >> FRACTION
    fits = ((guesses >= codes - comparisons) & (guesses >= 0)).all(1) & (bases < 2**16)
    if not fits.any():
        return None
    best = int(np.argmax(fits))
    return int(bases[best]), int(slopes[best])
