"""Means over axes, global average pooling included, to `vitq.mean` over one axis."""

from __future__ import annotations

from math import prod

import tvm
from tvm import relax

from tvm_vitq import ops
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.canonicalize_views import permutation
from tvm_vitq.relax_passes.rewriter import Call, Expr, Rewriter, int_list, layer_of, rewriting_pass

POOLS = ("relax.mean", "relax.nn.adaptive_avg_pool2d")


class CanonicalizePooling(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        axes = self.averaged(call)
        if axes is None:
            return None
        x, layer = call.args[0], layer_of(name)
        made = self.call_of(x, "relax.permute_dims")
        if made is not None:  # pool where the data lies instead of moving it first
            order = permutation(made)
            rest = [a for i, a in enumerate(order) if i not in axes]
            if rest == sorted(rest):
                x, axes = made.args[0], sorted(order[a] for a in axes)
        if axes != list(range(axes[0], axes[-1] + 1)):
            return None
        shape = shape_of(x)
        if len(axes) > 1:
            joined = prod(shape[axes[0] : axes[-1] + 1])
            flat = (*shape[: axes[0]], joined, *shape[axes[-1] + 1 :])
            x = self.emit(relax.op.reshape(x, flat), f"{layer}:reshape")
        pooled = self.emit(ops.call("vitq.mean", [x], site=layer, axis=axes[0]), f"{layer}:mean")
        return relax.op.reshape(pooled, shape_of(call))

    @staticmethod
    def averaged(call: Call) -> list[int] | None:
        """The axes that a call averages away, if that is what it does."""
        rank = len(shape_of(call.args[0])) if call.args and op_name(call) in POOLS else 0
        if op_name(call) == "relax.mean":
            chosen = call.attrs["axis"]
            return list(range(rank)) if chosen is None else sorted({a % rank for a in int_list(chosen)})
        if op_name(call) == "relax.nn.adaptive_avg_pool2d" and str(call.attrs["layout"]) == "NCHW":
            return [2, 3] if shape_of(call)[2:] == [1, 1] else None
        return None


def canonicalize_pooling() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizePooling, "CanonicalizePooling")
