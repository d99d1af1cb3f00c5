"""Per-channel multiplies and adds folded into the linear, convolution or LayerNorm beside them.

LayerScale, inference batch norm, conv biases, averaged heads and affine layers all vanish here. A producer
that has other readers is left alone: folding would compute it twice.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_vitq import ops
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    Rewriter,
    broadcast_vector,
    constant,
    is_constant,
    rewriting_pass,
    scalar_of,
    value_of,
)


class FoldAffine(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        operator = op_name(call)
        if operator == "vitq.linear":
            return self.into_next(call)
        if operator not in ("relax.add", "relax.multiply") or not is_constant(call.args[1]):
            return None
        x, factor = call.args
        if shape_of(x) != shape_of(call) or self.readers(x) > 1:
            return None
        producer = self.definition(x)
        if op_name(producer) in ("vitq.linear", "vitq.layer_norm"):
            return self.into_channels(producer, operator, factor)
        if operator == "relax.multiply":
            folded = self.into_convolution(producer, factor)
            return self.into_sum(producer, factor) if folded is None else folded
        return None

    def into_channels(self, producer: Call, operator: str, factor: Expr) -> Call | None:
        """(x @ w.T + b) * c and + c; for LayerNorm gamma and beta play weight and bias."""
        weight, bias = producer.args[1], producer.args[2]
        vector = broadcast_vector(factor, -1, shape_of(bias)[0])
        if vector is None:
            return None
        if operator == "relax.add":
            return self.like(producer, weight, constant(value_of(bias) + vector))
        scale = vector[:, None] if len(shape_of(weight)) == 2 else vector
        return self.like(producer, constant(value_of(weight) * scale), constant(value_of(bias) * vector))

    @staticmethod
    def like(producer: Call, weight: Expr, bias: Expr) -> Call:
        return Call(producer.op, [producer.args[0], weight, bias], producer.attrs)

    def into_convolution(self, producer: Expr, factor: Expr) -> Call | None:
        """conv(x, w) * c[1, O, 1, 1] = conv(x, w * c), also with a bias in between."""
        if (
            op_name(producer) == "relax.add"
            and is_constant(producer.args[1])
            and self.readers(producer.args[0]) <= 1
        ):
            inner = self.into_convolution(self.definition(producer.args[0]), factor)
            bias = None if inner is None else constant(value_of(producer.args[1]) * value_of(factor))
            if inner is None or bias is None or len(shape_of(bias)) != len(shape_of(producer.args[1])):
                return None
            return relax.op.add(self.emit(inner, ":conv2d"), bias)
        if op_name(producer) != "relax.nn.conv2d" or not is_constant(producer.args[1]):
            return None
        vector = broadcast_vector(factor, -3, shape_of(producer.args[1])[0])
        if vector is None:
            return None
        weight = constant(value_of(producer.args[1]) * vector[:, None, None, None])
        return Call(producer.op, [producer.args[0], weight], producer.attrs)

    def into_sum(self, producer: Expr, factor: Expr) -> Call | None:
        """(linear + linear) * s, the average of two heads: each linear takes the number."""
        scale = scalar_of(factor)
        if op_name(producer) != "relax.add" or scale is None:
            return None
        scaled = []
        for term in producer.args:
            linear = self.call_of(term, "vitq.linear")
            if linear is None or self.readers(term) > 1:
                return None
            weight, bias = (constant(value_of(a) * np.float32(scale)) for a in linear.args[1:3])
            scaled.append(self.emit(self.like(linear, weight, bias), term.name))
        return relax.op.add(*scaled)

    def into_next(self, linear: Call) -> Call | None:
        """linear(x * c) and linear(x + c) with per-channel c."""
        x = linear.args[0]
        inner = self.call_of(x, "relax.multiply", "relax.add")
        if inner is None or self.readers(x) > 1 or shape_of(inner.args[0]) != shape_of(x):
            return None
        vector = broadcast_vector(inner.args[1], -1, shape_of(x)[-1])
        if vector is None:
            return None
        weight, bias = value_of(linear.args[1]), linear.args[2]
        if op_name(inner) == "relax.add":
            shifted = value_of(bias) + (weight.astype("float64") @ vector).astype("float32")
            return ops.call(
                "vitq.linear", [inner.args[0], linear.args[1], constant(shifted)], **ops.attrs(linear)
            )
        return ops.call("vitq.linear", [inner.args[0], constant(weight * vector), bias], **ops.attrs(linear))


def fold_affine() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(FoldAffine, "FoldAffine", repeat=True)
