"""The arithmetic of integer attention, in NumPy: base-2 scores, integer softmax, quantizers of probabilities.

The rules are those of numerics.py, whose products and conversions it uses; docs/numerics.md derives it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_vitq.numerics import Array, Output, integer_matmul, requantize, round_multiply

SCORE_BITS = 12
"""Fraction bits of attention scores, which are kept in base 2: score * log2(e) * 2**SCORE_BITS."""

EXP_BITS = 15
"""Fraction bits of the integer exponential; 2**-0 is exactly 2**EXP_BITS."""

SIGMOID_BITS = 14
"""log2 of the number of entries of the sigmoid-attention table, which covers base-2 scores from -16 to 16."""

EXP2_COEFFICIENTS = (32768, 22660, 7565, 1291)
"""Cubic c0 - f*(c1 - f*(c2 - f*c3)), 0 <= f < 1, for 2**(EXP_BITS - f).

``c0 = 2**EXP_BITS`` keeps 2**-0 exact; c1..c3 minimize the largest relative error over the 2**SCORE_BITS
fractions in this integer arithmetic, 1.27e-4 (docs/numerics.md).
"""

LOG2_COEFFICIENTS = (14481, 8755, 4864, 1479)
"""Cubic c0 - f*(c1 - f*(c2 - f*c3)) in 2**-15, 0 <= f < 1, that times f*(1 - f) is log2(1 + f) - f with an
error below 2e-5 (tools/fit_log2.py).
"""

DISTANCE_MAX = 2**16 - 1
"""Largest -log2 of a probability that a codebook sees, in 2**-SCORE_BITS: smaller ones than 2**-16 are 0."""


def exp2_guard_bits(terms: int) -> int:
    """Extra fraction bits of the exponentials in a sum of `terms`, as many as int32 has room for, at most 8.

    Cutting off each exponential makes the sum too small by at most ``terms * 2**-(EXP_BITS + guard)``.
    """
    return min(8, 31 - EXP_BITS - terms.bit_length())


def int_exp2(d: Array, guard: int) -> Array:
    """``2**-(d / 2**SCORE_BITS)`` in 2**-(EXP_BITS + guard), int32 d >= 0: a cubic in the fraction, then a
    shift.
    """
    c0, c1, c2, c3 = EXP2_COEFFICIENTS
    f = d & (2**SCORE_BITS - 1)
    e = c2 - ((f * c3) >> SCORE_BITS)
    e = c1 - ((f * e) >> SCORE_BITS)
    e = c0 - ((f * e) >> SCORE_BITS)
    return (e << guard) >> np.minimum(d >> SCORE_BITS, 31)


def int_log2(x: Array) -> Array:
    """``log2(x)`` of positive int32 values in 2**-SCORE_BITS, rounded, as int32.

    The bits of float32(x), exponent and fraction f, are log2(x) in 2**-23 with the line f for log2(1 + f). To
    them is added ``f (1 - f)`` times a cubic in f, all in 2**-16.
    """
    line = (x.astype(np.float32).view(np.int32) >> 7) - (127 << 16)
    f = line & 0xFFFF
    c0, c1, c2, c3 = LOG2_COEFFICIENTS
    c = c2 - ((f * c3) >> 16)
    c = c1 - ((f * c) >> 16)
    c = c0 - ((f * c) >> 16)
    arch = (((f * ((1 << 16) - f)) >> 16) * c) >> 15
    return (line + arch + (1 << (15 - SCORE_BITS))) >> (16 - SCORE_BITS)


@dataclass(frozen=True)
class Probabilities:
    """Quantizer of attention probabilities inside the attention operator.

    softmax: ``F = numerator // (sum(e) >> guard)``; ``p = min(((e >> guard) * F + 2**(shift-1)) >> shift,
    qmax)``, numerator = round(2**shift / scale), e in 2**-(EXP_BITS + guard)
    row_maximum: ``p = (e * qmax * 2**(shift-EXP_BITS) + 2**(shift-1)) >> shift``, e in 2**-EXP_BITS: the
    largest code of every row is qmax, and the result of attention is divided by the row's ``sum(p)``
    sigmoid: ``p = table[clip((t + 2**(s-1)) >> s, +-2**13) + 2**13]``, table : uint8 [2**SIGMOID_BITS]
    codebook: ``p = values[number of edges above y]`` with ``y = min(d + L, DISTANCE_MAX)``, -log2 of the
    probability: d = max(t) - t, L = int_log2(sum(e)) less the fraction bits of e. If `relative`, L = 0 and
    the result of attention is divided by the row's ``sum(p)``. A p stands for p - zero.
    edges : int32 [M - 1], 0 .. DISTANCE_MAX, descending;  values : uint16 [M], ascending

    qmax : the largest p.
    """

    kind: str
    qmax: int
    numerator: int = 0
    shift: int = 0
    guard: int = 0
    table: Array | None = None
    edges: Array | None = None
    values: Array | None = None
    zero: int = 0
    relative: bool = False

    @property
    def by_row(self) -> bool:
        """Whether the result of attention is divided by the row's sum(p)."""
        return self.relative or self.kind == "row_maximum"

    @property
    def planes(self) -> int:
        """Bytes of p."""
        return 1 if self.qmax < 256 else 2

    @property
    def factor(self) -> int:
        """What row_maximum multiplies exponentials with; the products stay below 2**31."""
        return self.qmax << (self.shift - EXP_BITS)


