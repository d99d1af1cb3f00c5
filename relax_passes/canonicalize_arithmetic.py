"""Elementwise arithmetic in few forms: constants on the right, no division by constants, no no-ops.

Operators on constants alone are evaluated here, in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax

from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    Rewriter,
    constant,
    is_constant,
    layer_of,
    rewriting_pass,
    scalar_of,
    value_of,
)

NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
    "relax.power": np.power,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.negative": np.negative,
    "relax.abs": np.abs,
    "relax.sqrt": np.sqrt,
    "relax.rsqrt": lambda x: 1 / np.sqrt(x),
    "relax.exp": np.exp,
    "relax.log": np.log,
    "relax.square": np.square,
    "relax.sin": np.sin,
    "relax.cos": np.cos,
    "relax.equal": np.equal,
    "relax.logical_not": np.logical_not,
    "relax.where": np.where,
}


class CanonicalizeArithmetic(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        operator = op_name(call)
        if operator in NUMPY and all(is_constant(a) for a in call.args):
            dtype = str(call.ty.dtype)
            return constant(np.asarray(NUMPY[operator](*(value_of(a) for a in call.args))).astype(dtype))
        if operator in ("relax.full_like", "relax.zeros_like", "relax.ones_like"):
            fill = 1.0 if operator == "relax.ones_like" else 0.0
            if operator == "relax.full_like":
                filler = scalar_of(call.args[1])
                if filler is None:
                    return None
                fill = filler
            return constant(np.full(shape_of(call), fill, str(call.ty.dtype)))
        if operator == "relax.astype" and is_constant(call.args[0]):
            return constant(value_of(call.args[0]).astype(str(call.ty.dtype)))
        if str(getattr(call.ty, "dtype", "")) != "float32":
            return None
        if operator == "relax.negative":
            return self.product(call.args[0], np.float32(-1.0), call, name)
        if operator in ("relax.add", "relax.multiply"):
            left, right = call.args
            if is_constant(left):
                left, right = right, left
            if not is_constant(right):
                return None
            value = value_of(right)
            if operator == "relax.multiply":
                return self.product(left, value, call, name)
            return self.sum(left, value, call, name)
        if operator == "relax.subtract" and is_constant(call.args[1]):
            return self.sum(call.args[0], -value_of(call.args[1]), call, name)
        if operator == "relax.subtract" and is_constant(call.args[0]):
            negative = self.emit(relax.op.multiply(call.args[1], relax.const(-1.0, "float32")), name)
            return relax.op.add(negative, call.args[0])
        if operator == "relax.divide" and is_constant(call.args[1]):
            inverse = (1.0 / value_of(call.args[1]).astype("float64")).astype("float32")
            return self.product(call.args[0], inverse, call, name)
        return None

    def product(self, x: Expr, value: np.ndarray | np.float32, call: Call, name: str) -> Expr | None:
        """x * value, without ones and with chained constants joined."""
        if np.all(value == 1) and shape_of(x) == shape_of(call):
            return x
        inner = self.call_of(x, "relax.multiply")
        if inner is not None and is_constant(inner.args[1]) and self.readers(x) <= 1:
            joined = value_of(inner.args[1]) * value
            if joined.size <= max(np.size(value), value_of(inner.args[1]).size):
                return relax.op.multiply(inner.args[0], constant(joined))
        return self.kept(relax.op.multiply, x, value, call)

    def sum(self, x: Expr, value: np.ndarray, call: Call, name: str) -> Expr | None:
        if not np.any(value) and shape_of(x) == shape_of(call):
            return x
        concat = self.call_of(x, "relax.concat")
        if concat is not None and shape_of(x) == shape_of(call):
            spread = self.distribute(concat, value, name)
            if spread is not None:
                return spread
        return self.kept(relax.op.add, x, value, call)

    @staticmethod
    def kept(
        op: Callable[[Expr, Expr], Call], x: Expr, value: np.ndarray | np.float32, call: Call
    ) -> Call | None:
        """None where `call` has this very form already, so that its constant is not copied."""
        same_form = op_name(call) == op(x, x).op.name and x.same_as(call.args[0])
        return None if same_form else op(x, constant(np.asarray(value, dtype="float32")))

    def distribute(self, concat: Call, value: np.ndarray, name: str) -> Expr | None:
        """concat(c, x) + value = concat(c + value', x + value''): tokens get their position at build time."""
        parts, axis = list(concat.args[0].fields), int(concat.attrs["axis"])
        rank = len(shape_of(parts[0]))
        axis %= rank
        if not any(is_constant(p) for p in parts) or value.ndim != rank:
            return None
        begin, sums = 0, []
        for part in parts:
            size = shape_of(part)[axis]
            piece = (
                value
                if value.shape[axis] == 1
                else value[(slice(None),) * axis + (slice(begin, begin + size),)]
            )
            begin += size
            if is_constant(part):
                sums.append(constant(value_of(part) + piece))
            else:
                sums.append(self.emit(relax.op.add(part, constant(piece)), f"{layer_of(name)}:add"))
        return relax.op.concat(sums, axis=axis)


def canonicalize_arithmetic() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizeArithmetic, "CanonicalizeArithmetic")
