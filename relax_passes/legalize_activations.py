"""Activation functions that stay in float, as polynomials.

TVM's own legalization calls the C library once per element, slower than the convolution before it; sums and
products become vectors. exp is that of Cephes (expf), tanh and erf are the rational minimax approximations of
Eigen. Largest errors: exp 2e-7 relative within EXP_RANGE, and beyond it the results at its ends; tanh 4e-7
and erf 5e-7 absolute. Inputs are numbers: NaN does not come through.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax, te, tirx
from tvm.ir import Call, Expr
from tvm.script import tirx as T

from tvm_vitq.relax_passes.lower_elementwise import round_to_int32

EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
EXP_RANGE = -87.33654, 88.37626
"""Where exp is a normal number, and a power of two below 2**128 times one."""
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
"""LN2_HIGH has 9 bits: its product with an exponent is exact."""

TANH_RANGE = 7.90531110763549805
TANH = (
    (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
     1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
    (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03),
)  # fmt: skip

ERF_RANGE = 4.0
ERF = (
    (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
     -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
    (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
     -1.42647390514189e-02),
)  # fmt: skip


def _number(value: float) -> Expr:
    return tirx.const(value, "float32")


def _clip(x: Expr, low: float, high: float) -> Expr:
    return tirx.max(tirx.min(x, _number(high)), _number(low))


def _polynomial(coefficients: tuple[float, ...], x: Expr) -> Expr:
    """Horner's scheme, the highest power first."""
    value = _number(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + _number(coefficient)
    return value


def exp(x: Expr) -> Expr:
    """2**n * exp(r) with |r| <= ln(2) / 2."""
    x = _clip(x, *EXP_RANGE)
    n = round_to_int32(x * _number(LOG2_E))
    whole = tirx.Cast("float32", n)
    r = x - whole * _number(LN2_HIGH) - whole * _number(LN2_LOW)
    power = T.reinterpret((n + tirx.const(127, "int32")) << tirx.const(23, "int32"), dtype="float32")
    return (_polynomial(EXP, r) * (r * r) + r + _number(1.0)) * power


def sigmoid(x: Expr) -> Expr:
    return _number(1.0) / (exp(_number(0.0) - x) + _number(1.0))


def _odd(x: Expr, limit: float, ratio: tuple[tuple[float, ...], tuple[float, ...]]) -> Expr:
    x = _clip(x, -limit, limit)
    upper, lower = (_polynomial(coefficients, x * x) for coefficients in ratio)
    return x * upper / lower


def tanh(x: Expr) -> Expr:
    return _odd(x, TANH_RANGE, TANH)


def erf(x: Expr) -> Expr:
    return _odd(x, ERF_RANGE, ERF)


def silu(x: Expr) -> Expr:
    return x * sigmoid(x)


def gelu(x: Expr) -> Expr:
    return x * (_number(0.5) + erf(x * _number(0.5**0.5)) * _number(0.5))


def gelu_tanh(x: Expr) -> Expr:
    inner = x * _number(0.7978845608028654) * (_number(1.0) + x * x * _number(0.044715))
    return x * (_number(0.5) + tanh(inner) * _number(0.5))


def _legalization(function: Callable[[Expr], Expr]) -> Callable[[relax.BlockBuilder, Call], Expr]:
    def legalize(builder: relax.BlockBuilder, call: Call) -> Expr:
        def expression(x: te.Tensor) -> te.Tensor:
            return te.compute(x.shape, lambda *i: function(x(*i)), name=function.__name__)

        if str(call.args[0].ty.dtype) != "float32":
            return call
        return builder.call_te(expression, call.args[0], primfunc_name_hint=function.__name__)

    return legalize


ACTIVATIONS = {
    "relax.exp": _legalization(exp),
    "relax.sigmoid": _legalization(sigmoid),
    "relax.tanh": _legalization(tanh),
    "relax.erf": _legalization(erf),
    "relax.nn.silu": _legalization(silu),
    "relax.nn.gelu": _legalization(gelu),
    "relax.nn.gelu_tanh": _legalization(gelu_tanh),
}
"""For relax.transform.LegalizeOps."""
