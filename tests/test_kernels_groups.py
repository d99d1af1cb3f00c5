"""The kernels of dynamic groups on every x86 instruction set of this machine: they equal numerics."""

from __future__ import annotations

import numpy as np
import pytest
from group_cases import LINEARS, codes_case, group_linear_case, table_case, written
from kernel_cases import CODES, INDEX
from kernel_runs import ISAS, check, run

SHAPES = {
    # 197 tokens of DeiT, 49 of a window times its windows, odd ones.
    "deit": ((1, 197, 96, 48, 8, 8), {"out": CODES, "zero_point": "vector"}),
    "gelu": ((1, 197, 80, 48, 8, 8), {"out": INDEX, "lookup": "int8", "zero_point": "scalar"}),
    "windows": ((2, 4 * 49, 48, 32, 8, 8), {"out": CODES, "zero_point": "scalar"}),
    "tall": ((1, 1037, 16, 16, 3, 8), {"out": INDEX, "lookup": "int8", "zero_point": "vector"}),
    "batch": ((8, 9, 36, 40, 12, 4), {"out": CODES, "zero_point": "scalar"}),
}
EVERY = {**LINEARS, **SHAPES}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", EVERY)
def test_linear_equals_numerics(isa, name):
    check(group_linear_case(name, isa, *EVERY[name]), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["one", "tails", "more_groups_than_channels", "lookup_deep", "tall"])
def test_table_and_codes_equal_numerics(isa, name):
    table = table_case(name, isa, EVERY[name][0])
    entries = written(table.spec.layout)
    np.testing.assert_array_equal(run(table, isa)[:, entries], table.expected[:, entries])
    codes = codes_case(name, isa, EVERY[name][0])
    layout = codes.spec.layout
    images = len(codes.inputs[1])
    got, expected = (v.reshape(images, -1, layout.positions) for v in (run(codes, isa), codes.expected))
    for image, order in enumerate(codes.inputs[1][:, : layout.positions]):
        places = np.flatnonzero(order < layout.k)
        np.testing.assert_array_equal(got[image][:, places], expected[image][:, places])


def test_two_threads_and_one_give_the_same(use_threads):
    """Tasks write disjoint parts of the result."""
    for threads in (1, 2):
        use_threads(threads)
        check(group_linear_case("deit", ISAS[0], *SHAPES["deit"]), ISAS[0])


def test_names_tell_functions_apart():
    """Equal names are equal functions; what changes the function changes the name."""
    from tvm_vitq.schedules.group_linear import GroupLinear

    base = {"isa": "avx512vnni", "m": 14, "n": 20, "k": 36, "out": CODES, "tokens": 7, "choices": 8}
    variants = [{}, {"m": 28}, {"n": 21}, {"k": 40}, {"tokens": 14}, {"choices": 4}, {"zero_point": "scalar"}]
    names = [GroupLinear(**{**base, **v}).name for v in variants]
    assert len(set(names)) == len(names)
    assert GroupLinear(**base).kernel().name == GroupLinear(**base).name == names[0]
