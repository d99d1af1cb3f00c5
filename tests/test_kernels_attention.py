"""The attention kernel on every x86 instruction set of this machine: every element equals numerics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_cases import WIDE, attention_case
from kernel_runs import ISAS, check

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Output
from tvm_vitq.numerics_attention import Probabilities

SHAPES = {
    # name: (batch, heads, tq, tk, d, dv), options
    "vit": ((1, 3, 197, 197, 64, 64), {}),
    "small": ((2, 2, 4, 4, 16, 16), {}),
    "odd_heads": ((1, 2, 50, 50, 24, 24), {}),
    "heads_of_48": ((1, 1, 65, 65, 48, 48), {"bits": 4}),
    "wide_heads": ((1, 1, 31, 31, 128, 128), {}),
    "tails": ((1, 1, 3, 37, 20, 12), {"bits": 3}),
    "one_query": ((2, 3, 1, 33, 18, 30), {}),
    "one_key": ((1, 1, 5, 1, 16, 16), {"bits": 5}),
    "many_keys": ((1, 1, 7, 1370, 16, 16), {}),
    "extreme": ((1, 1, 4, 16, 32, 16), {"extreme": True}),
    "windows": ((4, 3, 49, 49, 32, 32), {"additive": ((1, 3, 49), (2, 1, 49))}),
    "bias": ((2, 2, 17, 17, 16, 16), {"additive": ((1, 2, 17),)}),
    "row_bias": ((2, 2, 9, 21, 16, 16), {"additive": ((1, 1, 1), (2, 2, 9))}),
    "sigmoid": ((1, 2, 33, 33, 48, 48), {"kind": "sigmoid"}),
    "sigmoid_tails": ((1, 1, 5, 19, 16, 20), {"kind": "sigmoid", "additive": ((1, 1, 5),)}),
    "row": ((1, 3, 197, 197, 64, 64), {"step": None}),
    "row_4_bits": ((2, 2, 17, 17, 16, 24), {"step": None, "bits": 4}),
    "row_2_bits": ((1, 1, 5, 3, 16, 16), {"step": None, "bits": 2, "spread": 1.0}),
    "row_windows": ((4, 3, 49, 49, 32, 32), {"step": None, "additive": ((1, 3, 49), (2, 1, 49))}),
    "row_many_keys": ((1, 1, 5, 8192, 16, 16), {"step": None, "spread": 1e-3}),
    "row_wide": ((1, 2, 20, 20, 16, 24), {"step": None, "out": WIDE}),
    "wide": ((1, 2, 20, 20, 16, 24), {"out": WIDE}),
    "shift": ((1, 2, 20, 20, 16, 16), {"out": Output("int8", -128, 127, "shift")}),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_numerics(isa, name):
    shape, options = SHAPES[name]
    check(attention_case(name, isa, shape, **options), isa)


def test_probabilities_finer_than_the_sum():
    """Codes are limited to qmax where the step is smaller than 1 / qmax."""
    case = attention_case("fine", ISAS[0], (1, 1, 9, 9, 16, 16), step=1 / 1000)
    check(case, ISAS[0])


def test_refuses_a_step_that_16_bits_do_not_hold():
    case = attention_case("fine", ISAS[0], (1, 1, 9, 9, 16, 16))
    with pytest.raises(VitqError, match="softmax"):
        replace(case.spec, probs=Probabilities("softmax", 255, 2**31 - 2**17, 16, 8))


def test_names_tell_functions_apart():
    """What changes the function changes the name."""
    spec = attention_case("", ISAS[0], (2, 2, 9, 9, 16, 16)).spec
    variants = [
        spec,
        replace(spec, batch=1),
        replace(spec, additive=((1, 2, 9),)),
        replace(spec, out=Output("int8", -8, 7)),
        replace(spec, q=replace(spec.q, column=1)),
        replace(spec, v=replace(spec.v, head_stride=8)),
        replace(spec, probs=replace(spec.probs, qmax=15)),
        replace(spec, probs=Probabilities("sigmoid", 255)),
    ]
    assert len({v.name for v in variants}) == len(variants)


def test_codes_reach_the_whole_range():
    """Where one key of a row lies far above the others its probability is qmax and its value the result."""
    case = attention_case("peaked", ISAS[0], (1, 1, 8, 8, 16, 16), spread=64.0)
    check(case, ISAS[0])
    assert np.ptp(case.expected.astype(int)) > 100
