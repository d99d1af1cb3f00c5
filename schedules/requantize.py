"""numerics.requantize on vectors: the output conversion that ends every integer kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm_vitq.numerics import WIDE_MAX, Output
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.tir import LANES, Expr

ZERO_POINTS = ("none", "scalar", "vector")
"""Zero point of an output: 0, one number, or one per column."""

SaturatingRint = Callable[[Expr, int], Expr]
"""float32 lanes and their number -> int32 lanes, ties to even, with saturation."""


@dataclass(frozen=True)
class Zero:
    """A zero point as lanes, with the bounds that make one clip of the float value do both clips of numerics.

    ``clip(rint(clip(x, +-WIDE_MAX)) + zero, qmin, qmax) == rint(clip(x, low, high)) + zero`` with
    ``low = max(qmin - zero, -WIDE_MAX)`` and high alike: rounding is monotone and leaves the integers low and
    high as they are. float32 holds both exactly. Requires |zero| <= 2**23.

    Where float32 is converted to int32 with saturation, the clip comes after it, on integers: low and high
    are then int32 lanes.
    """

    value: Expr | None
    low: Expr
    high: Expr
    saturating_rint: SaturatingRint | None = None


def zero_lanes(
    zero: Expr | None, out: Output, lanes: int = LANES, saturating_rint: SaturatingRint | None = None
) -> Zero:
    """Prepares a zero point (int32 lanes, None for 0); evaluate once per column, not per row."""
    if zero is None:
        low, high = max(out.qmin, -WIDE_MAX), min(out.qmax, WIDE_MAX)
        if saturating_rint:
            lowest, highest = (tir.constant(bound, "int32", lanes) for bound in (low, high))
            return Zero(None, lowest, highest, saturating_rint)
        return Zero(
            None, tir.constant(float(low), "float32", lanes), tir.constant(float(high), "float32", lanes)
        )
    low = tir.maximum(tir.constant(out.qmin, "int32", lanes) - zero, tir.constant(-WIDE_MAX, "int32", lanes))
    high = tir.minimum(tir.constant(out.qmax, "int32", lanes) - zero, tir.constant(WIDE_MAX, "int32", lanes))
    if saturating_rint:
        return Zero(zero, tir.let(low), tir.let(high), saturating_rint)
    return Zero(zero, tir.let(tir.cast(low, "float32", lanes)), tir.let(tir.cast(high, "float32", lanes)))


def round_shift(value: Expr, shift: Expr, lanes: int = LANES) -> Expr:
    """numerics.round_shift without its clip: ``(value + half) >> shift`` with no overflow in int32.

    With ``t = value >> (shift - 1)`` that is ``(t >> 1) + (t & 1)``; a shift of 0 takes ``t = value`` and
    adds nothing.
    """
    one = tir.let(tir.minimum(shift, tir.constant(1, "int32", lanes)))
    t = tir.let(value >> (shift - one))
    return (t >> one) + (t & one)


def requantize(value: Expr, multiplier: Expr, zero: Zero, out: Output, lanes: int = LANES) -> Expr:
    """int32 lanes within [qmin, qmax], or float32 lanes; `multiplier` as from packing.pack_multiplier."""
    if out.dtype == "float32":
        return tir.cast(value, "float32", lanes) * multiplier
    if out.kind == "shift":
        rounded = tir.clip(round_shift(value, multiplier, lanes), -WIDE_MAX, WIDE_MAX, "int32", lanes)
        if zero.value is not None:
            rounded = rounded + zero.value
        return tir.clip(rounded, out.qmin, out.qmax, "int32", lanes)
    scaled = tir.cast(value, "float32", lanes) * multiplier
    if zero.saturating_rint:
        rounded = tir.minimum(tir.maximum(zero.saturating_rint(scaled, lanes), zero.low), zero.high)
    else:
        rounded = tir.rint(tir.minimum(tir.maximum(scaled, zero.low), zero.high), lanes)
    return rounded if zero.value is None else rounded + zero.value
