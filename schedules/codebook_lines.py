"""Codebooks whose codes are nearly linear in the distance: a guess, and a comparison with the next edge.

The distances 0 .. 2**16 - 1 are cut into equal blocks, and where these are too curved, distances from the
last edge on into blocks of which each is cut into 1, 2, 4, .. equal pieces of its own. Within a piece, with f
the position in it as a 16-bit fraction,

    guess = (base[piece] - ((f * slope[piece]) >> 16)) >> FRACTION

is the code, the number of edges above the distance, or one less. Logarithmic books are linear in the distance
and others are smooth, so that books of 8 bits need no more instructions than those of 4: a few lookups of
tables that fit registers.
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

UNCUT = (32, 64)
"""Numbers of blocks, the cheapest first."""

CUT = (64, 128, 256)
"""Most pieces that 32 blocks are cut into, the cheapest first."""

SLOPES = 256
"""Slopes tried for a piece."""


@dataclass(frozen=True)
class Lines:
    """bits : log2 of the distances of a block.
    base, slope : uint16, one of each piece.
    origin : the distance at which blocks begin; 0 unless they are cut. Smaller ones count as this.
    first, cuts : uint16, the first piece of each block, and their number; None unless blocks are cut.
    """

    bits: int
    base: Array
    slope: Array
    origin: int = 0
    first: Array | None = None
    cuts: Array | None = None

    def guesses(self, distances: Array) -> Array:
        """The guess of each distance, int64: what the kernel computes."""
        y = np.maximum(distances - self.origin, 0)
        piece, f = y >> self.bits, (y << (16 - self.bits)) & 0xFFFF
        if self.first is not None and self.cuts is not None:
            scaled = f * self.cuts[piece]
            piece, f = self.first[piece] + (scaled >> 16), scaled & 0xFFFF
        return (self.base[piece] - (f * self.slope[piece] >> 16)) >> FRACTION


def lines(edges: Array) -> Lines | None:
    """The cheapest lines for descending edges, at most 255 of them; None if there are none."""
    return _lines(edges.astype(np.int64).tobytes())


@functools.lru_cache(1024)
def _lines(edges: bytes) -> Lines | None:
    descending = np.frombuffer(edges, np.int64)
    if len(descending) >= 2 ** (15 - FRACTION):
        return None
    for blocks in UNCUT:
        size = (DISTANCE_MAX + 1) // blocks
        pieces = _pieces(descending, 0, DISTANCE_MAX + 1, size)
        if pieces is not None:
            return Lines(size.bit_length() - 1, *np.array(pieces).T)
    return _cut(descending)


def _cut(edges: Array) -> Lines | None:
    """Blocks that are cut, each as often as it needs, from the last edge on, where codes begin to fall."""
    origin = int(edges[-1]) - 1
    size = (DISTANCE_MAX + 1) // UNCUT[0]
    found: list[tuple[int, int]] = []
    first, cuts = [], []
    for start in range(0, DISTANCE_MAX + 1, size):
        first.append(len(found))
        for cut in (1 << k for k in range(size.bit_length() - 1)):
            if len(found) + cut > CUT[-1]:
                return None
            pieces = _pieces(edges - origin, start, start + size, size // cut)
            if pieces is not None:
                break
        else:
            return None
        cuts.append(cut)
        found += pieces
    total = next(most for most in CUT if most >= len(found))
    base, slope = np.array(found + [(0, 0)] * (total - len(found))).T
    return Lines(size.bit_length() - 1, base, slope, origin, np.array(first), np.array(cuts))


def _pieces(edges: Array, start: int, stop: int, size: int) -> list[tuple[int, int]] | None:
    """(base, slope) of every piece of `size` distances; None if one of them is too curved."""
    found = []
    for first in range(start, stop, size):
        line = _line(edges, first, size)
        if line is None:
            return None
        found.append(line)
    return found


def _line(edges: Array, first: int, size: int) -> tuple[int, int] | None:
    """(base, slope) of the piece of distances from `first` on.

    Guess and code only fall within a piece, so that both ends of each run of equal codes tell of all of it.
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
    fits = ((guesses >= codes - 1) & (guesses >= 0)).all(1) & (bases < 2**16)
    if not fits.any():
        return None
    best = int(np.argmax(fits))
    return int(bases[best]), int(slopes[best])
