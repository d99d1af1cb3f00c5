"""Lets attention read q, k and v where they lie and write its result where the next layer reads it.

The movements between a qkv layer and attention (reshape, permute, slice) leave q, k and v where a matrix view
finds them in the layer's output. Then no copy is needed:

``int_attention(permute(reshape(slice(qkv))), ...)  -->  fused_attention(qkv, ..., q_view)``

The fused operator returns [B, T, H * D]; movements that end where they began become one reshape. Movements
that no view describes (shifted windows) stay copies of 8-bit codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Expr, Var

from tvm_vitq.graph import data_operands, is_movement, positions, rows_moved
from tvm_vitq.numerics import Array
from tvm_vitq.ops import attrs, call, op_name, shape_of
from tvm_vitq.relax_passes.rewriter import Rewriter, constant


@dataclass(frozen=True)
class MatrixView:
    """Element [b, h, t, d] lies in row ``b * rows + row + t``, column ``column + h * head_stride + d`` of a
    matrix.
    """

    width: int
    column: int
    head_stride: int
    rows: int
    row: int

    def numbers(self) -> list[int]:
        return [self.width, self.column, self.head_stride, self.rows, self.row]


def fuse_views(mod: tvm.IRModule) -> tvm.IRModule:
    """See the module; integer graph to integer graph."""
    return tvm.IRModule({"main": _Fuser().transform(mod["main"])})


def matrix_view(index: Array, size: int) -> MatrixView | None:
    """The view with positions [B, H, T, D] of a flat source of `size` elements, or None if there is none."""
    offset = int(index[0, 0, 0, 0])
    strides = [int(np.take(index, 1, a).flat[0]) - offset if n > 1 else 0 for a, n in enumerate(index.shape)]
    grids = np.ogrid[tuple(slice(n) for n in index.shape)]
    if not np.array_equal(index, offset + sum(g * s for g, s in zip(grids, strides, strict=True))):
        return None
    by_batch, by_head, by_token, by_depth = strides
    width = by_token or by_batch or size
    row, column = divmod(offset, width)
    end = column + (index.shape[1] - 1) * by_head + index.shape[3]
    fits = width > 0 and size % width == 0 and by_batch % width == 0 and by_head >= 0 and end <= width
    if not fits or (index.shape[3] > 1 and by_depth != 1):
        return None
    return MatrixView(width, column, by_head, by_batch // width, row)


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
        """A chain of movements that restores the order of its source becomes a reshape of the source; one
        that only reorders rows, in several steps (a shifted window partition), becomes one gather of rows."""
        source, path = self.origin(data_operands(node)[0])
        if not isinstance(source, Var) or not path:
            return None
        path.append(node)
        width = shape_of(source)[-1]
        index = positions(path, shape_of(source)).reshape(-1)
        if index.size == math.prod(shape_of(source)) and np.array_equal(index, np.arange(index.size)):
            return relax.op.reshape(source, tuple(shape_of(node)))
        copies = sum(op_name(step) != "relax.reshape" for step in path)
        rows = rows_moved(index, width) if copies >= 2 else None
        if rows is None:
            return None
        flat = self.emit(relax.op.reshape(source, (-1, width)), f"{name}_flat")
        gathered = self.emit(relax.op.take(flat, constant(rows), axis=0, mode="clip"), f"{name}_rows")
        return relax.op.reshape(gathered, tuple(shape_of(node)))

    def attention(self, node: Call, name: str) -> Expr:
        operands, views = zip(*(self.view(operand, name) for operand in node.args[:3]), strict=True)
        batch, heads, queries, width = shape_of(node)
        info = {
            **attrs(node),
            **{f"{letter}_view": view.numbers() for letter, view in zip("qkv", views, strict=True)},
            "shape": [batch, heads, queries, width],
            "keys": shape_of(node.args[1])[2],
            "depth": shape_of(node.args[0])[3],
        }
        rows = self.emit(call("vitq.fused_attention", [*operands, *node.args[3:]], **info), name)
        apart = self.emit(relax.op.reshape(rows, (batch, queries, heads, width)), f"{name}_heads")
        return relax.op.permute_dims(apart, [0, 2, 1, 3])

    def view(self, operand: Expr, name: str) -> tuple[Expr, MatrixView]:
        """What attention reads in place of `operand`, and where in it; a copy with tokens as rows if need
        be.
        """
        source, path = self.origin(operand)
        found = matrix_view(positions(path, shape_of(source)), math.prod(shape_of(source)))
        if found is None:
            _, heads, tokens, depth = shape_of(operand)
            source = self.emit(relax.op.permute_dims(operand, [0, 2, 1, 3]), f"{name}_rows")
            found = MatrixView(heads * depth, 0, depth, tokens, 0)
        return source, found
