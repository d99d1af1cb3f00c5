"""Integer constants of attention probabilities whose quantizer is a codebook."""

from __future__ import annotations

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.numerics_attention import DISTANCE_MAX, EXP_BITS, SCORE_BITS, Probabilities, exp2_guard_bits
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.codebook import Codebook

VALUE_MAX = 2**16 - 1
"""Largest p: two byte planes."""


def codebook_probabilities(codec: Codebook, quantizer: SiteQuantizer, keys: int, site: str) -> Probabilities:
    """Edges and values of softmax probabilities; ``x^ = scale / grid * (p - zero)``, see `probability_step`.

    A level is reached where ``x >= b = scale * threshold - shift``, that is where y, a whole number, is at
    most ``-log2(b) * 2**SCORE_BITS``: below ``edge = floor(..) + 1``, which rounds nothing. Levels that no y
    from 0 to DISTANCE_MAX reaches, and edges between equal levels, are left out. ``zero = rint(shift * grid /
    scale)`` is as fine as the values are.
    """
    thresholds, values = codec.integers(quantizer)
    grid, shift = codec.grid_and_shift(quantizer)
    scale = float(np.float32(quantizer.scale[0])) if quantizer.scale else 1.0
    if np.any(np.diff(thresholds) < 0) or np.any(np.diff(values) < 0):
        raise VitqError("the levels of a codebook must ascend", where=site, got=codec.name)
    if values[0] < 0 or values[-1] > VALUE_MAX:
        raise VitqError(
            "a level of probabilities does not fit 16 bits",
            where=site,
            got=f"{values[0]} to {values[-1]}",
            expected=f"0 to {VALUE_MAX}",
            fix="ask for a smaller grid, or for a shift of negative levels",
        )
    edges, values = reached(scale * thresholds - shift, values)
    if len(edges) == 0:  # all probabilities fall on one level: the kernel gets an edge that changes nothing
        edges, values = np.ones(1, np.int32), values.repeat(2)
    if quantizer.dynamic and values[-1] == 0:
        raise VitqError("a codebook relative to its row must not turn the row's maximum into 0", where=site)
    return Probabilities(
        "codebook",
        int(values[-1]),
        guard=exp2_guard_bits(keys),
        edges=edges,
        values=values,
        zero=round(shift * grid / scale),
        relative=quantizer.dynamic,
    )


def probability_step(codec: Codebook, quantizer: SiteQuantizer) -> float:
    """What one unit of p is worth; 1 if the result is divided by the row's sum."""
    return 1.0 if quantizer.dynamic else quantizer.scale[0] / codec.grid_and_shift(quantizer)[0]


def reached(thresholds: Array, values: Array) -> tuple[Array, Array]:
    """(edges, values) of the different levels that distances reach, from thresholds of the probability."""
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.floor(-np.log2(thresholds) * 2**SCORE_BITS) + 1
    always = DISTANCE_MAX + 1
    upper = np.where(thresholds > 0, np.clip(distance, 0, DISTANCE_MAX), always)
    bounds = np.concatenate([[always], upper, [0]]).astype(np.int32)
    kept = np.flatnonzero(bounds[:-1] > bounds[1:])
    kept = kept[np.diff(values[kept], prepend=-1) > 0]
    return bounds[kept[1:]], values[kept].astype(np.uint16)


def largest_total(probs: Probabilities, keys: int) -> float:
    """Bound of ``sum |p| + |zero|`` over a row.

    Each p is at most ``b + a * 2**-y`` with b = values[0] and the smallest such a, and the integer softmax
    keeps ``sum 2**-y <= 1 + 2**-9 + keys * 2**-(EXP_BITS + guard)``: errors of int_exp2, its cuts, and L.
    """
    assert probs.edges is not None and probs.values is not None
    each = float(probs.values[-1]) * keys
    if not probs.relative:
        least = float(probs.values[0])
        slopes = (probs.values[1:] - least) * np.exp2((probs.edges - 1) / 2**SCORE_BITS)
        total = 1 + 2.0**-9 + keys * 2.0 ** -(EXP_BITS + probs.guard)
        each = min(each, least * keys + float(slopes.max(initial=0.0)) * total)
    return each + abs(probs.zero) * keys
