"""The linear kernel on every x86 instruction set of this machine: every element equals numerics."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import CODES, INDEX, LINEARS, LOGITS, WIDE, linear_case
from kernel_runs import ISAS, check

from tvm_vitq.numerics import Output
from tvm_vitq.schedules.isa import Tile
from tvm_vitq.schedules.linear import Linear
from tvm_vitq.schedules.packing import pack_right, panel_widths
from tvm_vitq.schedules.weight_planes import WeightPlanes

SHAPES = {
    # Real shapes and their tails: 197 tokens, 49-token windows, 588 = 3 x 14 x 14 patches, 1000 classes.
    "patch": ((49, 64, 588), {"out": WIDE}),
    "qkv": ((197, 192, 64), {"out": CODES, "zero_point": "vector"}),
    "head": ((1, 1000, 96), {"out": LOGITS}),
    "classes": ((5, 10, 100), {"out": LOGITS}),
    "window": ((49, 36, 48), {"out": CODES, "zero_point": "scalar"}),
    "gelu": ((197, 100, 48), {"out": INDEX, "lookup": "int8", "zero_point": "scalar"}),
    "gelu_one": ((1, 64, 384), {"out": INDEX, "lookup": "int8", "zero_point": "scalar"}),
    "gelu_rows": (
        (50, 80, 48),
        {
            "out": INDEX,
            "lookup": "int8",
            "groups": 1,
            "row_scales": True,
            "row_zero_points": True,
            "zero_point": "scalar",
        },
    ),
    "gelu_groups": ((33, 100, 96), {"out": INDEX, "lookup": "int8", "groups": 3, "zero_point": "scalar"}),
    "tall": ((400, 40, 48), {"out": WIDE, "residual": True}),
    "batch": ((400, 24, 128), {"out": INDEX, "lookup": "int32", "zero_point": "vector"}),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [*LINEARS, *SHAPES])
def test_equals_numerics(isa, name):
    check(linear_case(name, isa, *{**LINEARS, **SHAPES}[name]), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_operands(isa):
    """Sums of the largest magnitude that a depth allows: no intermediate result saturates."""
    check(
        linear_case("extreme", isa, (3, 16, 2048), {"out": Output("int32", -(2**24), 2**24)}, extreme=True),
        isa,
    )


@pytest.mark.parametrize("tile", [Tile(1, 16), Tile(4, 48, 8), Tile(14, 32, 28), Tile(12, 32)])
def test_any_tile_gives_the_same(tile):
    """Tile sizes are free: rows and columns that do not divide, blocks smaller than the matrix."""
    for options in (
        {"out": CODES, "zero_point": "scalar"},
        {"out": INDEX, "lookup": "int8", "zero_point": "scalar"},
    ):
        check(linear_case("tile", ISAS[0], (50, 84, 96), {**options, "tile": tile}), ISAS[0])


def test_two_threads_and_one_give_the_same(use_threads):
    """Tasks write disjoint parts of the result."""
    case = linear_case("threads", ISAS[0], (197, 128, 64), {"out": CODES, "zero_point": "scalar"})
    for threads in (1, 2):
        use_threads(threads)
        check(case, ISAS[0])


def test_names_tell_functions_apart():
    """Equal names are equal functions; what changes the function changes the name."""
    base = {"isa": "avx512vnni", "m": 7, "n": 20, "k": 36, "out": CODES}
    variants = [
        {}, {"m": 8}, {"n": 21}, {"k": 40}, {"out": Output("int8", -8, 7)},
        {"out": Output("int8", -128, 127, "shift")},
        {"zero_point": "scalar"}, {"zero_point": "vector"}, {"groups": 2}, {"groups": 4},
        {"groups": 1, "row_scales": True}, {"groups": 1, "row_zero_points": True}, {"tile": Tile(4, 32)},
        {"out": INDEX, "lookup": "int8"}, {"out": INDEX, "lookup": "int32"}, {"out": WIDE}, {"out": LOGITS},
        {"out": WIDE, "residual": True}, {"groups": 2, "multiples": True},
        {"planes": WeightPlanes(4, 3)}, {"planes": WeightPlanes(4, 2)}, {"planes": WeightPlanes(3, 3)},
    ]  # fmt: skip
    names = [Linear(**{**base, **v}).name for v in variants]
    assert len(set(names)) == len(names)
    assert all(name.startswith("vitq_linear_") for name in names)
    assert Linear(**base).kernel().name == Linear(**base).name


def test_packing_keeps_every_weight():
    """Panels hold [depth / step][columns][step], padded by zeros."""
    weight = np.arange(1, 1 + 20 * 6, dtype=np.int8).reshape(20, 6)
    packed = np.concatenate(pack_right(weight, 16, step=2, unit=4))
    assert panel_widths(20, 16) == [16, 16]
    panels = packed.reshape(2, 4, 16, 2).transpose(0, 2, 1, 3).reshape(32, 8)
    np.testing.assert_array_equal(panels[:20, :6], weight)
    assert not panels[20:].any() and not panels[:, 6:].any()


@pytest.mark.parametrize("bits", range(1, 8))
def test_packed_weights_take_their_bits(bits):
    """The narrowest form is found, and takes `bits` for each weight of whole chunks."""
    rng = np.random.default_rng(bits)
    for shift in range(8 - bits):
        q = rng.integers(0, 2**bits, (5, 64))
        q[0, :2] = 0, 2**bits - 1
        weight = ((q << shift) - rng.integers(0, 128, (5, 1))).astype(np.int8)
        planes = WeightPlanes.of(weight)
        assert planes is not None and (planes.bits, planes.shift) == (bits, shift)
    assert planes.size(64, 32) == 64 * 32 * bits // 8
    assert len(planes.pack(np.zeros((64, 32), np.int8), np.zeros(32, np.int8))) == planes.size(64, 32)


def test_weights_that_need_a_byte_are_not_packed():
    weight = np.arange(-128, 128, dtype=np.int8).reshape(1, -1)
    assert WeightPlanes.of(weight) is None
    constant = np.full((3, 4), 7, np.int8)
    assert WeightPlanes.of(constant) == WeightPlanes(1, 0)
