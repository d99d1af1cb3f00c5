"""Matmuls with a constant operand to `vitq.linear`."""

from __future__ import annotations

import numpy as np
import tvm

from tvm_vitq import ops
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    Rewriter,
    constant,
    is_constant,
    layer_of,
    rewriting_pass,
    value_of,
)


class CanonicalizeLinears(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        if op_name(call) != "relax.matmul" or not is_constant(call.args[1]) or is_constant(call.args[0]):
            return None
        value = value_of(call.args[1])
        if value.ndim < 2 or len(shape_of(call)) != len(shape_of(call.args[0])):
            return None
        # decomposed programs repeat the weight for every image
        weights = value.reshape(-1, *value.shape[-2:])
        if not (weights == weights[:1]).all():
            return None
        weight = constant(weights[0].T)
        bias = constant(np.zeros(value.shape[-1], "float32"))
        return ops.call("vitq.linear", [call.args[0], weight, bias], site=layer_of(name))


def canonicalize_linears() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizeLinears, "CanonicalizeLinears")
