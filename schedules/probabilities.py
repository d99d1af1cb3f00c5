"""numerics_attention.int_probabilities on the score tile of the attention kernel."""

from __future__ import annotations

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
from tvm_vitq.schedules.score_passes import WIDTH, Pass
from tvm_vitq.schedules.tir import LANES, TB, Expr

if TYPE_CHECKING:
    from tvm_vitq.schedules.attention_body import AttentionBody


def passes(body: AttentionBody) -> list[Pass]:
    """The passes that turn body.scores, with their maxima in body.highest, into body.probs, body.row_term
    (-zero_v times the sum of probabilities) and body.row_scale (for probabilities relative to their row: the
    multiplier of the head over that sum).
    """
    probs = body.spec.probs
    kinds: dict[str, list[type[Pass]]] = {
        "sigmoid": [Sigmoid],
        "row_maximum": [RowMaximum],
        "softmax": [Exponentials, Quantize],
        "codebook": [LookUp] if probs.relative else [LogSum, LookUp],
    }
    return [kind(body) for kind in kinds[probs.kind]]


def exp2_fraction(d: Expr) -> Expr:
    """``2**(EXP_BITS - f)`` of the fraction f of WIDTH distances, of which `d` is the low halves.

    The cubic runs in 16 bits: ``(f * x) >> SCORE_BITS`` is the high half of ``(f << 16 - SCORE_BITS) * x``.
    """
    c0, c1, c2, c3 = (tir.constant(c, "uint16", WIDTH) for c in EXP2_COEFFICIENTS)
    f = tir.let(d << tir.constant(16 - SCORE_BITS, "uint16", WIDTH))
    e = tir.let(c2 - tir.multiply_high(f, c3, WIDTH))
    e = tir.let(c1 - tir.multiply_high(f, e, WIDTH))
    return tir.let(c0 - tir.multiply_high(f, e, WIDTH))


def shifted_words(words: list[Expr], d: list[Expr]) -> list[Expr]:
    """``word >> n``, n the bits of the distances d above the fraction."""
    result = []
    for word, distance in zip(words, d, strict=True):
        n = tir.let(tir.cast(distance >> tir.constant(SCORE_BITS, "int32"), "uint32"))
        inside = n < tir.constant(32, "uint32")
        result.append(tir.let(tir.select(inside, word >> n, tir.constant(0, "uint32"))))
    return result


def quantized(e: Expr, factor: Expr, shift: int) -> Expr:
    """``(e * factor + half) >> shift`` in 16 bits.

    The largest exponential of a row is 2**EXP_BITS, therefore ``factor <= numerator >> EXP_BITS < 2**16`` and
    ``e * factor <= numerator < 2**31``; half is a multiple of 2**16, so that the low half of the product
    never counts. The factor of row_maximum is a constant within the same bounds.
    """
    half, rest = (tir.constant(c, "uint16", WIDTH) for c in (1 << (shift - 17), shift - 16))
    return (tir.multiply_high(e, factor, WIDTH) + half) >> rest


class RowMaximum(Pass):
    """int_exp2 and its quantization at once. Distances beyond DISTANCE_MAX become DISTANCE_MAX, whose
    exponential is 0 as theirs.
    """

    totals = ("uint16",)

    def step(self, r: Expr, at: Expr) -> None:
        most = tir.constant(DISTANCE_MAX, "int32")
        d = [tir.minimum(v, most) for v in self.distances(r, at)]
        d = tir.let(tir.halves(d, high=False))
        e = exp2_fraction(d) >> (d >> tir.constant(SCORE_BITS, "uint16", WIDTH))
        p = tir.let(quantized(e, tir.constant(self.probs.factor, "uint16", WIDTH), self.probs.shift))
        self.body.store_probs([p], at)
        self.add(0, r, p)

    def end_row(self, r: Expr) -> None:
        self.finish_row(r, self.total(0, r))


class Exponentials(Pass):
    """int_exp2 without its guard bits, and the factor that its sum (with them) gives.

    With the result c of the cubic in the high half of a word, ``w = (c << 16) >> n`` holds both ``c >> n``
    (its high half) and ``(c << guard) >> n = w >> (16 - guard)``.
    """

    totals = ("uint32",)

    def step(self, r: Expr, at: Expr) -> None:
        d = self.distances(r, at)
        c = exp2_fraction(tir.halves(d, high=False))
        words = shifted_words(tir.high_words(c), d)
        tir.store(self.body.exponentials, tir.halves(words, high=True), at, WIDTH)
        rest = tir.constant(16 - self.probs.guard, "uint32")
        self.add(0, r, (words[0] >> rest) + (words[1] >> rest))

    def end_row(self, r: Expr) -> None:
        row_sum = tir.cast(self.total(0, r, "uint32"), "int32", 1)
        numerator = tir.constant(self.probs.numerator, "int32", 1)
        factor = TB.truncdiv(numerator, row_sum >> tir.constant(self.probs.guard, "int32", 1))
        tir.store(self.body.factors, factor, r, 1)


