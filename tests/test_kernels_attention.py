"""The attention kernel on every x86 instruction set of this machine: every element equals numerics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_cases import CODES, WIDE, attention_case, book
from kernel_runs import ISAS, check

from tvm_vitq.errors import VitqError
from tvm_vitq.integerize.attention import site_probabilities
from tvm_vitq.numerics import Output
from tvm_vitq.numerics_attention import Probabilities
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.codebook import PROBABILITY_GRID
from tvm_vitq.schedules.codebook import Form

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


def spaced(step: int, first: int, probs: Probabilities) -> Probabilities:
    """The book with edges that are equally far from each other, as those of logarithms are."""
    assert probs.edges is not None
    return replace(probs, edges=(first + step * np.arange(len(probs.edges))[::-1]).astype(np.int32))


def published(codec: str, bits: int, scale: float | None = None, **params: float) -> Probabilities:
    """The book of a published quantizer of probabilities."""
    scale = scale or 1 / (2**bits - 1)
    site = SiteQuantizer(bits, [scale], [0], codec, params={"grid": PROBABILITY_GRID, **params})
    return site_probabilities("softmax", site, 50, codec)[0]


BOOKS = {
    # name: shape, book, options; results are wide unless they say otherwise
    "vit": ((1, 2, 197, 197, 64, 64), book(16, 197), {"out": CODES}),
    "vit_row": ((1, 2, 197, 197, 64, 64), book(16, 197, relative=True), {"out": CODES}),
    "3_bits": ((2, 2, 17, 17, 16, 24), book(8, 17, 200), {"spread": 2.0}),
    "3_bits_row": ((1, 1, 3, 37, 20, 12), book(8, 37, 255, relative=True), {}),
    "implicit_zero": ((1, 2, 33, 33, 16, 16), book(17, 33, 2**16 - 1), {}),
    "no_zero": ((1, 1, 5, 19, 24, 20), book(15, 19, least=7), {}),
    "two_levels": ((1, 1, 5, 1, 16, 16), book(2, 1), {}),
    "windows": ((4, 3, 49, 49, 32, 32), book(16, 49, least=1), {"additive": ((1, 3, 49), (2, 1, 49))}),
    "log2": ((2, 2, 70, 70, 32, 32), spaced(4096, 2049, book(16, 70)), {"spread": 8.0}),
    "log2_row": ((1, 1, 5, 43, 16, 24), spaced(4096, 2049, book(16, 43, 255, relative=True, least=2)), {}),
    "log_sqrt2": ((1, 2, 33, 33, 16, 16), spaced(2048, 2048, book(31, 33)), {"spread": 8.0}),
    "log_odd": ((1, 2, 33, 33, 16, 16), spaced(2047, 4, book(33, 33)), {"spread": 8.0}),
    "40_levels": ((1, 2, 33, 33, 16, 16), spaced(1500, 7, book(40, 33)), {"spread": 8.0}),
    "100_levels": ((1, 2, 33, 33, 16, 16), spaced(611, 5000, book(100, 33, 255)), {"spread": 8.0}),
    "256_levels": ((1, 2, 33, 33, 16, 16), spaced(256, 1, book(256, 33, relative=True)), {"spread": 8.0}),
    "tangent": ((1, 1, 50, 50, 16, 16), published("tangent", 6), {"spread": 8.0}),
    "tangent_8": ((1, 1, 50, 50, 16, 16), published("tangent", 8, scale=1, alpha=2.7), {"spread": 8.0}),
    "tangent_8_steep": ((1, 1, 50, 50, 16, 16), published("tangent", 8, scale=1, alpha=2.9), {"spread": 8.0}),
    "tangent_8_pole": ((1, 1, 50, 50, 16, 16), published("tangent", 8, scale=1, alpha=3.1), {"spread": 8.0}),
    "twin_uniform": ((1, 1, 50, 50, 16, 16), published("twin_uniform", 8), {"spread": 8.0}),
    "crowd": ((1, 1, 9, 9, 16, 16), spaced(1, 12981, book(8, 9)), {}),
    "511_keys": ((1, 1, 5, 511, 16, 16), book(16, 511, least=9), {}),
    "512_keys": ((1, 1, 5, 512, 16, 16), book(16, 512, least=9), {}),
    "5_bits": ((1, 1, 9, 21, 16, 16), book(32, 21), {}),
    "6_bits": ((1, 2, 50, 50, 32, 32), book(64, 50), {}),
    "8_bits": ((1, 1, 31, 31, 48, 16), book(256, 31, 251), {}),
    "8_bits_row": ((1, 1, 7, 45, 16, 16), book(257, 45, relative=True), {}),
    "zero": ((2, 2, 21, 21, 16, 16), book(16, 21, zero=900), {}),
    "zero_one_plane": ((1, 2, 7, 30, 16, 24), book(64, 30, 255, zero=-11, least=3), {}),
    "many_keys": ((1, 1, 7, 1370, 16, 16), book(16, 1370), {}),
    "most_keys": ((1, 1, 2, 8192, 16, 16), book(16, 8192, 255, relative=True, least=255), {"spread": 1e-3}),
    "extreme": ((1, 1, 4, 16, 32, 16), book(16, 16, 2**16 - 1, least=2**16 - 1), {"extreme": True}),
    "shift": ((1, 2, 20, 20, 16, 16), book(16, 20), {"out": Output("int8", -128, 127, "shift")}),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", BOOKS)
def test_codebooks_equal_numerics(isa, name):
    shape, probs, options = BOOKS[name]
    check(attention_case(name, isa, shape, probs=probs, **{"out": WIDE, **options}), isa)


def test_every_form_of_lookup_is_tried():
    forms = {Form.of(probs, True).name for _, probs, _ in BOOKS.values()}
    lines = {f"lines1x{t}" for t in ("32x32x64", "64x64x256", "32x64x256", "32x128x256", "32x256x256")}
    assert lines | {"blocks1", "chain8", "buckets4"} <= forms, forms
    assert {Form.of(probs, False).kind for _, probs, _ in BOOKS.values()} == {"chain", "buckets"}


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
    books = [book(16, 9), book(24, 9), book(16, 9, 255), book(16, 9, relative=True), book(16, 9, zero=1)]
    books += [book(64, 9), book(256, 9), spaced(4096, 2049, book(16, 9))]
    variants = [
        spec,
        replace(spec, batch=1),
        replace(spec, additive=((1, 2, 9),)),
        replace(spec, out=Output("int8", -8, 7)),
        replace(spec, q=replace(spec.q, column=1)),
        replace(spec, v=replace(spec.v, head_stride=8)),
        replace(spec, probs=replace(spec.probs, qmax=15)),
        replace(spec, probs=Probabilities("sigmoid", 255)),
        *(replace(spec, probs=probs) for probs in books),
    ]
    assert len({v.name for v in variants}) == len(variants)


def test_books_that_differ_in_numbers_share_a_kernel():
    spec = attention_case("", ISAS[0], (2, 2, 9, 9, 16, 16), probs=book(16, 9)).spec
    others = [book(15, 9), book(17, 9, 2**16 - 1, least=3)]
    assert {replace(spec, probs=probs).name for probs in others} == {spec.name}


def test_codes_reach_the_whole_range():
    """Where one key of a row lies far above the others its probability is qmax and its value the result."""
    case = attention_case("peaked", ISAS[0], (1, 1, 8, 8, 16, 16), spread=64.0)
    check(case, ISAS[0])
    assert np.ptp(case.expected.astype(int)) > 100
