"""numerics_attention.int_probabilities on the score tile of the attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm_vitq.numerics_attention import (
    DISTANCE_MAX,
    EXP2_COEFFICIENTS,
    EXP_BITS,
    LOG2_COEFFICIENTS,
    SCORE_BITS,
    SIGMOID_BITS,
    SIGMOID_SHIFT,
    Probabilities,
)
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.codebook import HALF
from tvm_vitq.schedules.tir import LANES, TB, Expr

if TYPE_CHECKING:
    from tvm_vitq.schedules.attention_body import AttentionBody

FAR = -(2**30)
"""Score of padding: its distance to any maximum fits int32 and its exponential is 0."""


def emit(body: AttentionBody) -> None:
    """Turns body.scores into body.probs, and body.row_term into -zero_v times the sum of probabilities; of
    those relative to their row also body.row_scale into the multiplier of the head over that sum.

    Each step runs over all rows of the tile before the next one starts, so that the reductions and the
    division at the end of a row overlap with the work on the next.
    """
    probs = body.spec.probs
    if probs.kind == "sigmoid":
        _rows(body, lambda r: _sigmoid(body, r))
        return
    highest, factors = (tir.scratch(body.rows.large, "int32") for _ in range(2))
    _rows(body, lambda r: _maximum(body, r, highest))
    if not (probs.kind == "codebook" and probs.relative):
        _rows(body, lambda r: _exponentials(body, r, highest, factors))
    if probs.kind == "codebook":
        _rows(body, lambda r: _look_up(body, r, highest, factors))
    else:
        _rows(body, lambda r: _quantize(body, r, factors))


def _rows(body: AttentionBody, step: Callable[[Expr], None]) -> None:
    with TB.serial(0, body.rows.large) as r:
        step(r)


def _vectors(body: AttentionBody, step: Callable[[Expr, int], None]) -> None:
    """Runs step(first column, valid lanes) over a row: whole vectors in a loop, then the partly valid one."""
    whole, rest = divmod(body.spec.tk, LANES)
    if whole:
        with TB.serial(0, whole) as i:
            step(tir.let(i * LANES), LANES)
    if rest:
        step(whole * LANES, rest)


def _maximum(body: AttentionBody, r: Expr, highest: Expr) -> None:
    """The largest score of a row; what lies beyond the last key is set to FAR."""
    top = tir.scratch(LANES, "int32")
    tir.store(top, tir.constant(FAR, "int32"), 0)
    row = tir.let(r * body.stride)

    def step(column: Expr, valid: int) -> None:
        value = tir.load(body.scores, row + column)
        if valid < LANES:
            value = tir.let(tir.first_lanes(value, valid, FAR))
            tir.store(body.scores, value, row + column)
        tir.store(top, tir.maximum(tir.load(top, 0), value), 0)

    _vectors(body, step)
    for column in range(body.spec.score_columns, body.stride, LANES):
        tir.store(body.scores, tir.constant(FAR, "int32"), row + column)
    tir.store(highest, tir.intrinsic("llvm.vector.reduce.smax", "int32", tir.load(top, 0)), r, 1)


def _exponentials(body: AttentionBody, r: Expr, highest: Expr, factors: Expr) -> None:
    """int_exp2 of a row, without its guard bits, and what its sum (with them) gives: the factor of softmax,
    the logarithm for a codebook, which needs no more.

    The cubic runs in 16 bits, on 32 lanes: ``(f * x) >> SCORE_BITS`` is the high half of ``(f << 16 -
    SCORE_BITS) * x``. With its result c in the high half of a word, ``w = (c << 16) >> n`` holds both ``c >>
    n`` (its high half) and ``(c << guard) >> n = w >> (16 - guard)``.
    """
    probs = body.spec.probs
    summed = probs.kind != "row_maximum"
    total = tir.scratch(LANES, "uint32")
    tir.store(total, tir.constant(0, "uint32"), 0)
    top = tir.let(tir.splat(tir.load(highest, r, 1)))
    c0, c1, c2, c3 = (tir.constant(c, "uint16", 2 * LANES) for c in EXP2_COEFFICIENTS)
    spare = tir.constant(16 - SCORE_BITS, "uint16", 2 * LANES)
    bits, most, rest = tir.constant(SCORE_BITS, "int32"), tir.constant(31, "int32"), 16 - probs.guard
    with TB.serial(0, body.stride // (2 * LANES)) as i:
        at = tir.let(r * body.stride + i * (2 * LANES))
        d = [tir.let(top - tir.load(body.scores, at + half)) for half in (0, LANES)]
        f = tir.let(tir.halves(d, high=False) << spare)
        e = tir.let(c2 - tir.multiply_high(f, c3, 2 * LANES))
        e = tir.let(c1 - tir.multiply_high(f, e, 2 * LANES))
        e = tir.let(c0 - tir.multiply_high(f, e, 2 * LANES))
        n = [tir.cast(tir.minimum(v >> bits, most), "uint32") for v in d]
        words = [tir.let(word >> shift) for word, shift in zip(tir.high_words(e), n, strict=True)]
        if probs.kind != "codebook":
            tir.store(body.exponentials, tir.halves(words, high=True), at, 2 * LANES)
        for word in words if summed else []:
            tir.store(total, tir.load(total, 0) + (word >> tir.constant(rest, "uint32")), 0)
    if summed:
        row_sum = tir.let(tir.cast(tir.add_lanes(tir.load(total, 0), "uint32"), "int32", 1))
        tir.store(factors, (_factor if probs.kind == "softmax" else _log_sum)(probs, row_sum), r, 1)


def _factor(probs: Probabilities, row_sum: Expr) -> Expr:
    numerator = tir.constant(probs.numerator, "int32", 1)
    return TB.truncdiv(numerator, row_sum >> tir.constant(probs.guard, "int32", 1))


def _log_sum(probs: Probabilities, row_sum: Expr) -> Expr:
    """numerics_attention.int_log2 of the sum, less its fraction bits."""

    def shifted(value: Expr, bits: int) -> Expr:
        return tir.let(value >> tir.constant(bits, "int32", 1))

    bits = tir.reinterpret(tir.cast(row_sum, "float32", 1), "int32")
    line = tir.let(shifted(bits, 7) - ((127 + EXP_BITS + probs.guard) << 16))
    f = tir.let(line & tir.constant(0xFFFF, "int32", 1))
    c0, c1, c2, c3 = LOG2_COEFFICIENTS
    c = c2 - shifted(f * c3, 16)
    c = c1 - shifted(f * c, 16)
    c = c0 - shifted(f * c, 16)
    arch = shifted(shifted(f * ((1 << 16) - f), 16) * c, 15)
    return shifted(line + arch + (1 << (15 - SCORE_BITS)), 16 - SCORE_BITS)


def _look_up(body: AttentionBody, r: Expr, highest: Expr, log_sums: Expr) -> None:
    """p of a codebook: distances become int16, less 2**15, then p, then its bytes.

    What lies beyond the last key is farthest away; it counts in the sum and is taken out of it again.
    """
    spec, lanes = body.spec, 2 * LANES
    probs, size = spec.probs, body.rows.large * body.stride
    totals = [tir.scratch(lanes, "uint16") for _ in range(probs.planes)]
    for total in totals:
        tir.store(total, tir.constant(0, "uint16", lanes), 0, lanes)
    top = tir.let(tir.splat(tir.load(highest, r, 1)))
    log_sum = tir.constant(0, "int32", 1) if probs.relative else tir.let(tir.load(log_sums, r, 1))
    farthest = tir.let(tir.splat(tir.constant(DISTANCE_MAX, "int32", 1) - log_sum))
    offset = tir.let(tir.splat(tir.cast(log_sum + HALF, "uint16", 1), lanes))
    eight, low_byte = (tir.constant(c, "uint16", lanes) for c in (8, 255))
    with TB.serial(0, body.stride // lanes) as i:
        at = tir.let(r * body.stride + i * lanes)
        d = [tir.let(tir.minimum(top - tir.load(body.scores, at + half), farthest)) for half in (0, LANES)]
        p = tir.let(body.lookup(tir.reinterpret(tir.halves(d, high=False) + offset, f"int16x{lanes}")))
        parts = [p] if probs.planes == 1 else [p >> eight, p & low_byte]
        for part, total in zip(parts, totals, strict=True):
            tir.store(total, tir.load(total, 0, lanes) + part, 0, lanes)
        if body.planes < len(parts):
            parts = [p]
        for plane, part in enumerate(parts):
            value = tir.cast(part, body.left_source, lanes)
            left = body.isa.convert_left(value, body.left_source, lanes)
            tir.store(body.probs, left, plane * size + at, lanes)
    p_sum = tir.constant(0, "int32", 1)
    for total in totals:
        plane_sum = tir.add_lanes(tir.cast(tir.load(total, 0, lanes), "int32", lanes), "int32")
        p_sum = (p_sum << tir.constant(8, "int32", 1)) + plane_sum
    beyond = tir.cast(body.lookup.farthest(), "int32", 1) * (body.stride - spec.tk)
    _finish_row(body, r, tir.let(p_sum - beyond - body.zero[4] * spec.tk))


def _quantize(body: AttentionBody, r: Expr, factors: Expr) -> None:
    """``min((e * factor + half) >> shift, qmax)`` in 16 bits.

    The largest exponential of a row is 2**EXP_BITS, therefore ``factor <= numerator >> EXP_BITS < 2**16`` and
    ``e * factor <= numerator < 2**31``; half is a multiple of 2**16, so that the low half of the product
    never counts. The factor of row_maximum is a constant within the same bounds.
    """
    probs = body.spec.probs
    by_row = probs.kind == "row_maximum"
    lanes = 2 * LANES
    total = tir.scratch(lanes, "uint16")
    tir.store(total, tir.constant(0, "uint16", lanes), 0, lanes)
    constant = tir.constant(probs.factor, "int32", 1) if by_row else tir.load(factors, r, 1)
    factor = tir.let(tir.splat(tir.cast(constant, "uint16", 1), lanes))
    half, shift = (tir.constant(c, "uint16", lanes) for c in (1 << (probs.shift - 17), probs.shift - 16))
    with TB.serial(0, body.stride // lanes) as i:
        at = tir.let(r * body.stride + i * lanes)
        p = (tir.multiply_high(tir.load(body.exponentials, at, lanes), factor, lanes) + half) >> shift
        if not by_row and (probs.numerator + (1 << (probs.shift - 1))) >> probs.shift > probs.qmax:
            p = tir.minimum(p, tir.constant(probs.qmax, "uint16", lanes))
        p = tir.let(p)
        tir.store(body.probs, body.isa.convert_left(tir.cast(p, "uint8", lanes), "uint8", lanes), at, lanes)
        tir.store(total, tir.load(total, 0, lanes) + p, 0, lanes)
    _finish_row(body, r, tir.add_lanes(tir.cast(tir.load(total, 0, lanes), "int32", lanes), "int32"))


def _finish_row(body: AttentionBody, r: Expr, p_sum: Expr) -> None:
    tir.store(body.row_term, tir.constant(0, "int32", 1) - body.zero[2] * p_sum, r, 1)
    if body.spec.probs.by_row:
        tir.store(body.row_scale, body.multiplier / tir.cast(p_sum, "float32", 1), r, 1)


def _sigmoid(body: AttentionBody, r: Expr) -> None:
    """Table lookup of every score; the entries are gathered one by one."""
    half = 2 ** (SIGMOID_BITS - 1)
    index, entries, total = (tir.scratch(LANES, "int32") for _ in range(3))
    tir.store(total, tir.constant(0, "int32"), 0)

    def step(column: Expr, valid: int) -> None:
        at = r * body.stride + column
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
    _finish_row(body, r, tir.add_lanes(tir.load(total, 0), "int32"))
