"""The arithmetic of the integer program, in NumPy: what every kernel of every target must return, bit for
bit.

Allowed are integer operations, table lookups and single IEEE float32 operations that no compiler may fuse:
convert, multiply, divide, round to nearest even. There is no float sum, no product that is then added, and no
library function, so there is one answer. docs/numerics.md derives the formulas and the constants.

Number formats
--------------
codes   int8, centred: ``q - 2**(bits-1)`` of a b-bit quantizer; probabilities are uint8 ``0 .. 2**bits - 1``
index   uint16, ``0 .. 4095``: position in a table of a scalar function
wide    int32, ``|v| <= WIDE_MAX``, in units of a power of two: residual stream and the interiors of functions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray

WIDE_MAX = 2**24 - 1
"""Largest wide value: the largest range whose integers float32 holds exactly."""

INDEX_BITS = 12
"""log2 of the number of entries of a function table."""

NORM_BITS = 12
"""Fraction bits of a normalized LayerNorm value (x - mean) / std."""

NORM_MAX = 2**17 - 1
"""Largest normalized LayerNorm value: 32 standard deviations, which no row of up to 1025 channels can
exceed.
"""


@dataclass(frozen=True)
class Output:
    """How an integer operator stores its result.

    ``codes = clip(round(value * multiplier) + zero_point, qmin, qmax)``; with dtype float32 the result is
    ``float32(value) * multiplier`` and nothing is rounded. `kind` is "multiply" or "shift" (then every
    multiplier is a power of two and ``round`` is half up: add half, shift right).
    """

    dtype: str
    qmin: int = -WIDE_MAX
    qmax: int = WIDE_MAX
    kind: str = "multiply"


def matmul_is_exact_in_float32(depth: int, left_max: int, right_max: int) -> bool:
    """Whether a sum of `depth` products stays below 2**24, where float32 BLAS adds integers exactly in any
    order.
    """
    return depth * left_max * right_max <= 2**24


def integer_matmul(a: Array, b: Array) -> Array:
    """``a @ b`` of integer arrays as int32, computed by BLAS in the narrowest float type that is exact.

    Operands are at most 16 bits wide; the caller has proved that the int32 accumulator does not overflow.
    """
    depth = a.shape[-1]
    left, right = (int(np.iinfo(v.dtype).max) + 1 for v in (a, b))
    dtype = np.float32 if matmul_is_exact_in_float32(depth, left, right) else np.float64
    return np.matmul(a.astype(dtype), b.astype(dtype)).astype(np.int32)


def round_multiply(value: Array, multiplier: Array) -> Array:
    """``round(float32(value) * multiplier)``, ties to even, limited to +-WIDE_MAX, as int32.

    The convert, the multiply and the round are one IEEE operation each; the limit keeps the conversion back
    to integers in range, where all targets agree.
    """
    scaled = value.astype(np.float32) * np.asarray(multiplier, np.float32)
    return np.rint(np.clip(scaled, np.float32(-WIDE_MAX), np.float32(WIDE_MAX))).astype(np.int32)


def round_shift(value: Array, multiplier: Array) -> Array:
    """``value * 2**-s`` rounded half up, for multipliers that are powers of two ``2**-s`` with ``0 <= s <=
    31``.
    """
    shift = -np.log2(np.asarray(multiplier, np.float64)).astype(np.int64)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    return np.clip((value.astype(np.int64) + half) >> shift, -WIDE_MAX, WIDE_MAX).astype(np.int32)


def requantize(value: Array, multiplier: Array, zero_point: Array | int, out: Output) -> Array:
    """The one output conversion of every integer operator; broadcasts over the last axis."""
    if out.dtype == "float32":
        return value.astype(np.float32) * np.asarray(multiplier, np.float32)
    rounded = (round_multiply if out.kind == "multiply" else round_shift)(value, multiplier)
    return np.clip(rounded + zero_point, out.qmin, out.qmax).astype(out.dtype)


def int_quantize(x: Array, inverse_scale: Array | float, zero_point: Array | int, out: Output) -> Array:
    """Codes of a float32 tensor: ``clip(round(x * inverse_scale) + zero_point, qmin, qmax)``."""
    return np.clip(round_multiply(x, np.float32(inverse_scale)) + zero_point, out.qmin, out.qmax).astype(
        out.dtype
    )


def int_requantize(x: Array, multiplier: Array, zero_point: Array, input_zero: Array, out: Output) -> Array:
    """One integer format into another: requantize(x - input_zero); all operands broadcast over x."""
    return requantize(x.astype(np.int32) - input_zero, multiplier, zero_point, out)


def int_dequantize(x: Array, scale: Array | float, zero_point: Array | int) -> Array:
    """``float32(x - zero_point) * scale``."""
    return (x.astype(np.int32) - zero_point).astype(np.float32) * np.asarray(scale, np.float32)


@dataclass(frozen=True)
class Partial:
    """Scales inside the sum of a linear layer: groups of input channels and/or rows with scales of their own.

    ``acc = bias + sum_g round(float32(dot_g + bias_g - zero_row * colsum_g) * multiplier_g *
    multiplier_row)`` with groups of K / G consecutive input channels.

    multiplier : float32 [G, N];  bias : int32 [G, N]
    row_multiplier : float32 [T] or None;  row_zero_point, int32 [T];  colsum : int32 [G, N] (sums of weight
    codes) T is the second to last axis of x.
    """

    multiplier: Array
    bias: Array
    row_multiplier: Array | None = None
    row_zero_point: Array | None = None
    colsum: Array | None = None


@dataclass(frozen=True)
class Multiples:
    """Scales inside the sum of a linear layer that are whole multiples of one step per output channel.

    ``acc = bias + sum_g count_g * dot_g`` in int32, with groups of K / G consecutive input channels: nothing
    is rounded.

    count : int16 [G, N]
    """

    count: Array


def inner_scales(operands: Sequence[Array]) -> Partial | Multiples | None:
    """What the further operands of an integer linear layer say about scales inside its sum."""
    if not operands:
        return None
    return Multiples(*operands) if len(operands) == 1 else Partial(*operands)


def int_linear(
    x: Array,
    weight: Array,
    bias: Array,
    multiplier: Array,
    zero_point: Array | int,
    out: Output,
    inner: Partial | Multiples | None = None,
) -> Array:
    """Linear layer on codes.

    x : int8 [..., K];  weight : int8 [N, K];  bias : int32 [N] with the zero point of x folded in,
    ``bias_q - zero_x * sum_k weight``;  multiplier : float32 [N] or [1];  zero_point : int32 [N], [1] or a
    number;  inner : scales inside the sum. Returns [..., N] of ``out.dtype``.
    """
    if inner is None:
        return requantize(integer_matmul(x, weight.T) + bias, multiplier, zero_point, out)
    groups = len(inner.count if isinstance(inner, Multiples) else inner.multiplier)
    width = x.shape[-1] // groups
    acc = np.broadcast_to(bias, (*x.shape[:-1], len(bias))).astype(np.int32)
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        dot = integer_matmul(x[..., part], weight[:, part].T)
        if isinstance(inner, Multiples):
            acc = acc + inner.count[g].astype(np.int32) * dot
            continue
        dot = dot + inner.bias[g]
        if inner.row_zero_point is not None and inner.colsum is not None:
            dot = dot - inner.row_zero_point[:, None] * inner.colsum[g]
        scaled = dot.astype(np.float32) * inner.multiplier[g]
        if inner.row_multiplier is not None:
            scaled = scaled * inner.row_multiplier[:, None]
        acc = acc + np.rint(np.clip(scaled, np.float32(-WIDE_MAX), np.float32(WIDE_MAX))).astype(np.int32)
    return requantize(acc, multiplier, zero_point, out)


def int_lookup(index: Array, table: Array) -> Array:
    """``table[index]``: any scalar function followed by any quantizer, tabulated over 2**INDEX_BITS
    arguments.
    """
    return table[index]


def int_add(a: Array, b: Array) -> Array:
    """``a + b`` of wide tensors of the same unit, saturating at +-WIDE_MAX."""
    return np.clip(a.astype(np.int32) + b, -WIDE_MAX, WIDE_MAX).astype(np.int32)


def int_multiply(a: Array, b: Array, multiplier: Array, zero_point: Array | int, out: Output) -> Array:
    """``a * b`` requantized; both are within +-32767, so that the product fits int32."""
    return requantize(a.astype(np.int32) * b.astype(np.int32), multiplier, zero_point, out)


def int_mean(x: Array, axis: int) -> Array:
    """Mean of a wide tensor over `axis`, rounded half up, in the same unit."""
    count = x.shape[axis]
    total = x.astype(np.int64).sum(axis)
    return ((2 * total + count) // (2 * count)).astype(np.int32)


def bit_length(x: Array) -> Array:
    """Bits of positive int64 values: floor(log2(x)) + 1."""
    x = x.astype(np.int64).copy()
    length = np.zeros_like(x)
    for step in (32, 16, 8, 4, 2, 1):
        high = x >> step
        bigger = high > 0
        length += np.where(bigger, step, 0)
        x = np.where(bigger, high, x)
    return length + 1


RSQRT_SEED = (round((7 / 6 - 0.0633) * 2**30), round(2**30 / 6))
"""Line a - v * b through 1/sqrt(v) on [1, 4), in 2**-30: the chord, lowered by half of its largest error."""

RSQRT_STEPS = 4
"""Newton steps: the seed's relative error 0.127 becomes 0.024, 9e-4, 1.2e-6 and then the rounding of 30
bits.
"""


def int_rsqrt(v: Array) -> tuple[Array, Array]:
    """``1 / sqrt(v)`` of positive int64 values as ``y * 2**-30 * 2**-s``; y int64 in [2**29, 2**30], s int64.

    With ``v = m * 4**s`` and ``m = n * 2**-28`` in [1, 4), Newton's iteration ``y <- y (3 - m y**2) / 2``
    runs on 30-bit integers; every product stays below 2**62. n keeps 29 or 30 bits of v (lower ones are cut
    off).
    """
    s = (bit_length(v) - 1) >> 1
    shift = 2 * s - 28
    n = np.where(shift >= 0, v >> np.maximum(shift, 0), v << np.maximum(-shift, 0))
    a, b = RSQRT_SEED
    y = a - ((n * b) >> 28)
    for _ in range(RSQRT_STEPS):
        square = (y * y) >> 30
        y = (y * (3 * 2**30 - ((n * square) >> 28))) >> 31
    return y, s


def norm_factor(channels: int) -> np.float32:
    """``sqrt(C) * 2**(NORM_BITS - 30)``: turns the 30-bit reciprocal root of sum(d**2) into that of the
    variance.
    """
    return np.float32(math.sqrt(channels) * 2.0 ** (NORM_BITS - 30))


def int_layer_norm(x: Array, gain: Array, offset: Array, *, shift: int, epsilon: int, out: Output) -> Array:
    """LayerNorm over the last axis of a wide tensor, with affine and output conversion.

    ``mean = floor((2 sum x + C) / 2C)``; ``d = x - mean``; ``V = sum d**2 + epsilon`` (int64);
    ``r = (float32(y) * norm_factor) * 2**-s`` with ``(y, s) = int_rsqrt(V)``;
    ``n = clip(round(float32(d) * r), +-NORM_MAX)``, the normalized value in 2**-NORM_BITS;
    result ``clip((n * gain + offset) >> shift, qmin, qmax)``.

    gain, offset : int32 [C]; offset holds beta, the zero point and the half that makes the shift round.
    epsilon : ``round(C * eps / unit**2)``, at least 1. ``NORM_MAX * |gain| + |offset| < 2**31`` is the
        caller's proof.
    """
    channels = x.shape[-1]
    total = x.astype(np.int64).sum(-1, keepdims=True)
    mean = (2 * total + channels) // (2 * channels)
    d = x.astype(np.int64) - mean
    y, s = int_rsqrt((d * d).sum(-1, keepdims=True) + epsilon)
    power = ((127 - s) << 23).astype(np.int32).view(np.float32)
    r = (y.astype(np.float32) * norm_factor(channels)) * power
    limit = np.float32(NORM_MAX)
    n = np.rint(np.clip(d.astype(np.float32) * r, -limit, limit)).astype(np.int32)
    return np.clip((n * gain + offset) >> shift, out.qmin, out.qmax).astype(out.dtype)
