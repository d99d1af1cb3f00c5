"""Multiply-accumulates of a graph, integer and float: the basis of integer coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm import relax

from tvm_vitq.graph import Dataflow
from tvm_vitq.ops import attrs, op_name, shape_of


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-accumulates of one binding."""

    name: str
    op: str
    macs: int
    integer: bool


def count_macs(mod: tvm.IRModule) -> list[LayerMacs]:
    """Every binding of an integer graph that multiplies and accumulates."""
    counted = []
    for binding in Dataflow(mod).bindings:
        name = op_name(binding.value)
        macs = _macs(binding.value)
        if macs:
            counted.append(LayerMacs(binding.var.name, name, macs, name.startswith("vitq.int_")))
    return counted


def _macs(node: relax.Expr) -> int:
    name = op_name(node)
    if name in ("vitq.int_linear", "vitq.linear"):
        return math.prod(shape_of(node)) * shape_of(node.args[1])[1]
    if name in ("vitq.int_attention", "vitq.attention"):
        batch, heads, queries, width = shape_of(node)
        keys, depth = shape_of(node.args[1])[2:]
        return batch * heads * queries * keys * (depth + width)
    if name == "relax.matmul":
        return math.prod(shape_of(node)) * shape_of(node.args[0])[-1]
    if name.startswith("relax.nn.conv"):
        return math.prod(shape_of(node)) * math.prod(shape_of(node.args[1])[1:])
    return 0


def site_of(node: relax.Expr) -> str:
    """The model's layer that a call belongs to, empty if it names none."""
    return (
        str(attrs(node).get("site", ""))
        if isinstance(node, relax.Call) and op_name(node).startswith("vitq.")
        else ""
    )
