"""Fuses what follows a linear layer into it: the function table and the quantizer behind it, or the residual
addition.

``int_lookup(int_linear(x), table)  -->  fused_linear(x, ..., table)``
``int_requantize(fused_linear(x, ..., table))  -->  fused_linear(x, ..., table, multiplier, zero)``
``int_add(move(int_linear(x)), residual)  -->  fused_linear(move(x), ..., residual)``

where `move` only reorders rows (reshape, window reverse, roll): a linear layer works row by row, and moving
its 8-bit input is cheaper than moving its wide result. The sums then leave the registers as the layer's final
result.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Expr

from tvm_vitq.graph import data_operands, is_movement, positions, rows_moved, value_of
from tvm_vitq.ops import attrs, call, dtype_of, op_name, shape_of
from tvm_vitq.relax_passes.rewriter import Rewriter, constant, is_constant


def fuse_epilogues(mod: tvm.IRModule) -> tvm.IRModule:
    """See the module; integer graph to integer graph."""
    return tvm.IRModule({"main": _Fuser().transform(mod["main"])})


class _Fuser(Rewriter):
    def rewrite(self, node: Call, name: str) -> Expr | None:
        if op_name(node) == "vitq.int_lookup":
            linear, path = self.layer_behind(node.args[0])
            return (
                _fused(linear, linear.args[0], "lookup", node.args[1])
                if linear is not None and not path
                else None
            )
        if op_name(node) == "vitq.int_requantize":
            return self.codes(node)
        if op_name(node) == "vitq.int_add":
            for own, other in (node.args, reversed(node.args)):
                fused = self.residual(own, other, node, name)
                if fused is not None:
                    return fused
        return None

    def codes(self, node: Call) -> Expr | None:
        """The codes of wide function values as the result of the layer that looks those up."""
        source, multiplier, zero, input_zero = node.args
        fused, info = self.call_of(source, "vitq.fused_linear"), attrs(node)
        if fused is None or self.readers(source) > 1 or info.get("kind") == "shift":
            return None
        linear, columns = attrs(fused), shape_of(fused)[-1]
        per_column = all(math.prod(shape_of(v)) in (1, columns) for v in (multiplier, zero))
        if linear["epilogue"] != "lookup" or "tokens" in linear or not per_column:
            return None
        if dtype_of(fused.args[5]) != "int32" or value_of(input_zero).any():
            return None
        limits = {f"codes_{name}": info[name] for name in ("qmin", "qmax")}
        args = [*fused.args[:6], multiplier, zero, *fused.args[6:]]
        return call(
            "vitq.fused_linear",
            args,
            **{**linear, "epilogue": "codes", "codes_dtype": info["out_dtype"], **limits},
        )

    def residual(self, own: Expr, other: Expr, node: Call, name: str) -> Expr | None:
        """The sum of a layer's moved result `own` and `other` as one operator, if shapes and movements allow
        it.
        """
        linear, path = self.layer_behind(own)
        size = math.prod(shape_of(node))
        if linear is None or is_constant(other) or attrs(linear)["out_dtype"] != "int32":
            return None
        if size != math.prod(shape_of(own)) or size != math.prod(shape_of(other)):
            return None
        rows = rows_moved(positions(path, shape_of(linear)), shape_of(linear)[-1])
        if rows is None:
            return None
        x = linear.args[0]
        if not np.array_equal(rows, np.arange(len(rows))):
            flat = self.emit(relax.op.reshape(x, (-1, shape_of(x)[-1])), f"{name}_flat")
            x = self.emit(relax.op.take(flat, constant(rows), axis=0, mode="clip"), f"{name}_rows")
        return _fused(linear, x, "residual", other)

    def layer_behind(self, expr: Expr) -> tuple[Call | None, list[Call]]:
        """The int_linear behind `expr` and the movements in between, in order, if nothing else reads any of
        them.
        """
        path: list[Call] = []
        while self.readers(expr) == 1:
            node = self.definition(expr)
            if op_name(node) == "vitq.int_linear":
                return node, path[::-1]
            if not is_movement(node) or len(data_operands(node)) != 1:
                break
            path.append(node)
            expr = data_operands(node)[0]
        return None, []


def _fused(linear: Call, x: Expr, epilogue: str, extra: Expr) -> Call:
    args = list(linear.args)
    return call("vitq.fused_linear", [x, *args[1:5], extra, *args[5:]], epilogue=epilogue, **attrs(linear))
