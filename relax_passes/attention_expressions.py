"""Attention between its two matrix products as tensor expressions, for targets that multiply elsewhere.

``t = int_scores(q k.T)``, ``p = int_probabilities(t)``, bytes ``int_byte(p)``, ``int_values(their sums)``:
together numerics_attention.int_attention, on the sums of products and on the codes that zero points need.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx
from tvm.ir import Expr

from tvm_vitq.numerics import WIDE_MAX
from tvm_vitq.numerics_attention import (
    DISTANCE_MAX,
    EXP2_COEFFICIENTS,
    EXP_BITS,
    LOG2_COEFFICIENTS,
    SCORE_BITS,
    SIGMOID_BITS,
    SIGMOID_SHIFT,
)
from tvm_vitq.relax_passes.lower_elementwise import clip, round_to_int32

BYTE_OFFSET = 128
"""What bytes of p lose to fit int8."""

NEGATED_MAX = 2**15 + 128
"""Largest p of which ``-p`` is two signed bytes, ``256 h + l``: powers of two down from 2**15 among them."""


def _int(value: int) -> Expr:
    return tirx.const(value, "int32")


def _wide(value: Expr) -> Expr:
    return tirx.Cast("int32", value)


def _row(tensor: te.Tensor, element: Any, reduce: Any, name: str) -> te.Tensor:
    """A reduction over the last axis."""
    k = te.reduce_axis((0, tensor.shape[-1]), name=f"{name}_k")
    return te.compute(tensor.shape[:-1], lambda *i: reduce(element(*i, k), axis=k), name=name)


def int_scores(
    info: dict[str, Any],
    acc: te.Tensor,
    codes: te.Tensor,
    multiplier: te.Tensor,
    zero_q: te.Tensor,
    zero_k: te.Tensor,
    *additive: te.Tensor,
) -> te.Tensor:
    """Base-2 scores int32 [B, H, T, T].

    info["shape"] : B, H, T and the channels D of a head.
    acc : int32, of q k.T, as many elements;  codes : int8 [B, T, 2 H W], those of q and of k, W >= D with 0
    behind D.
    multiplier : float32 [H];  zero_q, zero_k : int32 [H];  additive : int32, each broadcast over the result.
    """
    batch, heads, tokens, width = info["shape"]
    wide = int(codes.shape[-1]) // (2 * heads)
    k = te.reduce_axis((0, width), name="k")
    total = te.compute(
        (batch, tokens, 2 * heads),
        lambda b, t, h: te.sum(_wide(codes[b, t, h * wide + k]), axis=k),
        name="code_sums",
    )

    def element(b: Expr, h: Expr, i: Expr, j: Expr) -> Expr:
        centred = acc[b * heads + h, i, j] - zero_q[h] * total[b, j, heads + h] - zero_k[h] * total[b, i, h]
        centred = centred + _int(width) * zero_q[h] * zero_k[h]
        limit = float(WIDE_MAX)
        score = round_to_int32(clip(tirx.Cast("float32", centred) * multiplier[h], -limit, limit, "float32"))
        for term in additive:
            score = score + term(*_broadcast(term, (b, h, i, j)))
        return score

    return te.compute((batch, heads, tokens, tokens), element, name="int_scores")


def _broadcast(term: te.Tensor, index: tuple[Expr, ...]) -> list[Expr]:
    own = index[len(index) - len(term.shape) :]
    return [_int(0) if int(size) == 1 else at for size, at in zip(term.shape, own, strict=True)]


def int_exp2(d: Expr, guard: int) -> Expr:
    """numerics_attention.int_exp2."""
    c0, c1, c2, c3 = (_int(c) for c in EXP2_COEFFICIENTS)
    bits = _int(SCORE_BITS)
    f = d & _int(2**SCORE_BITS - 1)
    e = c2 - ((f * c3) >> bits)
    e = c1 - ((f * e) >> bits)
    e = c0 - ((f * e) >> bits)
    return (e << _int(guard)) >> tirx.min(d >> bits, _int(31))


def int_log2(x: Expr) -> Expr:
    """numerics_attention.int_log2."""
    bits = tirx.reinterpret("int32", tirx.Cast("float32", x))
    line = (bits >> _int(7)) - _int(127 << 16)
    f = line & _int(0xFFFF)
    c0, c1, c2, c3 = (_int(c) for c in LOG2_COEFFICIENTS)
    sixteen = _int(16)
    c = c2 - ((f * c3) >> sixteen)
    c = c1 - ((f * c) >> sixteen)
    c = c0 - ((f * c) >> sixteen)
    arch = (((f * (_int(1 << 16) - f)) >> sixteen) * c) >> _int(15)
    return (line + arch + _int(1 << (15 - SCORE_BITS))) >> _int(16 - SCORE_BITS)


def int_probabilities(info: dict[str, Any], t: te.Tensor, *tables: te.Tensor) -> te.Tensor:
    """Codes of p of scores [B, H, T, T]: uint8, of a codebook uint16. `tables` are those of the quantizer."""
    kind, dtype = info["probs"], info["out_dtype"]
    if kind == "sigmoid":
        half = 2 ** (SIGMOID_BITS - 1)

        def entry(*i: Expr) -> Expr:
            index = (t(*i) + _int(1 << (SIGMOID_SHIFT - 1))) >> _int(SIGMOID_SHIFT)
            return tables[0][clip(index, -half, half - 1, "int32") + _int(half)]

        return te.compute(t.shape, entry, name="int_probabilities")
    highest = _row(t, t, te.max, "highest")
    distance = te.compute(t.shape, lambda *i: highest(*i[:-1]) - t(*i), name="distance")
    if kind == "codebook":
        return _codebook(info, distance, *tables)
    shift, half = _int(info["shift"]), _int(1 << (info["shift"] - 1))
    if kind == "row_maximum":
        factor = _int(info["prob_max"] << (info["shift"] - EXP_BITS))
        return te.compute(
            t.shape,
            lambda *i: tirx.Cast(dtype, (int_exp2(distance(*i), 0) * factor + half) >> shift),
            name="int_probabilities",
        )
    guard = info["guard"]
    total = _row(distance, lambda *i: int_exp2(distance(*i), guard), te.sum, "total")

    def quantized(*i: Expr) -> Expr:
        factor = tirx.truncdiv(_int(info["numerator"]), total(*i[:-1]) >> _int(guard))
        p = ((int_exp2(distance(*i), guard) >> _int(guard)) * factor + half) >> shift
        return tirx.Cast(dtype, tirx.min(p, _int(info["prob_max"])))

    return te.compute(t.shape, quantized, name="int_probabilities")


def _codebook(info: dict[str, Any], distance: te.Tensor, edges: te.Tensor, values: te.Tensor) -> te.Tensor:
    most, guard = _int(DISTANCE_MAX), info["guard"]
    if info.get("relative"):
        y = te.compute(distance.shape, lambda *i: tirx.min(distance(*i), most), name="y")
    else:
        total = _row(distance, lambda *i: int_exp2(distance(*i), guard), te.sum, "total")
        fraction = _int((EXP_BITS + guard) << SCORE_BITS)
        log_sum = te.compute(total.shape, lambda *i: int_log2(total(*i)) - fraction, name="log_sum")

        def far(*i: Expr) -> Expr:
            return tirx.min(distance(*i), most - log_sum(*i[:-1])) + log_sum(*i[:-1])

        y = te.compute(distance.shape, far, name="y")
    k = te.reduce_axis((0, edges.shape[0]), name="edge")
    above = te.compute(y.shape, lambda *i: te.sum(tirx.Cast("int32", edges[k] > y(*i)), axis=k), name="above")
    return te.compute(y.shape, lambda *i: values[above(*i)], name="int_probabilities")


def int_byte(info: dict[str, Any], p: te.Tensor) -> te.Tensor:
    """A byte of p as int8, less BYTE_OFFSET: `byte` 0 is the lowest. If `negated`, a digit of ``-p``: the
    low one is -128 to 127 and the high one has the sign.
    """
    byte, offset = info["byte"], _int(BYTE_OFFSET)

    def element(*i: Expr) -> Expr:
        value = offset - _wide(p(*i)) if info["negated"] else _wide(p(*i))
        if info["negated"] and byte:
            return tirx.Cast("int8", value >> _int(8))
        return tirx.Cast("int8", ((value >> _int(8 * byte)) & _int(255)) - offset)

    return te.compute(p.shape, element, name="int_byte")


def int_row_terms(info: dict[str, Any], p: te.Tensor, zero_v: te.Tensor, constant: te.Tensor) -> te.Tensor:
    """``zero_v sum(p) + constant`` of each row, int32 [B * H, T].

    p : [B, H, T, T];  zero_v, constant : int32 [H].
    """
    batch, heads, tokens, _ = (int(size) for size in p.shape)
    p_sum = _row(p, lambda *i: _wide(p(*i)), te.sum, "p_sum")

    def element(n: Expr, t: Expr) -> Expr:
        h = tirx.floormod(n, _int(heads))
        return zero_v[h] * p_sum[tirx.floordiv(n, _int(heads)), h, t] + constant[h]

    return te.compute((batch * heads, tokens), element, name="int_row_terms")


def int_values(
    info: dict[str, Any],
    acc: te.Tensor,
    p: te.Tensor,
    multiplier: te.Tensor,
    zero_v: te.Tensor,
    zero_point: te.Tensor,
    *codes: te.Tensor,
) -> te.Tensor:
    """Result of attention, [B, T, H D] of the operator's dtype.

    acc : int32 [B, T, H W], W >= D, sums of (p - offset) v, `offset` that of all bytes; if `negated`, of
    -p v.
    p : [B, H, T, T];  multiplier : float32 [H], or int32 shifts of a shift plan;
    zero_v, zero_point : int32 [H];  codes : int8 [B, H W, T] of v, where an offset or p's zero needs them.
    """
    batch, heads, tokens, width = info["shape"]
    wide = int(acc.shape[-1]) // heads
    p_sum = _row(p, lambda *i: _wide(p(*i)), te.sum, "p_sum")
    v_sums = [_row(v, lambda *i, v=v: _wide(v(*i)), te.sum, "v_sum") for v in codes]
    prob_zero = info.get("prob_zero", 0)

    def element(b: Expr, t: Expr, c: Expr) -> Expr:
        h = tirx.floordiv(c, _int(width))
        at = h * _int(wide) + tirx.floormod(c, _int(width))
        row = p_sum[b, h, t] - _int(prob_zero * tokens)
        o = (-acc[b, t, at] if info["negated"] else acc[b, t, at]) - zero_v[h] * row
        for v_sum in v_sums:
            o = o + _int(info["offset"] - prob_zero) * v_sum[b, at]
        if info.get("kind") == "shift":
            exact = tirx.Cast("int64", o)
            s = tirx.Cast("int64", multiplier[h])
            one, zero = tirx.const(1, "int64"), tirx.const(0, "int64")
            half = tirx.Select(s > zero, one << tirx.max(s - one, zero), zero)
            rounded = tirx.Cast("int32", clip((exact + half) >> s, -WIDE_MAX, WIDE_MAX, "int64"))
        else:
            scale = multiplier[h]
            if info["by_row"]:
                scale = scale / tirx.Cast("float32", row)
            limit = float(WIDE_MAX)
            rounded = round_to_int32(clip(tirx.Cast("float32", o) * scale, -limit, limit, "float32"))
        return tirx.Cast(
            info["out_dtype"], clip(rounded + zero_point[h], info["qmin"], info["qmax"], "int32")
        )

    return te.compute((batch, tokens, heads * width), element, name="int_values")


ATTENTION_EXPRESSIONS = {
    f"vitq.{f.__name__}": f for f in (int_scores, int_probabilities, int_byte, int_row_terms, int_values)
}
