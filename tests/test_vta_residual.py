"""Residual sums on VTA against NumPy: the layer's result, rounded and added to the stream."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import WIDE_MAX, Output, int_add, int_linear
from tvm_vitq.vta.launches.linear import linear_launch
from tvm_vitq.vta.launches.residual import Residual
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.machine.isa import Alu, AluOp
from tvm_vitq.vta.runtime.device import SimulatedDevice
from tvm_vitq.vta.runtime.program import PlacedProgram, Program
from tvm_vitq.vta.stream.digits import LARGEST, digit_weights, digits

CONFIG = VtaConfig()
WIDE = Output("int32", -WIDE_MAX, WIDE_MAX, "shift")


def layer(exponents, depth: int = 96, count: int = 72, kind: str = "shift", seed: int = 0):
    """Weights, bias, multipliers 2**k with k of `exponents`, output."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (count, depth)).astype(np.int8)
    bias = rng.integers(-(2**15), 2**15, count).astype(np.int32)
    multiplier = 2.0 ** rng.choice(exponents, count).astype(np.float64)
    return weight, bias, multiplier.astype(np.float32), Output("int32", -WIDE_MAX, WIDE_MAX, kind)


def run(made: Residual, x, stream, weight):
    """The result, which the host is still to limit."""
    launch = linear_launch("fc2", len(x), weight, made.conversion, CONFIG)
    placed = PlacedProgram(Program(CONFIG, {"fc2": launch}), SimulatedDevice(CONFIG, size=16 << 20))
    (found,) = placed.run("fc2", x[None], stream[None] * made.scale + made.constant)
    return found[0]


@pytest.mark.parametrize("exponents", [[0], [-2], [3], [-1, -2], [0, 1], [2, 3, 4], [-1, 0, 1]], ids=str)
@pytest.mark.parametrize("rows", [1, 50, 197])
def test_the_stream_is_that_of_the_reference(exponents, rows):
    """Shifts to both sides, in blocks that have one and in such that have several."""
    weight, bias, multiplier, out = layer(exponents)
    rng = np.random.default_rng(1)
    x = rng.integers(-128, 128, (rows, weight.shape[1])).astype(np.int8)
    stream = rng.integers(-WIDE_MAX, WIDE_MAX + 1, (rows, len(bias))).astype(np.int32)
    stream[0, :2] = -WIDE_MAX, WIDE_MAX
    if min(exponents) >= 0:  # multipliers from 1 on round nothing, so that both kinds are the same
        out = Output("int32", -WIDE_MAX, WIDE_MAX, "multiply")
    made = Residual.of(weight, bias, multiplier, out, CONFIG.block)
    found = np.clip(run(made, x, stream, weight), -WIDE_MAX, WIDE_MAX)
    # `round_shift` of the reference is for shifts to the right
    right = np.minimum(multiplier, 1.0)
    added = int_linear(x, weight, bias, right, 0, WIDE).astype(np.int64) * np.maximum(multiplier, 1)
    assert np.abs(added).max() > 2**14
    assert np.array_equal(found, int_add(stream, added.astype(np.int32)))


def test_codes_that_are_small_allow_more():
    weight, bias, multiplier, out = layer([6], depth=384, kind="multiply")
    with pytest.raises(VitqError, match="may saturate"):
        Residual.of(weight, bias // 16, multiplier, out, CONFIG.block)
    made = Residual.of(weight, bias // 16, multiplier, out, CONFIG.block, largest=8)
    rng = np.random.default_rng(2)
    x = rng.integers(-8, 8, (20, 384)).astype(np.int8)
    stream = rng.integers(-WIDE_MAX, WIDE_MAX + 1, (20, len(bias))).astype(np.int32)
    added = (x.astype(int) @ weight.T.astype(int) + bias // 16) << 6
    assert np.array_equal(run(made, x, stream, weight), stream + added)


@pytest.mark.parametrize(
    ("exponents", "kind", "reason"),
    [
        ([-1], "multiply", "rounded to even"),
        ([8], "multiply", "may saturate"),
        ([-4, 2], "shift", "32 bits"),
        ([-40], "shift", "32 bits"),
        ([-64, 0], "shift", "32 bits"),
        ([0.5], "multiply", "real multipliers"),
    ],
)
def test_sums_that_stay_on_the_host(exponents, kind, reason):
    weight, bias, multiplier, out = layer(exponents, kind=kind)
    with pytest.raises(VitqError, match=reason):
        Residual.of(weight, bias, multiplier, out, CONFIG.block)


def test_results_that_are_no_stream():
    weight, bias, multiplier, _ = layer([0])
    with pytest.raises(VitqError, match="no residual stream"):
        Residual.of(weight, bias, multiplier, Output("int8", -128, 127, "shift"), CONFIG.block)


def test_digits_make_every_value():
    rng = np.random.default_rng(3)
    ends = [-LARGEST, LARGEST, 0, -1, 63, 64, -64, -65, 127 * 128, 128 * 128]
    values = np.concatenate([rng.integers(-LARGEST, LARGEST + 1, 100_000), ends])
    made = [digit.astype(np.int64) for digit in digits(values)]
    assert all(digit.dtype == np.int8 for digit in digits(values))
    low, high = (made[n] - 128 * made[n + 1] for n in (0, 2))
    assert np.array_equal(low + 2**15 * high, values)
    even, odd = digit_weights(16)
    assert np.array_equal(even, np.eye(16)) and np.array_equal(odd, -128 * np.eye(16))


def test_blocks_of_one_shift_need_no_second():
    """Channels stand by their exponents: one shift for a block, but where two exponents meet."""
    weight, bias, multiplier, out = layer([1, 3], count=256, kind="multiply")
    made = Residual.of(weight, bias, multiplier, out, CONFIG.block)
    blocks = np.array(made.conversion.order).reshape(-1, 16)
    exponents = np.log2(multiplier[blocks]).astype(int)
    left, right = (
        values[blocks] for values in (made.conversion.epilogue.left, made.conversion.epilogue.shift)
    )
    assert (left == exponents.max(1, keepdims=True)).all() and (left - right == exponents).all()
    assert (right.any(1)).sum() <= 1
    launch = linear_launch("fc2", 64, weight, made.conversion, CONFIG)
    shifts = [i for i in launch.stream.program if isinstance(i, Alu) and i.op == AluOp.SHR]
    assert {i.immediate for i in shifts if i.immediate is not None and i.immediate < 0} >= {-1, -3}
