"""Replaces the weights, biases and LayerNorm parameters of a canonical graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_vitq.errors import VitqError
from tvm_vitq.ops import attrs, op_name, shape_of

ARGUMENTS = {"vitq.linear": {"weight": 1, "bias": 2}, "vitq.layer_norm": {"gamma": 1, "beta": 2}}


def replace_constants(mod: tvm.IRModule, changed: Mapping[str, npt.NDArray]) -> tvm.IRModule:
    """The module with constants replaced by arrays of the same shape.

    Parameters
    ----------
    changed : by "<layer>.weight" and ".bias" of linear layers, "<layer>.gamma" and ".beta" of LayerNorms.

    Raises
    ------
    VitqError : for a name that the module does not have, or a shape that is not the constant's.
    """
    mutator = _Replacer(changed)
    function = mutator.visit_expr(mod["main"])
    unknown = set(changed) - mutator.done
    if unknown:
        raise VitqError("the graph has no such constant", where=", ".join(sorted(unknown)[:5]))
    return tvm.IRModule({"main": function}, attrs=mod.attrs)


@relax.expr_functor.mutator
class _Replacer(relax.PyExprMutator):
    def __init__(self, changed: Mapping[str, npt.NDArray]) -> None:
        super().__init__()
        self.changed = changed
        self.done: set[str] = set()

    def visit_call_(self, node: relax.Call) -> relax.Expr:
        node = super().visit_call_(node)
        places = ARGUMENTS.get(op_name(node))
        if places is None:
            return node
        layer, arguments = attrs(node)["site"], list(node.args)
        for role, index in places.items():
            name = f"{layer}.{role}"
            if name in self.changed:
                value = np.ascontiguousarray(self.changed[name], np.float32)
                if list(value.shape) != shape_of(arguments[index]):
                    raise VitqError(
                        "constant of the wrong shape",
                        where=name,
                        got=value.shape,
                        expected=shape_of(arguments[index]),
                    )
                arguments[index] = relax.const(value)
                self.done.add(name)
        return relax.Call(node.op, arguments, node.attrs)
