"""Replaces the weights, biases and LayerNorm parameters of a canonical graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.ops import attrs, op_name, shape_of
from tvm_vitq.relax_passes.sites import bindings

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
    shapes = dict(_shapes(mod))
    for name, value in changed.items():
        if name not in shapes:
            raise VitqError("the graph has no such constant", where=name, expected=nearest(name, shapes))
        if list(np.shape(value)) != shapes[name]:
            raise VitqError(
                "constant of the wrong shape", where=name, got=np.shape(value), expected=shapes[name]
            )
    function = _Replacer(changed).visit_expr(mod["main"])
    return tvm.IRModule({"main": function}, attrs=mod.attrs)


def _shapes(mod: tvm.IRModule) -> Iterator[tuple[str, list[int]]]:
    for binding in bindings(mod):
        for role, index in ARGUMENTS.get(op_name(binding.value), {}).items():
            yield f"{attrs(binding.value)['site']}.{role}", shape_of(binding.value.args[index])


@relax.expr_functor.mutator
class _Replacer(relax.PyExprMutator):
    def __init__(self, changed: Mapping[str, npt.NDArray]) -> None:
        super().__init__()
        self.changed = changed

    def visit_call_(self, node: relax.Call) -> relax.Expr:
        node = super().visit_call_(node)
        arguments = list(node.args)
        for role, index in ARGUMENTS.get(op_name(node), {}).items():
            name = f"{attrs(node)['site']}.{role}"
            if name in self.changed:
                arguments[index] = relax.const(np.ascontiguousarray(self.changed[name], np.float32))
        return relax.Call(node.op, arguments, node.attrs)