SIGMOID_SHIFT = SCORE_BITS + 5 - SIGMOID_BITS


def int_probabilities(t: Array, probs: Probabilities) -> Array:
    """p of base-2 scores t (int32, 2**-SCORE_BITS), over the last axis; uint8, of a codebook uint16."""
    if probs.kind == "codebook":
        assert probs.edges is not None and probs.values is not None  # by construction in realize
        y = _distance(t, probs)
        above = len(probs.edges) - np.searchsorted(probs.edges[::-1], y, side="right")
        return probs.values[above]
    if probs.kind == "row_maximum":
        e = int_exp2(t.max(-1, keepdims=True) - t, 0)
        return ((e * probs.factor + (1 << (probs.shift - 1))) >> probs.shift).astype(np.uint8)
    if probs.kind == "softmax":
        e = int_exp2(t.max(-1, keepdims=True) - t, probs.guard)
        factor = probs.numerator // (e.sum(-1, keepdims=True, dtype=np.int32) >> probs.guard)
        p = ((e >> probs.guard) * factor + (1 << (probs.shift - 1))) >> probs.shift
        return np.minimum(p, probs.qmax).astype(np.uint8)
    assert probs.table is not None  # by construction in realize
    half = 2 ** (SIGMOID_BITS - 1)
    index = np.clip((t + (1 << (SIGMOID_SHIFT - 1))) >> SIGMOID_SHIFT, -half, half - 1) + half
    return probs.table[index]


def _distance(t: Array, probs: Probabilities) -> Array:
    """y of a codebook: int32, 0 .. DISTANCE_MAX."""
    d = t.max(-1, keepdims=True) - t
    if probs.relative:
        return np.minimum(d, DISTANCE_MAX)
    total = int_exp2(d, probs.guard).sum(-1, keepdims=True, dtype=np.int32)
    log_sum = int_log2(total) - ((EXP_BITS + probs.guard) << SCORE_BITS)
    return np.minimum(d, DISTANCE_MAX - log_sum) + log_sum


def int_attention(
    q: Array,
    k: Array,
    v: Array,
    score_multiplier: Array,
    multiplier: Array,
    additive: tuple[Array, ...],
    *,
    zero_q: Array,
    zero_k: Array,
    zero_v: Array,
    zero_point: Array | int,
    probs: Probabilities,
    out: Output,
) -> Array:
    """Attention on codes, one head at a time in the kernels, all at once here.

    q : int8 [B, H, Tq, D];  k : int8 [B, H, Tk, D];  v : int8 [B, H, Tk, Dv]
    zero_q, zero_k, zero_v : int32 [H];  score_multiplier, multiplier : float32 [H]
    additive : int32, broadcastable to [B, H, Tq, Tk], base-2 scores

    ``t = round(float32((q - zero_q) @ (k - zero_k).T) * score_multiplier[h]) + sum(additive)``, int32 base-2
    scores;  ``p = int_probabilities(t)``;  ``o = (p - probs.zero) @ (v - zero_v)``;  result requantize(o,
    multiplier[h]) : [B, H, Tq, Dv]. With probabilities relative to their row (`by_row`) the multiplier of a
    row is the float32 quotient ``multiplier[h] / float32(sum(p))``.
    """
    per_head = (slice(None), None, None)
    zq, zk, zv = (np.asarray(z, np.int32)[per_head] for z in (zero_q, zero_k, zero_v))
    acc = integer_matmul(q, k.swapaxes(-1, -2))
    row = q.astype(np.int32).sum(-1, keepdims=True)
    column = k.astype(np.int32).sum(-1)[..., None, :]
    acc = acc - zq * column - zk * row + q.shape[-1] * zq * zk
    t = round_multiply(acc, score_multiplier[per_head])
    for term in additive:
        t = t + term
    p = int_probabilities(t, probs)
    p_sum = p.astype(np.int32).sum(-1, keepdims=True) - np.int32(probs.zero * p.shape[-1])
    v_sum = v.astype(np.int32).sum(-2, keepdims=True)
    o = integer_matmul(p, v) - np.int32(probs.zero) * v_sum - zv * p_sum
    zero = np.asarray(zero_point, np.int32)
    scale = np.asarray(multiplier, np.float32)[per_head]
    if probs.by_row:
        scale = scale / p_sum.astype(np.float32)
    return requantize(o, scale, zero[per_head] if zero.ndim else zero, out)
