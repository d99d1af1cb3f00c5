"""Linear layers on VTA against numerics.py: on the ALU what shifts can do, else the sums."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.numerics import Output, int_linear, requantize
from tvm_vitq.vta.launches.linear import Conversion, conversion, linear_launch
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.runtime.device import SimulatedDevice
from tvm_vitq.vta.runtime.program import PlacedProgram, Program

CONFIG = VtaConfig()
CODES = Output("int8", -128, 127, "shift")


def layer(columns: int, depth: int, low: int = 8, high: int = 11, seed: int = 0):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (columns, depth)).astype(np.int8)
    bias = rng.integers(-(2**16), 2**16, columns).astype(np.int32)
    multiplier = 2.0 ** -rng.integers(low, high, columns)
    return weight, bias, multiplier.astype(np.float32)


def run(x: np.ndarray, weight: np.ndarray, made: Conversion) -> np.ndarray:
    program = Program(CONFIG, {"fc": linear_launch("fc", len(x), weight, made, CONFIG)})
    return PlacedProgram(program, SimulatedDevice(CONFIG, size=16 << 20)).run("fc", x)[0][0]


@pytest.mark.parametrize("rows", [1, 50, 197])
@pytest.mark.parametrize(
    ("out", "zero", "shifts"),
    [
        (CODES, 0, (8, 11)),
        (CODES, -7, (9, 10)),
        (Output("int8", -8, 7, "shift"), 3, (11, 14)),
        (CODES, 100, (0, 3)),
        (CODES, 5, (17, 19)),
        (Output("uint16", 0, 4095, "shift"), 1000, (4, 7)),
    ],
    ids=str,
)
def test_shifts_are_the_alu_s(rows, out, zero, shifts):
    weight, bias, multiplier = layer(80, 64, *shifts)
    x = np.random.default_rng(rows).integers(-128, 128, (rows, 64)).astype(np.int8)
    made = conversion(weight, bias, multiplier, np.array([zero]), out)
    assert made.finished and made.dtype == out.dtype
    found = run(x, weight, made)
    assert np.array_equal(found, int_linear(x, weight, bias, multiplier, zero, out))


def test_zero_points_by_channel():
    weight, bias, multiplier = layer(48, 64)
    x = np.random.default_rng(1).integers(-128, 128, (20, 64)).astype(np.int8)
    zero = np.arange(48, dtype=np.int32) - 20
    made = conversion(weight, bias, multiplier, zero, CODES)
    assert np.array_equal(run(x, weight, made), int_linear(x, weight, bias, multiplier, zero, CODES))


@pytest.mark.parametrize(
    ("out", "shifts", "bias"),
    [
        (Output("int8", -128, 127, "multiply"), (8, 11), 0),
        (Output("int32", kind="shift"), (0, 3), 0),
        (Output("float32"), (8, 11), 0),
        (CODES, (0, 17), 0),
        (CODES, (31, 32), 0),
        (CODES, (8, 11), 2**31 - 2**18),
    ],
    ids=str,
)
def test_everything_else_is_sums(out, shifts, bias):
    """Multipliers that are no shifts, results of more than two bytes, shifts out of reach, constants that
    do not fit: the host finishes.
    """
    weight, _, multiplier = layer(200, 64, *shifts)
    biases = np.full(200, bias, np.int32)
    x = np.random.default_rng(2).integers(-128, 128, (30, 64)).astype(np.int8)
    made = conversion(weight, biases, multiplier, np.array([3]), out)
    assert not made.finished and made.dtype == "int32"
    found = requantize(run(x, weight, made) + biases, multiplier, 3, out)
    assert np.array_equal(found, int_linear(x, weight, biases, multiplier, 3, out))


@pytest.mark.parametrize(
    "config",
    [
        VtaConfig(log_inp_bytes=12),
        VtaConfig(log_uop_bytes=6, log_block=3, log_inp_bytes=9, log_wgt_bytes=12, log_acc_bytes=13),
        VtaConfig(log_uop_bytes=8, log_block=5, log_inp_bytes=12, log_wgt_bytes=18, log_acc_bytes=15),
    ],
    ids=lambda config: config.text,
)
@pytest.mark.parametrize("rows", [1, 16, 119])
def test_machines_with_few_inputs_or_micro_ops(config, rows):
    """Tiles are chosen that their instructions can say."""
    weight, bias, multiplier = layer(384, 192)
    x = np.random.default_rng(rows).integers(-128, 128, (rows, 192)).astype(np.int8)
    made = conversion(weight, bias, multiplier, np.array([0]), CODES)
    program = Program(config, {"fc": linear_launch("fc", rows, weight, made, config)})
    found = PlacedProgram(program, SimulatedDevice(config, size=16 << 20)).run("fc", x)[0][0]
    assert np.array_equal(found, int_linear(x, weight, bias, multiplier, 0, CODES))
