"""Checks a module between passes (VITQ_VERIFY=1): the invariants that every pass must keep."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_vitq.errors import VitqError
from tvm_vitq.graph import is_constant, value_of
from tvm_vitq.integerize.headroom import linear_bound, require
from tvm_vitq.integerize.linear import OFFSET_CODES
from tvm_vitq.ops import attrs, dtype_of, op_name


def verify(mod: tvm.IRModule, after: str) -> None:
    """Raises VitqError, naming the pass, if the module is not well formed or an integer operator breaks its
    contract.
    """
    try:
        relax.analysis.well_formed(mod)
    except tvm.error.InternalError as error:
        raise VitqError("a pass left an ill-formed module", where=after, got=error) from error
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if op_name(value) in ("vitq.int_linear", "vitq.fused_linear"):
                _linear(value, after)


def _linear(node: relax.Call, after: str) -> None:
    x, weight, bias = node.args[:3]
    where = f"{attrs(node)['site']}, after {after}"
    types = (dtype_of(x), dtype_of(weight), dtype_of(bias))
    chosen = "tokens" in attrs(node)  # channels of a wide tensor choose their quantizers
    if types != ("int32" if chosen else "int8", "int8", "int32") or not (
        is_constant(weight) and is_constant(bias)
    ):
        raise VitqError(
            "a linear layer has the wrong operands", where=where, got=types, expected="int8, int8, int32"
        )
    w = value_of(weight)
    if w.min(initial=0) < -127:
        raise VitqError("a weight code is -128, which kernels do not allow", where=where)
    if chosen:
        zero, qmin, qmax = (value_of(node.args[-2]), attrs(node)["code_min"], attrs(node)["code_max"])
        farthest = float(np.maximum(qmax - zero, zero - qmin).max()) + OFFSET_CODES
        bound = float(np.abs(w.astype(np.int64)).sum(1).max()) * farthest
        require(bound, where, "a group", "quantize the model anew")
        return
    require(
        linear_bound(w, value_of(bias).astype(np.int64), -128, 127),
        where,
        "the layer",
        "quantize the model anew",
    )
