"""Inference batch norm to one multiply and one add per channel, which `fold_affine` takes further."""

from __future__ import annotations

import tvm
from tvm import relax

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


class CanonicalizeBatchNorms(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        return None  # the call returns a tuple: its first element is what is rewritten

    def rewrite_item(self, item: relax.TupleGetItem, name: str) -> Expr | None:
        call = self.definition(item.tuple_value)
        if op_name(call) != "relax.nn.batch_norm" or item.index != 0:
            return None
        if not all(is_constant(a) for a in call.args[1:5]):
            return None
        x = call.args[0]
        gamma, beta, mean, variance = (value_of(a).astype("float64") for a in call.args[1:5])
        scale = 1.0 / (variance + float(call.attrs["epsilon"])) ** 0.5
        if call.attrs["scale"]:
            scale = scale * gamma
        shift = (beta if call.attrs["center"] else 0.0) - mean * scale
        axis, rank = int(call.attrs["axis"]), len(shape_of(x))
        shape = [-1 if a == axis % rank else 1 for a in range(rank)]
        scaled = self.emit(relax.op.multiply(x, constant(scale.reshape(shape))), f"{layer_of(name)}:scale")
        return self.emit(relax.op.add(scaled, constant(shift.reshape(shape))), name)


def canonicalize_batch_norms() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizeBatchNorms, "CanonicalizeBatchNorms")
