"""numerics.int_probabilities on the score tile of the attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm_vitq.numerics import EXP2_COEFFICIENTS, SCORE_BITS, SIGMOID_BITS, SIGMOID_SHIFT
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.tir import LANES, TB, Expr

if TYPE_CHECKING:
    from tvm_vitq.schedules.attention_body import AttentionBody

FAR = -(2**30)
"""Score of padding: its distance to any maximum fits int32 and its exponential is 0."""


def emit(body: AttentionBody) -> None:
    """Turns body.scores into body.probs, and body.row_term into -zero_v times the sum of probabilities.

    Each step runs over all rows of the tile before the next one starts, so that the reductions and the division at
    the end of a row overlap with the work on the next.
    """
    if body.spec.probs.kind == "sigmoid":
        _rows(body, lambda r: _sigmoid(body, r))
        return
    highest, factors = (tir.scratch(body.rows.large, t) for t in ("int32", "uint16"))
    _rows(body, lambda r: _maximum(body, r, highest))
    _rows(body, lambda r: _exponentials(body, r, highest, factors))
    _rows(body, lambda r: _quantize(body, r, factors))


def _rows(body: AttentionBody, step: Callable[[Expr], None]) -> None:
    with TB.serial(0, body.rows.large) as r:
        step(r)


def _vectors(body: AttentionBody, step: Callable[[Expr, int], None]) -> None:
    """Runs step(first column, valid lanes) over a row: a loop over whole vectors, then the last, partly valid one."""
    whole, rest = divmod(body.spec.tk, LANES)
    if whole:
        with TB.serial(0, whole) as i:
            step(tir.let(i * LANES), LANES)
    if rest:
        step(whole * LANES, rest)


def _maximum(body: AttentionBody, r: Expr, highest: Expr) -> None:
    top = tir.scratch(LANES, "int32")
    tir.store(top, tir.constant(FAR, "int32"), 0)

    def step(column: Expr, valid: int) -> None:
        at = r * body.spec.score_columns + column
        value = tir.load(body.scores, at)
        if valid < LANES:
            value = tir.let(tir.first_lanes(value, valid, FAR))
            tir.store(body.scores, value, at)
        tir.store(top, tir.maximum(tir.load(top, 0), value), 0)

    _vectors(body, step)
    tir.store(highest, tir.intrinsic("llvm.vector.reduce.smax", "int32", tir.load(top, 0)), r, 1)


def _exponentials(body: AttentionBody, r: Expr, highest: Expr, factors: Expr) -> None:
    """numerics.int_exp2 of a row, without its guard bits, and the factor that its sum (with them) gives."""
    probs = body.spec.probs
    total = tir.scratch(LANES, "int32")
    tir.store(total, tir.constant(0, "int32"), 0)
    top = tir.let(tir.splat(tir.load(highest, r, 1)))
    c0, c1, c2, c3 = (tir.constant(c, "int32") for c in EXP2_COEFFICIENTS)
    bits, guard = tir.constant(SCORE_BITS, "int32"), tir.constant(probs.guard, "int32")

    def step(column: Expr, valid: int) -> None:
        at = r * body.spec.score_columns + column
        d = tir.let(top - tir.load(body.scores, at))
        f = tir.let(d & tir.constant(2**SCORE_BITS - 1, "int32"))
        e = tir.let(c2 - ((f * c3) >> bits))
        e = tir.let(c1 - ((f * e) >> bits))
        e = c0 - ((f * e) >> bits)
        e = tir.let((e << guard) >> tir.minimum(d >> bits, tir.constant(31, "int32")))
        tir.store(body.exponentials, tir.cast(e >> guard, "uint16"), at)
        tir.store(total, tir.load(total, 0) + e, 0)

    _vectors(body, step)
    row_sum = tir.intrinsic("llvm.vector.reduce.add", "int32", tir.load(total, 0))
    divisor = row_sum >> tir.constant(probs.guard, "int32", 1)
    factor = TB.truncdiv(tir.constant(probs.numerator, "int32", 1), divisor)
    tir.store(factors, tir.cast(factor, "uint16", 1), r, 1)


def _quantize(body: AttentionBody, r: Expr, factors: Expr) -> None:
    """``min((e * factor + half) >> shift, qmax)`` in 16 bits.

    The largest exponential of a row is 2**EXP_BITS, therefore ``factor <= numerator >> EXP_BITS < 2**16`` and
    ``e * factor <= numerator < 2**31``; half is a multiple of 2**16, so that the low half of the product never counts.
    """
    probs = body.spec.probs
    total = tir.scratch(2 * LANES, "uint16")
    tir.store(total, tir.constant(0, "uint16", 2 * LANES), 0, 2 * LANES)
    for start, count, lanes in tir.pieces(body.spec.score_columns, 2 * LANES):
        factor = tir.let(tir.splat(tir.load(factors, r, 1), lanes))
        half, shift = (tir.constant(c, "uint16", lanes) for c in (1 << (probs.shift - 17), probs.shift - 16))
        with TB.serial(0, count) as i:
            column = tir.let(start + i * lanes)
            at = r * body.spec.score_columns + column
            p = (tir.multiply_high(tir.load(body.exponentials, at, lanes), factor, lanes) + half) >> shift
            if (probs.numerator + (1 << (probs.shift - 1))) >> probs.shift > probs.qmax:
                p = tir.minimum(p, tir.constant(probs.qmax, "uint16", lanes))
            p = tir.let(p)
            tir.store(body.probs, body.isa.convert_left(tir.cast(p, "uint8", lanes), "uint8", lanes), at, lanes)
            tir.store(total, tir.load(total, 0, lanes) + p, 0, lanes)
    wide = tir.cast(tir.load(total, 0, 2 * LANES), "int32", 2 * LANES)
    _finish(body, r, wide)


def _finish(body: AttentionBody, r: Expr, total: Expr) -> None:
    p_sum = tir.intrinsic("llvm.vector.reduce.add", "int32", total)
    tir.store(body.row_term, tir.constant(0, "int32", 1) - body.zero[2] * p_sum, r, 1)


def _sigmoid(body: AttentionBody, r: Expr) -> None:
    """Table lookup of every score; the entries are gathered one by one."""
    half = 2 ** (SIGMOID_BITS - 1)
    index, entries, total = (tir.scratch(LANES, "int32") for _ in range(3))
    tir.store(total, tir.constant(0, "int32"), 0)

    def step(column: Expr, valid: int) -> None:
        at = r * body.spec.score_columns + column
        t = tir.load(body.scores, at) + tir.constant(1 << (SIGMOID_SHIFT - 1), "int32")
        t = tir.clip(t >> tir.constant(SIGMOID_SHIFT, "int32"), -half, half - 1, "int32")
        tir.store(index, t + tir.constant(half, "int32"), 0)
        with TB.serial(0, LANES) as i:
            entry = tir.cast(tir.load(body.b["table"], tir.load(index, i, 1), 1), "int32", 1)
            tir.store(entries, entry, i, 1)
        p = tir.let(tir.first_lanes(tir.load(entries, 0), valid, 0))
        tir.store(body.probs, body.isa.convert_left(tir.cast(p, "uint8"), "uint8", LANES), at)
        tir.store(total, tir.load(total, 0) + p, 0)

    _vectors(body, step)
    _finish(body, r, tir.load(total, 0))
