"""Activation functions, as one operator or written out, to `vitq.activation`."""

from __future__ import annotations

import math

import tvm
from tvm.ir import Var

from tvm_vitq import ops
from tvm_vitq.ops import op_name
from tvm_vitq.relax_passes.rewriter import Call, Expr, Rewriter, layer_of, rewriting_pass, scalar_of

DIRECT = {
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.silu": "silu",
    "relax.nn.relu": "relu",
    "relax.sigmoid": "sigmoid",
    "relax.tanh": "tanh",
}


def _near(value: float | None, expected: float) -> bool:
    return value is not None and math.isclose(value, expected, rel_tol=1e-4)


class CanonicalizeActivations(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        kind, x = DIRECT.get(op_name(call)), call.args[0] if len(call.args) else None
        if op_name(call) == "relax.multiply":
            kind, x = self.product(call) or (None, None)
        if kind is None or x is None:
            return None
        return ops.call("vitq.activation", [x], site=layer_of(name), kind=kind)

    def factors(self, expr: Expr, depth: int = 3) -> tuple[float, list[Expr]]:
        """A product as one number and the variables multiplied."""
        call = self.call_of(expr, "relax.multiply")
        if call is None or depth == 0:
            number = scalar_of(expr)
            return (1.0, [expr]) if number is None else (number, [])
        left, right = (self.factors(a, depth - 1) for a in call.args)
        return left[0] * right[0], left[1] + right[1]

    def product(self, call: Call) -> tuple[str, Expr] | None:
        """Which activation a product of x with a function of x is."""
        number, variables = self.factors(call)
        if len(variables) != 2:
            return None
        for x, gate in (variables, variables[::-1]):
            kind = self.gated(number, x, gate)
            if kind is not None:
                return kind, x
        return None

    def gated(self, number: float, x: Expr, gate: Expr) -> str | None:
        inner = self.definition(gate)
        if not isinstance(x, Var) or not isinstance(inner, Call):
            return None
        operator = op_name(inner)
        if operator == "vitq.activation" and ops.attrs(inner)["kind"] == "sigmoid" and _near(number, 1.0):
            scale, source = self.factors(inner.args[0])
            if len(source) == 1 and source[0].same_as(x):
                return "silu" if _near(scale, 1.0) else "quick_gelu" if _near(scale, 1.702) else None
        if operator == "relax.clip" and _near(number, 1 / 6):
            shifted = self.call_of(inner.args[0], "relax.add")
            bounds = [float(a.value) for a in inner.args[1:3]]
            if (
                shifted is not None
                and shifted.args[0].same_as(x)
                and scalar_of(shifted.args[1]) == 3
                and bounds == [0, 6]
            ):
                return "hardswish"
        if operator == "relax.add" and scalar_of(inner.args[1]) == 1 and _near(number, 0.5):
            return self.gelu(x, self.definition(inner.args[0]))
        return None

    def gelu(self, x: Expr, inner: Expr) -> str | None:
        """x/2 * (1 + erf(x/sqrt2)), or its tanh form with x + 0.044715 x^3."""
        is_tanh = op_name(inner) == "relax.tanh" or (
            op_name(inner) == "vitq.activation" and ops.attrs(inner)["kind"] == "tanh"
        )
        if not is_tanh and op_name(inner) != "relax.erf":
            return None
        scale, source = self.factors(inner.args[0])
        if len(source) != 1:
            return None
        if not is_tanh:
            return "gelu" if source[0].same_as(x) and _near(scale, math.sqrt(0.5)) else None
        total = self.call_of(source[0], "relax.add")
        if total is None or not _near(scale, math.sqrt(2 / math.pi)):
            return None
        for linear, cubic in (total.args, list(reversed(total.args))):
            weight, terms = self.factors(cubic)
            if linear.same_as(x) and _near(weight, 0.044715) and self.is_cube(terms, x):
                return "gelu_tanh"
        return None

    def is_cube(self, terms: list[Expr], x: Expr) -> bool:
        if len(terms) == 1:
            power = self.call_of(terms[0], "relax.power")
            return power is not None and power.args[0].same_as(x) and scalar_of(power.args[1]) == 3
        if len(terms) == 2:
            powers = [self.call_of(t, "relax.power") for t in terms]
            squares = [
                p for p in powers if p is not None and p.args[0].same_as(x) and scalar_of(p.args[1]) == 2
            ]
            return len(squares) == 1 and any(t.same_as(x) for t in terms)
        return len(terms) == 3 and all(t.same_as(x) for t in terms)


def canonicalize_activations() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizeActivations, "CanonicalizeActivations")
