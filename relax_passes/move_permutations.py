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
from tvm_vitq.relax_passes.canonicalize_views import VIEWS, apply_views, emit_views, permutation, view_step
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
        if operator in VIEWS:
            return self.views_above_linear(call, name)
        if operator in ("relax.take", "relax.strided_slice"):
            return self.above_linear(call, name)
        if operator == "vitq.activation" or (
            operator in ("relax.add", "relax.multiply") and is_constant(call.args[1])
        ):
            return self.below_elementwise(call, name)
        return None

    def views_above_linear(self, call: Call, name: str) -> Expr | None:
        """A chain of views after a linear that only moves rows, such as window reverse, goes before it.

        The single views of the chain may join the last axis with others; it is the whole that counts.
        """
        chain, source = [view_step(call)], call.args[0]
        while (made := self.call_of(source, *VIEWS)) is not None and self.readers(source) <= 1:
            chain.insert(0, view_step(made))
            source = made.args[0]
        producer = self.call_of(source, "vitq.linear")
        if producer is None or self.readers(source) > 1:
            return None
        mapped = apply_views(shape_of(source), chain)
        rows = None if mapped is None else mapped.with_last_axis(shape_of(producer.args[0])[-1])
        if rows is None:
            return None
        x = emit_views(self, producer.args[0], rows.steps(), name)
        return self.emit(Call(producer.op, [x, *producer.args[1:]], producer.attrs), source.name)

    def above_linear(self, call: Call, name: str) -> Expr | None:
        """rows(linear(x)) = linear(rows(x)) for gathers and slices of rows; for slices also LayerNorm."""
        movers = (
            ("vitq.linear", "vitq.layer_norm") if op_name(call) == "relax.strided_slice" else ("vitq.linear",)
        )
        producer = self.call_of(call.args[0], *movers)
        if producer is None or self.readers(call.args[0]) > 1 or not keeps_last_axis(call):
            return None
        arguments = [producer.args[0], *call.args[1:]]
        name = f"{layer_of(name)}:{op_name(call).rpartition('.')[2]}"
        moved = self.emit(Call(call.op, arguments, call.attrs), name)
        return self.emit(Call(producer.op, [moved, *producer.args[1:]], producer.attrs), call.args[0].name)

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
    """Whether a gather or slice moves whole rows only."""
    last = len(shape_of(call.args[0])) - 1
    if op_name(call) == "relax.take":
        return int(call.attrs["axis"]) % (last + 1) != last
    return all(axis % (last + 1) != last for axis in int_list(call.args[1]))


def move_permutations() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(MovePermutations, "MovePermutations")
