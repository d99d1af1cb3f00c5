"""LayerNorm over the last axis, as one operator or written out, to `vitq.layer_norm`."""

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
    scalar_of,
)


class CanonicalizeLayerNorms(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        operator = op_name(call)
        if operator == "relax.nn.layer_norm":
            x, gamma, beta = call.args
            last = [int(a) % len(shape_of(x)) for a in call.attrs["axes"]] == [len(shape_of(x)) - 1]
            if not last or not is_constant(gamma) or not is_constant(beta):
                return None
            return ops.call(
                "vitq.layer_norm", [x, gamma, beta], site=layer_of(name), eps=float(call.attrs["epsilon"])
            )
        if operator not in ("relax.divide", "relax.multiply"):
            return None
        for centred, spread in (call.args, list(reversed(call.args))):
            found = self.written_out(centred, spread, operator)
            if found is not None:
                x, eps = found
                width = shape_of(x)[-1]
                unit = [constant(np.ones(width, "float32")), constant(np.zeros(width, "float32"))]
                return ops.call("vitq.layer_norm", [x, *unit], site=layer_of(name), eps=eps)
            if operator == "relax.divide":
                break
        return None

    def written_out(self, centred: Expr, spread: Expr, operator: str) -> tuple[Expr, float] | None:
        """x and eps of (x - mean(x)) / sqrt(variance(x) + eps); gamma and beta are folded in later."""
        difference = self.call_of(centred, "relax.subtract")
        root = self.call_of(spread, "relax.sqrt" if operator == "relax.divide" else "relax.rsqrt")
        if difference is None or root is None:
            return None
        x = difference.args[0]
        total = self.call_of(root.args[0], "relax.add")
        if not self.is_mean_of(difference.args[1], x) or total is None:
            return None
        eps = scalar_of(total.args[1])
        if eps is None or not self.is_variance(total.args[0], x, centred):
            return None
        return x, eps

    def is_mean_of(self, expr: Expr, x: Expr, operator: str = "relax.mean") -> bool:
        mean = self.call_of(expr, operator)
        if mean is None or not mean.args[0].same_as(x) or mean.attrs["axis"] is None:
            return False
        rank = len(shape_of(x))
        return [int(a) % rank for a in mean.attrs["axis"]] == [rank - 1] and bool(mean.attrs["keepdims"])

    def is_variance(self, expr: Expr, x: Expr, centred: Expr) -> bool:
        if self.is_mean_of(expr, x, "relax.variance"):
            return True
        mean = self.call_of(expr, "relax.mean")
        squared = (
            None
            if mean is None
            else self.call_of(mean.args[0], "relax.multiply", "relax.power", "relax.square")
        )
        if mean is None or squared is None or not self.is_mean_of(expr, mean.args[0]):
            return False
        base = squared.args[0]
        if op_name(squared) == "relax.multiply" and not squared.args[1].same_as(base):
            return False
        if op_name(squared) == "relax.power" and scalar_of(squared.args[1]) != 2:
            return False
        again = self.call_of(base, "relax.subtract")  # exporters may subtract the mean twice
        return base.same_as(centred) or (
            again is not None and again.args[0].same_as(x) and self.is_mean_of(again.args[1], x)
        )


def canonicalize_layer_norms() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizeLayerNorms, "CanonicalizeLayerNorms")
