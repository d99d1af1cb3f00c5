"""Gives activations of a canonical graph another function."""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax

from tvm_vitq.ops import attrs, call, op_name


def replace_activations(mod: tvm.IRModule, kinds: Mapping[str, str]) -> tvm.IRModule:
    """The module whose vitq.activation of these layers have these kinds; all names stay."""
    function = _Replacer(kinds).visit_expr(mod["main"])
    return tvm.IRModule({"main": function}, attrs=mod.attrs)


@relax.expr_functor.mutator
class _Replacer(relax.PyExprMutator):
    def __init__(self, kinds: Mapping[str, str]) -> None:
        super().__init__()
        self.kinds = kinds

    def visit_call_(self, node: relax.Call) -> relax.Expr:
        node = super().visit_call_(node)
        if op_name(node) != "vitq.activation" or attrs(node)["site"] not in self.kinds:
            return node
        site = attrs(node)["site"]
        return call("vitq.activation", list(node.args), site=site, kind=self.kinds[site])
