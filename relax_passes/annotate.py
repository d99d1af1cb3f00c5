"""Puts a `vitq.quantize` in front of every matmul operand that is computed at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax

from tvm_vitq.errors import VitqError
from tvm_vitq.ops import attrs, call, op_name
from tvm_vitq.relax_passes.sites import OPERANDS, bindings, list_sites


def annotate(mod: tvm.IRModule, asked: Mapping[str, Any]) -> tuple[tvm.IRModule, dict[str, str]]:
    """Annotate a canonical graph.

    ``linear(x, w, b) --> linear(quantize(x, site), w, b)``, likewise q, k and v of attention. Weights are
    constants and probabilities live inside attention: both have a site in the plan and no operator.

    Sites that read the same variable and ask for the same share one operator. It is named after the first of
    them in program order; the others are its aliases.

    Parameters
    ----------
    asked : what each site asks for (a SiteSpec or a SiteQuantizer; anything comparable), by site name.

    Returns
    -------
    The annotated module, and the aliases: site name to the name of the site it shares.
    """
    missing = [site.name for site in list_sites(mod) if site.name not in asked]
    if missing:
        raise VitqError("no quantizer is asked for", where=", ".join(missing[:5]))
    annotator = _Annotator(asked, {b.var.name for b in bindings(mod)})
    function = annotator.visit_expr(mod["main"])
    return tvm.IRModule({"main": function}, attrs=mod.attrs), annotator.aliases


@relax.expr_functor.mutator
class _Annotator(relax.PyExprMutator):
    def __init__(self, asked: Mapping[str, Any], taken: set[str]) -> None:
        super().__init__()
        self.asked = asked
        self.taken = taken
        self.aliases: dict[str, str] = {}
        self.shared: dict[str, list[tuple[Any, str, relax.Var]]] = {}

    def visit_call_(self, node: relax.Call) -> relax.Expr:
        node = super().visit_call_(node)
        kind = op_name(node)
        if kind not in OPERANDS:
            return node
        layer = attrs(node)["site"]
        arguments = list(node.args)
        for index, role in enumerate(OPERANDS[kind]):
            if isinstance(arguments[index], relax.Var):
                arguments[index] = self.quantized(arguments[index], f"{layer}.{role}")
        return relax.Call(node.op, arguments, node.attrs)

    def quantized(self, variable: relax.Var, site: str) -> relax.Var:
        for asked, owner, made in self.shared.get(variable.name, []):
            if asked == self.asked[site]:
                self.aliases[site] = owner
                return made
        made = self.builder_.emit(call("vitq.quantize", [variable], site=site), self.fresh(site))
        self.shared.setdefault(variable.name, []).append((self.asked[site], site, made))
        return made

    def fresh(self, site: str) -> str:
        base = name = site.replace(".", "_")
        count = 0
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name
