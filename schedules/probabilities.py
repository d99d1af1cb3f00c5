"""numerics.int_probabilities on the score tile of the attention kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_vitq.numerics import EXP2_COEFFICIENTS, SCORE_BITS, SIGMOID_BITS, SIGMOID_SHIFT
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.tir import LANES, TB, Expr

if TYPE_CHECKING:
    from tvm_vitq.schedules.attention_body import AttentionBody

FAR = -(2**30)
"""Score of padding: its distance to any maximum fits int32 and its exponential is 0."""


def emit(body: AttentionBody, row: Expr) -> None:
    """Turns body.scores (sums of products) into body.probs and body.row_term (-zero_v * sum of probabilities).

    Each step runs over all rows of the tile before the next one starts, so that the reductions and the division at the
    end of a row overlap with the work on the next.
    """
    if body.spec.probs.kind == "sigmoid":
        with TB.serial(0, body.rows.large) as r:
            _sigmoid(body, row, r)
        return
    rows = body.rows.large
    highest, factors = tir.scratch(rows, "int32"), tir.scratch(rows, "int32")
    with TB.serial(0, rows) as r:
        _scores(body, row, r, highest)
    with TB.serial(0, rows) as r:
        _exponentials(body, r, highest, factors)
    with TB.serial(0, rows) as r:
        _quantize(body, r, factors)


def _vectors(body: AttentionBody, step: object) -> None:
    """Runs step(first column, valid lanes) over a row: a loop over whole vectors, then the last, partly valid one."""
    whole, rest = divmod(body.spec.tk, LANES)
    if whole:
        with TB.serial(0, whole) as i:
            step(tir.let(i * LANES), LANES)  # type: ignore[operator]
    if rest:
        step(whole * LANES, rest)  # type: ignore[operator]


def _score(body: AttentionBody, row: Expr, r: Expr, column: Expr) -> Expr:
    """Base-2 scores of 16 keys: correction by the zero points, scale, additive terms."""
    at = r * body.spec.score_columns + column
    value = tir.load(body.scores, at) + tir.load(body.key_correction, column)
    value = value + tir.splat(tir.load(body.row_term, r, 1))
    value = tir.round_multiply(value, tir.splat(body.score_multiplier))
    for i, (images, heads, rows) in enumerate(body.spec.additive):
        image = 0 if images == 1 else tir.TB.floormod(body.image, images)
        where = [image, 0 if heads == 1 else body.head, 0 if rows == 1 else row + r, column]
        value = value + tir.load(body.b[f"additive{i}"], where)
    return value


def _scores(body: AttentionBody, row: Expr, r: Expr, highest: Expr) -> None:
    top = tir.scratch(LANES, "int32")
    tir.store(top, tir.constant(FAR, "int32"), 0)

    def step(column: Expr, valid: int) -> None:
        value = tir.let(tir.first_lanes(_score(body, row, r, column), valid, FAR))
        tir.store(body.scores, value, r * body.spec.score_columns + column)
        tir.store(top, tir.maximum(tir.load(top, 0), value), 0)

    _vectors(body, step)
    tir.store(highest, tir.intrinsic("llvm.vector.reduce.smax", "int32", tir.load(top, 0)), r, 1)


def _exponentials(body: AttentionBody, r: Expr, highest: Expr, factors: Expr) -> None:
    """numerics.int_exp2 in place, its sum, and the factor that the sum gives."""
    probs = body.spec.probs
    total = tir.scratch(LANES, "int32")
    tir.store(total, tir.constant(0, "int32"), 0)
    top = tir.let(tir.splat(tir.load(highest, r, 1)))
    c0, c1, c2, c3 = (tir.constant(c, "int32") for c in EXP2_COEFFICIENTS)
    bits = tir.constant(SCORE_BITS, "int32")

    def step(column: Expr, valid: int) -> None:
        at = r * body.spec.score_columns + column
        d = tir.let(top - tir.load(body.scores, at))
        f = tir.let(d & tir.constant(2**SCORE_BITS - 1, "int32"))
        e = tir.let(c2 - ((f * c3) >> bits))
        e = tir.let(c1 - ((f * e) >> bits))
        e = c0 - ((f * e) >> bits)
        halvings = tir.minimum(d >> bits, tir.constant(31, "int32"))
        e = tir.let((e << tir.constant(probs.guard, "int32")) >> halvings)
        tir.store(body.scores, e, at)
        tir.store(total, tir.load(total, 0) + e, 0)

    _vectors(body, step)
    sum_of_row = tir.intrinsic("llvm.vector.reduce.add", "int32", tir.load(total, 0))
    divisor = sum_of_row >> tir.constant(probs.guard, "int32", 1)
    tir.store(factors, tir.TB.truncdiv(tir.constant(probs.numerator, "int32", 1), divisor), r, 1)


def _quantize(body: AttentionBody, r: Expr, factors: Expr) -> None:
    probs = body.spec.probs
    factor = tir.let(tir.splat(tir.load(factors, r, 1)))
    half, shift = tir.constant(1 << (probs.shift - 1), "int32"), tir.constant(probs.shift, "int32")
    total = tir.scratch(LANES, "int32")
    tir.store(total, tir.constant(0, "int32"), 0)

    def step(column: Expr, valid: int) -> None:
        e = tir.load(body.scores, r * body.spec.score_columns + column) >> tir.constant(probs.guard, "int32")
        p = tir.let(tir.minimum((e * factor + half) >> shift, tir.constant(probs.qmax, "int32")))
        _store(body, r, column, p, total)

    _vectors(body, step)
    _finish(body, r, total)


def _store(body: AttentionBody, r: Expr, column: Expr, p: Expr, total: Expr) -> None:
    codes = body.isa.convert_left(tir.cast(p, "uint8"), "uint8", LANES)
    tir.store(body.probs, codes, r * body.spec.score_columns + column)
    tir.store(total, tir.load(total, 0) + p, 0)


def _finish(body: AttentionBody, r: Expr, total: Expr) -> None:
    p_sum = tir.intrinsic("llvm.vector.reduce.add", "int32", tir.load(total, 0))
    tir.store(body.row_term, tir.constant(0, "int32", 1) - body.zero[2] * p_sum, r, 1)


def _sigmoid(body: AttentionBody, row: Expr, r: Expr) -> None:
    """Table lookup of every score; the entries are gathered one by one."""
    half = 2 ** (SIGMOID_BITS - 1)
    index, entries = tir.scratch(LANES, "int32"), tir.scratch(LANES, "int32")
    total = tir.scratch(LANES, "int32")
    tir.store(total, tir.constant(0, "int32"), 0)

    def step(column: Expr, valid: int) -> None:
        t = _score(body, row, r, column) + tir.constant(1 << (SIGMOID_SHIFT - 1), "int32")
        t = tir.clip(t >> tir.constant(SIGMOID_SHIFT, "int32"), -half, half - 1, "int32")
        tir.store(index, t + tir.constant(half, "int32"), 0)
        with TB.serial(0, LANES) as i:
            entry = tir.cast(tir.load(body.b["table"], tir.load(index, i, 1), 1), "int32", 1)
            tir.store(entries, entry, i, 1)
        _store(body, r, column, tir.let(tir.first_lanes(tir.load(entries, 0), valid, 0)), total)

    _vectors(body, step)
    _finish(body, r, total)
