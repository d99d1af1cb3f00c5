"""Tables of scalar functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.formats import Format, index_format
from tvm_vitq.numerics import INDEX_BITS, Array
from tvm_vitq.numerics_attention import SIGMOID_BITS

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


@dataclass(frozen=True)
class ScalarFunction:
    """A function that, to 2**-16, is constant below `low`, and above `high` constant or (no high) the
    identity.
    """

    formula: Callable[[Array], Array]
    low: float
    high: float | None = None


FUNCTIONS: dict[str, ScalarFunction] = {
    "gelu": ScalarFunction(lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), -4.7),
    "gelu_tanh": ScalarFunction(
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), -4.7
    ),
    "quick_gelu": ScalarFunction(lambda x: x * _sigmoid(1.702 * x), -8.0),
    "silu": ScalarFunction(lambda x: x * _sigmoid(x), -14.0),
    "relu": ScalarFunction(lambda x: np.maximum(x, 0), 0.0),
    "hardswish": ScalarFunction(lambda x: x * np.clip(x + 3, 0, 6) / 6, -3.0),
    "sigmoid": ScalarFunction(_sigmoid, -11.1, 11.1),
    "tanh": ScalarFunction(np.tanh, -5.9, 5.9),
}


def scalar_function(kind: str, site: str) -> ScalarFunction:
    """The float64 function of an activation kind; VitqError naming `site` and the nearest kinds if
    unknown.
    """
    if kind not in FUNCTIONS:
        raise VitqError(
            "unknown activation function",
            where=site,
            got=kind,
            expected=nearest(kind, FUNCTIONS) or ", ".join(FUNCTIONS),
        )
    return FUNCTIONS[kind]


def activation_input(kind: str, largest: float, out: Format, site: str, power_of_two: bool = False) -> Format:
    """Index format of the argument: the part of [-largest, largest] in which the stored result still changes.

    Below ``low`` the function is constant; above ``high`` it is constant or the identity, and the identity
    ends where the output format saturates. `power_of_two` asks for a step that shift requantization can
    reach.
    """
    function = scalar_function(kind, site)
    low, high = max(-1.25 * largest, function.low), 1.25 * largest
    if function.high is None:
        arguments = np.linspace(0, high, 4096)
        reached = function.formula(arguments) >= out.largest
        high = float(arguments[reached.argmax()]) if reached.any() else high
    else:
        high = min(high, function.high)
    return index_format(low, max(high, low + 1e-3), power_of_two)


def activation_table(kind: str, x: Format, out: Format, site: str) -> Array:
    """``out.encode(f(x))`` for every index of x; f is evaluated in float64."""
    return out.encode(scalar_function(kind, site).formula(_arguments(x)))


def codebook_table(x: Format, out: Format) -> Array:
    """``out.encode(x)`` for every index of x."""
    return out.encode(_arguments(x))


def _arguments(x: Format) -> Array:
    return float(x.scale) * (np.arange(2**INDEX_BITS) - int(x.zero_point))


def sigmoid_table(scale: float, qmax: int) -> Array:
    """uint8 codes of sigmoid attention for base-2 scores from -16 to 16 in steps of 2**(5 - SIGMOID_BITS)."""
    scores = (np.arange(2**SIGMOID_BITS) - 2 ** (SIGMOID_BITS - 1)) * 2.0 ** (5 - SIGMOID_BITS)
    return np.clip(np.rint(_sigmoid(scores * math.log(2)) / scale), 0, qmax).astype(np.uint8)
