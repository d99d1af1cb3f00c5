"""Final names: every variable gets a unique one that stays the same from import to import, sites included."""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_vitq import ops
from tvm_vitq.ops import op_name
from tvm_vitq.relax_passes.rewriter import Call, Rewriter, Var, layer_of

OWN_SITE = ("vitq.attention", "vitq.linear", "vitq.layer_norm", "vitq.activation", "vitq.mean")


class NameBindings(Rewriter):
    """Operators of ours are called like their layer, others ``<layer>.<operator>``, repeats numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[str] = {"x"}
        self.attention: set[str] = set()

    def unique(self, wanted: str) -> str:
        name, count = wanted, 2
        while name in self.taken:
            name, count = f"{wanted}_{count}", count + 1
        self.taken.add(name)
        return name

    def transform(self, function: relax.Function) -> relax.Function:
        bindings = [b for block in function.body.blocks for b in block.bindings]
        # Layers first, so that a matmul keeps its module path whatever stands before it. Attention first
        # among the operators of one layer: a projection that is no module of its own is part of it.
        sites: dict[Var, str] = {}
        for rank in (("vitq.attention",), OWN_SITE[1:]):
            for binding in bindings:
                operator = op_name(binding.value)
                if operator in rank:
                    wanted = self.site(binding.value, binding.var.name)
                    if operator == "vitq.linear" and wanted in self.attention:
                        wanted += ".linear"
                    sites[binding.var] = self.unique(wanted)
                    if operator == "vitq.attention":
                        self.attention.add(sites[binding.var])
        for binding in bindings:
            value, layer = self.substitute(binding.value), layer_of(binding.var.name)
            if binding.var in sites:
                name = sites[binding.var]
                attributes = {**ops.attrs(value), "site": name}
                value = ops.call(op_name(value), list(value.args), **attributes)
            else:
                operator = op_name(value).rpartition(".")[2] or "item"
                name = self.unique(f"{layer}.{operator}" if layer else operator)
            self._renamed[binding.var] = self.emit(value, name)
        return self.function(list(function.params), self.substitute(function.body.body))

    @staticmethod
    def site(call: Call, working_name: str) -> str:
        """The layer of one of our operators; at the top level, the operator's own name."""
        return str(ops.attrs(call).get("site") or layer_of(working_name)) or op_name(call).rpartition(".")[2]


def name_bindings() -> tvm.transform.Pass:
    """The pass over ``main``."""

    def run(mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        return tvm.IRModule({"main": NameBindings().transform(mod["main"])})

    return tvm.transform.module_pass(run, opt_level=0, name="NameBindings")
