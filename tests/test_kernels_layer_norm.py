"""The LayerNorm kernel on every x86 level of this machine: every element equals numerics."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import CODES, WIDE, layer_norm_case
from kernel_runs import ISAS, check

from tvm_vitq import numerics as nm
from tvm_vitq.numerics import Output

SHAPES = {
    "deit": (197, 192, CODES),
    "one_row": (1, 384, CODES),
    "tail": (5, 100, CODES),
    "narrow": (3, 17, WIDE),
    "two": (2, 2, CODES),
    "w4": (7, 64, Output("int8", -8, 7)),
    "wide": (3, 4096, WIDE),
    "chunks": (2, 2200, CODES),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_numerics(isa, name):
    check(layer_norm_case(name, *SHAPES[name]), isa)


@pytest.mark.parametrize("magnitude", [1, 37, 2**10, nm.WIDE_MAX])
def test_every_scale_of_the_reciprocal_root(magnitude):
    """Variances from below 1 to the largest: both shifts of int_rsqrt."""
    rng = np.random.default_rng(magnitude)
    case = layer_norm_case("scale", 6, 48, CODES)
    x = rng.integers(-magnitude, magnitude + 1, (6, 48)).astype(np.int32)
    gain, offset, epsilon, shift = case.constants
    expected = nm.int_layer_norm(x, gain, offset, shift=int(shift[0]), epsilon=int(epsilon[0]), out=CODES)
    check(type(case)(case.name, case.spec, [x], case.constants, expected), ISAS[0])
