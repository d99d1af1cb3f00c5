"""Lets attention read q, k and v where they lie and write its result where the next layer reads it.

The movements between a qkv layer and attention (reshape, permute, slice) are affine: element [b, h, t, d] of q lies at
``offset + b * batch_stride + h * head_stride + t * row_stride + d`` of the layer's output. Then no copy is needed:

``int_attention(permute(reshape(slice(qkv))), ...)  -->  fused_attention(qkv, ..., q_view=(offset, strides))``

The fused operator returns [B, T, H * D]; movements that end where they began become one reshape. Movements that are not
affine (shifted windows) stay copies of 8-bit codes.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Expr, Var
from tvm_vitq.relax_passes.rewriter import Rewriter

from tvm_vitq.graph import data_operands, is_movement, move
from tvm_vitq.numerics import Array
from tvm_vitq.ops import attrs, call, op_name, shape_of

View = tuple[int, int, int, int]
"""Offset, and the strides of batch, head and token, in elements."""


def fuse_views(mod: tvm.IRModule) -> tvm.IRModule:
    """See the module; integer graph to integer graph."""
    return tvm.IRModule({"main": _Fuser().transform(mod["main"])})


def positions(path: list[Call], source_shape: list[int]) -> Array:
    """Where each element behind `path` lies in the flat source."""
    index = np.arange(math.prod(source_shape), dtype=np.int64).reshape(source_shape)
    for step in path:
        index = move(step, index)
    return index


def affine_view(index: Array) -> View | None:
    """The strides of positions [B, H, T, D] if they are affine with unit stride in D, else None."""
    offset = int(index[0, 0, 0, 0])
    strides = [int(np.take(index, 1, a).flat[0]) - offset if n > 1 else 0 for a, n in enumerate(index.shape)]
    if index.shape[3] > 1 and strides[3] != 1:
        return None
    grids = np.ogrid[tuple(slice(n) for n in index.shape)]
    expected = offset + sum(g * s for g, s in zip(grids, strides, strict=True))
    return (offset, strides[0], strides[1], strides[2]) if np.array_equal(index, expected) else None


class _Fuser(Rewriter):
    def rewrite(self, node: Call, name: str) -> Expr | None:
        if is_movement(node) and len(data_operands(node)) == 1:
            return self.collapse(node, name)
        if op_name(node) == "vitq.int_attention":
            return self.attention(node, name)
        return None

    def origin(self, expr: Expr) -> tuple[Expr, list[Call]]:
        """The value that movements made `expr` from, and these movements in order."""
        path: list[Call] = []
        while True:
            node = self.definition(expr)
            if not (isinstance(node, Call) and is_movement(node) and len(data_operands(node)) == 1):
                return expr, path[::-1]
            path.append(node)
            expr = data_operands(node)[0]

    def collapse(self, node: Call, name: str) -> Expr | None:
        """A chain of movements that restores the order of its source becomes a reshape of the source."""
        source, path = self.origin(data_operands(node)[0])
        if not isinstance(source, Var) or not path or math.prod(shape_of(node)) != math.prod(shape_of(source)):
            return None
        index = positions([*path, node], shape_of(source)).reshape(-1)
        if np.array_equal(index, np.arange(index.size)):
            return relax.op.reshape(source, tuple(shape_of(node)))
        return None

    def attention(self, node: Call, name: str) -> Expr:
        sources, views = [], {}
        for letter, operand in zip("qkv", node.args[:3], strict=True):
            source, path = self.origin(operand)
            view = affine_view(positions(path, shape_of(source)))
            if view is None:
                source = operand
                view = affine_view(positions([], shape_of(operand)))
            sources.append(source)
            views[f"{letter}_view"] = list(view or ())
        batch, heads, queries, width = shape_of(node)
        shapes = {"shape": [batch, heads, queries, width], "keys": shape_of(node.args[1])[2], "depth": shape_of(node.args[0])[3]}
        fused = call("vitq.fused_attention", [*sources, *node.args[3:]], **attrs(node), **views, **shapes)
        rows = self.emit(fused, name)
        apart = self.emit(relax.op.reshape(rows, (batch, queries, heads, width)), f"{name}_heads")
        return relax.op.permute_dims(apart, [0, 2, 1, 3])
