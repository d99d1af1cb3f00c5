"""Row permutations go above linears, transposes go below elementwise operators.

Window reverse and roll leave the projection and its residual add adjacent; channel-first 1x1 convolutions
lose the transposes between them.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_vitq import ops
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.canonicalize_views import permutation
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    Rewriter,
    constant,
    int_list,
    is_constant,
    layer_of,
    rewriting_pass,
    value_of,
)


class MovePermutations(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        operator = op_name(call)
        if operator in ("relax.reshape", "relax.permute_dims", "relax.take", "relax.strided_slice"):
            return self.above_linear(call, name)
        if operator == "vitq.activation" or (
            operator in ("relax.add", "relax.multiply") and is_constant(call.args[1])
        ):
            return self.below_elementwise(call, name)
        return None

    def above_linear(self, call: Call, name: str) -> Expr | None:
        """rows(linear(x)) = linear(rows(x)) where the last axis is left alone; for slices also LayerNorm."""
        movers = (
            ("vitq.linear", "vitq.layer_norm") if op_name(call) == "relax.strided_slice" else ("vitq.linear",)
        )
        producer = self.call_of(call.args[0], *movers)
        if producer is None or self.readers(call.args[0]) > 1 or not keeps_last_axis(call):
            return None
        x = producer.args[0]
        arguments = [x, *call.args[1:]]
        if op_name(call) == "relax.reshape":
            arguments[1] = relax.ShapeExpr([*shape_of(call)[:-1], shape_of(x)[-1]])
        moved = self.emit(
            Call(call.op, arguments, call.attrs), f"{layer_of(name)}:{op_name(call).split('.')[-1]}"
        )
        again = Call(producer.op, [moved, *producer.args[1:]], producer.attrs)
        return self.emit(again, call.args[0].name)

    def below_elementwise(self, call: Call, name: str) -> Expr | None:
        """f(permute(x)) = permute(f(x)), a constant operand permuted back at build time."""
        x = call.args[0]
        made = self.call_of(x, "relax.permute_dims")
        if made is None or self.readers(x) > 1 or shape_of(x) != shape_of(call):
            return None
        axes = permutation(made)
        if op_name(call) == "vitq.activation":
            inner = ops.call("vitq.activation", [made.args[0]], **ops.attrs(call))
        else:
            value = value_of(call.args[1])
            value = value.reshape((1,) * (len(axes) - value.ndim) + value.shape)
            inner = Call(call.op, [made.args[0], constant(value.transpose(np.argsort(axes)))], call.attrs)
        return relax.op.permute_dims(self.emit(inner, name), axes)


def keeps_last_axis(call: Call) -> bool:
    """Whether a view, gather or slice moves whole rows only."""
    operator, before = op_name(call), shape_of(call.args[0])
    rank = len(before)
    if operator == "relax.reshape":
        return shape_of(call)[-1] == before[-1]
    if operator == "relax.permute_dims":
        return permutation(call)[-1] == rank - 1
    if operator == "relax.take":
        return int(call.attrs["axis"]) % rank != rank - 1
    return all(axis % rank != rank - 1 for axis in int_list(call.args[1]))


def move_permutations() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(MovePermutations, "MovePermutations")
