"""Fuses what follows a linear layer into it: the function table, or the residual addition.

``int_lookup(int_linear(x), table)  -->  fused_linear(x, ..., table)``
``int_add(int_linear(x), residual)  -->  fused_linear(x, ..., residual)``, also if the layer's result was reshaped

The sums then never leave the registers as anything but the layer's final result.
"""

from __future__ import annotations

import math

import tvm
from tvm.ir import Call, Expr
from tvm_vitq.relax_passes.rewriter import Rewriter, is_constant

from tvm_vitq.ops import attrs, call, op_name, shape_of


def fuse_epilogues(mod: tvm.IRModule) -> tvm.IRModule:
    """See the module; integer graph to integer graph."""
    return tvm.IRModule({"main": _Fuser().transform(mod["main"])})


class _Fuser(Rewriter):
    def rewrite(self, node: Call, name: str) -> Expr | None:
        if op_name(node) == "vitq.int_lookup":
            linear = self.only_reader(node.args[0])
            return None if linear is None else _fused(linear, "lookup", node.args[1])
        if op_name(node) == "vitq.int_add":
            for own, other in (node.args, reversed(node.args)):
                linear = self.only_reader(own)
                same_size = math.prod(shape_of(own)) == math.prod(shape_of(other)) == math.prod(shape_of(node))
                if linear is not None and same_size and not is_constant(other) and attrs(linear)["out_dtype"] == "int32":
                    return _fused(linear, "residual", other)
        return None

    def only_reader(self, expr: Expr) -> Call | None:
        """The int_linear behind `expr` and any reshapes, if nothing else reads it."""
        while self.readers(expr) == 1:
            linear = self.call_of(expr, "vitq.int_linear")
            if linear is not None:
                return linear
            reshape = self.call_of(expr, "relax.reshape")
            if reshape is None:
                return None
            expr = reshape.args[0]
        return None


def _fused(linear: Call, epilogue: str, extra: Expr) -> Call:
    args = list(linear.args)
    return call("vitq.fused_linear", [*args[:5], extra, *args[5:]], epilogue=epilogue, **attrs(linear))
