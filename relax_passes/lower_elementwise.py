"""Elementwise integer operators as tensor expressions, so that TVM fuses them with each other and with data
movement.

Each function is the operator of the same name in tvm_vitq/numerics.py, one element at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import te, tirx
from tvm.ir import Call, Expr
from tvm.script import tirx as T

from tvm_vitq.graph import is_constant, value_of
from tvm_vitq.numerics import WIDE_MAX
from tvm_vitq.ops import attrs, op_name, shape_of

Operand = Any
"""A te.Tensor, or a number where a constant has one element."""


def round_to_int32(x: Expr) -> Expr:
    """float32 to int32, ties to even, in one instruction of every target."""
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id("llvm.lrint"), x, dtype="int32")


def clip(x: Expr, low: int | float, high: int | float, dtype: str) -> Expr:
    return tirx.max(tirx.min(x, tirx.const(high, dtype)), tirx.const(low, dtype))


def _at(operand: Operand, index: tuple[Expr, ...], dtype: str) -> Expr:
    """Element of an operand that broadcasts over the result."""
    if not isinstance(operand, te.Tensor):
        return tirx.const(operand, dtype)
    own = index[len(index) - len(operand.shape) :]
    return operand(*(0 if int(n) == 1 else i for n, i in zip(operand.shape, own, strict=True)))


def _round_multiply(value: Expr, multiplier: Expr) -> Expr:
    return round_to_int32(clip(tirx.Cast("float32", value) * multiplier, -WIDE_MAX, WIDE_MAX, "float32"))


def _round_shift(value: Expr, shift: Expr) -> Expr:
    """Half up; in 64 bits, as the sum with the half could leave int32."""
    wide, one, zero = tirx.Cast("int64", value), tirx.const(1, "int64"), tirx.const(0, "int64")
    half = tirx.Select(shift > zero, one << tirx.max(shift - one, zero), zero)
    return tirx.Cast("int32", clip((wide + half) >> shift, -WIDE_MAX, WIDE_MAX, "int64"))


def _shift(multiplier: Operand, index: tuple[Expr, ...]) -> Expr:
    """s of multipliers 2**-s: 127 less the exponent in the bits of a float32."""
    if not isinstance(multiplier, te.Tensor):
        return tirx.const(int(-np.log2(multiplier)), "int64")
    bits = tirx.reinterpret("int32", _at(multiplier, index, "float32"))
    return tirx.Cast("int64", tirx.const(127, "int32") - (bits >> tirx.const(23, "int32")))


def _requantized(
    value: Expr, multiplier: Operand, zero: Operand, info: dict[str, Any], index: tuple[Expr, ...]
) -> Expr:
    if info.get("kind") == "shift":
        rounded = _round_shift(value, _shift(multiplier, index))
    else:
        rounded = _round_multiply(value, _at(multiplier, index, "float32"))
    shifted = rounded + _at(zero, index, "int32")
    return tirx.Cast(info["out_dtype"], clip(shifted, info["qmin"], info["qmax"], "int32"))


def int_quantize(info: dict[str, Any], x: te.Tensor, inverse_scale: Operand, zero: Operand) -> te.Tensor:
    exact = {**info, "kind": "multiply"}
    return te.compute(
        x.shape, lambda *i: _requantized(x(*i), inverse_scale, zero, exact, i), name="int_quantize"
    )


def int_requantize(
    info: dict[str, Any], x: te.Tensor, multiplier: Operand, zero: Operand, input_zero: Operand
) -> te.Tensor:
    def element(*i: Expr) -> Expr:
        value = tirx.Cast("int32", x(*i)) - _at(input_zero, i, "int32")
        return _requantized(value, multiplier, zero, info, i)

    return te.compute(x.shape, element, name="int_requantize")


def int_dequantize(info: dict[str, Any], x: te.Tensor, scale: Operand, zero: Operand) -> te.Tensor:
    def element(*i: Expr) -> Expr:
        return tirx.Cast("float32", tirx.Cast("int32", x(*i)) - _at(zero, i, "int32")) * _at(
            scale, i, "float32"
        )

    return te.compute(x.shape, element, name="int_dequantize")


def int_lookup(info: dict[str, Any], x: te.Tensor, table: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: table(tirx.Cast("int32", x(*i))), name="int_lookup")


def int_add(info: dict[str, Any], a: Operand, b: Operand) -> te.Tensor:
    def element(*i: Expr) -> Expr:
        return clip(_at(a, i, "int32") + _at(b, i, "int32"), -WIDE_MAX, WIDE_MAX, "int32")

    return te.compute(info["shape"], element, name="int_add")


def int_multiply(
    info: dict[str, Any], a: te.Tensor, b: te.Tensor, multiplier: Operand, zero: Operand
) -> te.Tensor:
    def element(*i: Expr) -> Expr:
        product = tirx.Cast("int32", _at(a, i, "int32")) * tirx.Cast("int32", _at(b, i, "int32"))
        return _requantized(product, multiplier, zero, info, i)

    return te.compute(info["shape"], element, name="int_multiply")


def int_mean(info: dict[str, Any], x: te.Tensor) -> te.Tensor:
    axis, count = info["axis"], int(x.shape[info["axis"]])
    k = te.reduce_axis((0, count), name="k")
    total = te.compute(
        info["shape"],
        lambda *i: te.sum(tirx.Cast("int64", x(*i[:axis], k, *i[axis:])), axis=k),
        name="int_mean_total",
    )

    def element(*i: Expr) -> Expr:
        doubled = total(*i) * tirx.const(2, "int64") + tirx.const(count, "int64")
        return tirx.Cast("int32", tvm.tirx.floordiv(doubled, tirx.const(2 * count, "int64")))

    return te.compute(info["shape"], element, name="int_mean")


EXPRESSIONS: dict[str, Callable[..., te.Tensor]] = {
    f"vitq.{f.__name__}": f
    for f in (int_quantize, int_requantize, int_dequantize, int_lookup, int_add, int_multiply, int_mean)
}


def operands(node: Call) -> tuple[list[Expr], Callable[..., te.Tensor]]:
    """The tensors that an elementwise operator reads, and its expression over them; numbers are built in."""
    info = {**attrs(node), "shape": tuple(shape_of(node))}
    numbers = {
        n: value_of(a).reshape(-1)[0].item()
        for n, a in enumerate(node.args)
        if is_constant(a) and value_of(a).size == 1
    }
    tensors = [a for n, a in enumerate(node.args) if n not in numbers]

    def expression(*given: te.Tensor) -> te.Tensor:
        left = list(given)
        return EXPRESSIONS[op_name(node)](
            info, *(numbers[n] if n in numbers else left.pop(0) for n in range(len(node.args)))
        )

    return tensors, expression
