"""Linear layers that make several operands of attention at once."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvm_vitq.graph import data_operands, is_movement
from tvm_vitq.ops import attrs, op_name
from tvm_vitq.relax_passes.sites import OPERANDS, bindings


def fused_parts(mod: tvm.IRModule) -> dict[str, int]:
    """How many of q, k and v each linear layer makes, where that is more than one."""
    made = {b.var.name: b.value for b in bindings(mod)}
    roles: dict[str, set[str]] = {}
    for call in made.values():
        if op_name(call) != "vitq.attention":
            continue
        for role, operand in zip(OPERANDS["vitq.attention"], call.args, strict=False):
            value = operand
            while (source := _moved(value)) is not None:
                value = made.get(source.name)
            if op_name(value) == "vitq.linear":
                roles.setdefault(attrs(value)["site"], set()).add(role)
    return {layer: len(parts) for layer, parts in roles.items() if len(parts) > 1}


def _moved(value: Any) -> relax.Var | None:
    """The variable whose values `value` holds, moved or quantized; None for anything computed."""
    if isinstance(value, relax.Var):
        return value
    if op_name(value) == "vitq.quantize":
        return value.args[0]
    if is_movement(value) and len(data_operands(value)) == 1:
        operand = data_operands(value)[0]
        return operand if isinstance(operand, relax.Var) else None
    return None
