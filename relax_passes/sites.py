"""Questions about a canonical graph: its bindings, the operands of its matmuls, and who reads what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import tvm
from tvm import relax

from tvm_vitq.graph import MOVEMENT
from tvm_vitq.ops import attrs, op_name, shape_of

OPERANDS = {"vitq.linear": ("input", "weight"), "vitq.attention": ("q", "k", "v")}
"""Operand names, in order of the arguments, of the operators that run on integer matmuls."""


@dataclass(frozen=True)
class Site:
    """One operand of one matmul: `name` is "<layer>.<role>", `variable` the tensor it reads (None for
    constants); `kind` of probabilities is "softmax" or "sigmoid", of an
    input the scalar function that it is the result of, if any.
    """

    name: str
    layer: str
    role: str
    variable: str | None
    shape: tuple[int, ...]
    kind: str = ""


def bindings(mod: tvm.IRModule) -> Iterator[relax.VarBinding]:
    """All variable bindings of main, in program order."""
    for block in mod["main"].body.blocks:
        yield from block.bindings


def tensor_arguments(value: relax.Expr) -> list[relax.Expr]:
    """Variables and constants that an expression reads, tuples flattened."""
    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.TupleGetItem):
        return [value.tuple_value]
    found: list[relax.Expr] = []
    for item in value.args if isinstance(value, relax.Call) else getattr(value, "fields", []):
        if isinstance(item, tvm.ir.Tuple):
            found += [v for v in item.fields if isinstance(v, (relax.Var, tvm.ir.GenericConst))]
        elif isinstance(item, (relax.Var, tvm.ir.GenericConst)):
            found.append(item)
    return found


def list_sites(mod: tvm.IRModule) -> list[Site]:
    """Every site of a canonical or annotated graph, in program order; attention also has the site
    ".probs".
    """
    behind = {b.var.name: b.value for b in bindings(mod)}
    sites = []
    for binding in bindings(mod):
        call, kind = binding.value, op_name(binding.value)
        if kind not in OPERANDS:
            continue
        layer = attrs(call)["site"]
        for role, operand in zip(OPERANDS[kind], call.args, strict=False):
            name = operand.name if isinstance(operand, relax.Var) else None
            if name is not None and op_name(behind.get(name)) == "vitq.quantize":
                name = behind[name].args[0].name
            kind_of = attrs(behind[name])["kind"] if op_name(behind.get(name)) == "vitq.activation" else ""
            sites.append(Site(f"{layer}.{role}", layer, role, name, tuple(shape_of(operand)), kind_of))
        if kind == "vitq.attention":
            q, k = shape_of(call.args[0]), shape_of(call.args[1])
            sites.append(Site(f"{layer}.probs", layer, "probs", None, (*q[:3], k[2]), attrs(call)["kind"]))
    return sites


def image_sites(mod: tvm.IRModule) -> frozenset[str]:
    """Inputs of linear layers that hold nothing but values of the image: the patch embedding."""
    image = {param.name for param in mod["main"].params}
    for binding in bindings(mod):
        arguments = tensor_arguments(binding.value)
        moves = op_name(binding.value) in MOVEMENT or isinstance(binding.value, relax.Var)
        if moves and any(isinstance(a, relax.Var) and a.name in image for a in arguments):
            image.add(binding.var.name)
    return frozenset(site.name for site in list_sites(mod) if site.role == "input" and site.variable in image)


def readers(mod: tvm.IRModule) -> dict[str, list[relax.VarBinding]]:
    """Bindings that read each variable, by its name; main's result counts as read by its own binding."""
    found: dict[str, list[relax.VarBinding]] = {}
    for binding in bindings(mod):
        for argument in tensor_arguments(binding.value):
            if isinstance(argument, relax.Var):
                found.setdefault(argument.name, []).append(binding)
    return found
