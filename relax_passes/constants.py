"""Replaces constants of a canonical graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.graph import is_constant
from tvm_vitq.ops import attrs, op_name, shape_of
from tvm_vitq.relax_passes.sites import bindings

ARGUMENTS = {"vitq.linear": {1: "weight", 2: "bias"}, "vitq.layer_norm": {1: "gamma", 2: "beta"}}


def replace_constants(mod: tvm.IRModule, changed: Mapping[str, npt.NDArray]) -> tvm.IRModule:
    """The module with constants replaced by arrays of the same shape.

    Parameters
    ----------
    changed : by "<layer>.weight" and ".bias" of linear layers, "<layer>.gamma" and ".beta" of LayerNorms;
        other constants by "<variable>.<argument index>", with one more index inside a tuple.

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


def constants_of(binding: relax.VarBinding) -> Iterator[tuple[str, relax.Expr]]:
    """The constants that a binding reads, with the names that `replace_constants` knows them by."""
    return ((name, item) for name, item in _operands(binding.value, binding.var.name) if is_constant(item))


def _operands(value: relax.Expr, variable: str) -> Iterator[tuple[str, relax.Expr]]:
    roles = ARGUMENTS.get(op_name(value), {})
    for index, operand in enumerate(value.args if isinstance(value, relax.Call) else ()):
        name = f"{attrs(value)['site']}.{roles[index]}" if index in roles else f"{variable}.{index}"
        if isinstance(operand, relax.Tuple):
            yield from ((f"{name}.{i}", item) for i, item in enumerate(operand.fields))
        else:
            yield name, operand


def _shapes(mod: tvm.IRModule) -> Iterator[tuple[str, list[int]]]:
    for binding in bindings(mod):
        yield from ((name, shape_of(constant)) for name, constant in constants_of(binding))


@relax.expr_functor.mutator
class _Replacer(relax.PyExprMutator):
    def __init__(self, changed: Mapping[str, npt.NDArray]) -> None:
        super().__init__()
        self.changed = changed
        self.variable = ""

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        self.variable = binding.var.name
        super().visit_var_binding_(binding)

    def visit_call_(self, node: relax.Call) -> relax.Expr:
        named = iter([name for name, _ in _operands(node, self.variable)])
        node = super().visit_call_(node)
        arguments = [
            relax.Tuple([self.replaced(next(named), item) for item in operand.fields])
            if isinstance(operand, relax.Tuple)
            else self.replaced(next(named), operand)
            for operand in node.args
        ]
        return relax.Call(node.op, arguments, node.attrs)

    def replaced(self, name: str, operand: relax.Expr) -> relax.Expr:
        if name not in self.changed:
            return operand
        return relax.const(np.ascontiguousarray(self.changed[name], np.float32))