class Quantize(Pass):
    """p of the exponentials of a row, whose factor is known."""

    totals = ("uint16",)

    def step(self, r: Expr, at: Expr) -> None:
        probs = self.probs
        factor = tir.splat(tir.cast(tir.load(self.body.factors, r, 1), "uint16", 1), WIDTH)
        p = quantized(tir.load(self.body.exponentials, at, WIDTH), factor, probs.shift)
        if (probs.numerator + (1 << (probs.shift - 1))) >> probs.shift > probs.qmax:
            p = tir.minimum(p, tir.constant(probs.qmax, "uint16", WIDTH))
        p = tir.let(p)
        self.body.store_probs([p], at)
        self.add(0, r, p)

    def end_row(self, r: Expr) -> None:
        self.finish_row(r, self.total(0, r))


class LogSum(Pass):
    """int_log2 of the sum of exponentials, less the fraction bits of the sum.

    A term is ``(c << guard) >> n``, c the result of the cubic; as c stands in the high half of a word, this
    is ``(c << 16) >> (n + 16 - guard)``: distances are taken from a maximum that is larger by these bits.
    """

    totals = ("uint32",)

    def step(self, r: Expr, at: Expr) -> None:
        d = self.distances(r, at, (16 - self.probs.guard) << SCORE_BITS)
        # The order within the sum is free: both distances of a lane share a word, without shuffles.
        low = tir.constant(2**16 - 1, "int32")
        pairs = (d[0] & low) | (d[1] << tir.constant(16, "int32"))
        c = exp2_fraction(tir.reinterpret(pairs, f"uint16x{WIDTH}"))
        c = tir.let(tir.reinterpret(c, f"uint32x{LANES}"))
        words = [c << tir.constant(16, "uint32"), c & tir.constant(2**32 - 2**16, "uint32")]
        first, second = shifted_words(words, d)
        self.add(0, r, first + second)

    def end_row(self, r: Expr) -> None:
        row_sum = tir.cast(self.total(0, r, "uint32"), "int32", 1)
        tir.store(self.body.factors, _log_sum(self.probs, row_sum), r, 1)


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


class LookUp(Pass):
    """p of a codebook: distances become int16, less 2**15, then p, then its bytes.

    What lies beyond the last key is farthest away; it counts in the sum and is taken out of it again.
    """

    def __init__(self, body: AttentionBody) -> None:
        self.totals = ("uint16",) * body.spec.probs.planes
        super().__init__(body)

    def step(self, r: Expr, at: Expr) -> None:
        shift = tir.constant(0, "int32", 1) if self.probs.relative else tir.load(self.body.factors, r, 1)
        most = tir.constant(DISTANCE_MAX - HALF, "int32")
        d = [tir.minimum(v, most) for v in self.distances(r, at, shift - HALF)]
        p = tir.let(self.body.lookup(tir.reinterpret(tir.halves(d, high=False), f"int16x{WIDTH}")))
        eight, low_byte = (tir.constant(c, "uint16", WIDTH) for c in (8, 255))
        parts = [p] if self.probs.planes == 1 else [tir.let(p >> eight), tir.let(p & low_byte)]
        for i, part in enumerate(parts):
            self.add(i, r, part)
        self.body.store_probs(parts if self.body.planes == len(parts) else [p], at)

    def end_row(self, r: Expr) -> None:
        body = self.body
        p_sum = self.total(0, r)
        for i in range(1, self.probs.planes):
            p_sum = (p_sum << tir.constant(8, "int32", 1)) + self.total(i, r)
        beyond = tir.cast(body.lookup.farthest(), "int32", 1) * (body.stride - body.spec.tk)
        self.finish_row(r, tir.let(p_sum - beyond - body.zero[4] * body.spec.tk))


class Sigmoid(Pass):
    """Table lookup of every score; the entries are gathered one by one. Scores beyond the last key have the
    smallest index, whose entry is taken out of the sum again.
    """

    totals = ("uint16",)

    def __init__(self, body: AttentionBody) -> None:
        super().__init__(body)
        self.index, self.entries = tir.scratch(WIDTH, "int32"), tir.scratch(WIDTH, "uint16")

    def step(self, r: Expr, at: Expr) -> None:
        half = 2 ** (SIGMOID_BITS - 1)
        for part in (0, LANES):
            t = tir.load(self.body.scores, at + part) + tir.constant(1 << (SIGMOID_SHIFT - 1), "int32")
            t = tir.clip(t >> tir.constant(SIGMOID_SHIFT, "int32"), -half, half - 1, "int32")
            tir.store(self.index, t + tir.constant(half, "int32"), part)
        with TB.serial(0, WIDTH) as i:
            entry = tir.load(self.body.b["table"], tir.load(self.index, i, 1), 1)
            tir.store(self.entries, tir.cast(entry, "uint16", 1), i, 1)
        p = tir.let(tir.load(self.entries, 0, WIDTH))
        self.body.store_probs([p], at)
        self.add(0, r, p)

    def end_row(self, r: Expr) -> None:
        beyond = tir.cast(tir.load(self.body.b["table"], 0, 1), "int32", 1)
        self.finish_row(r, self.total(0, r) - beyond * (self.body.stride - self.body.spec.tk))
