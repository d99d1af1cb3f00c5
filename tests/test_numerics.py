"""Every function of numerics.py against its float64 definition, within the bound of docs/numerics.md."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_vitq import numerics as nm
from tvm_vitq.formats import codes_format, scalar_format, wide_format
from tvm_vitq.integerize.activation import FUNCTIONS, activation_input, activation_table
from tvm_vitq.integerize.layer_norm import layer_norm_constants

INT8 = nm.Output("int8", -128, 127)
WIDE = nm.Output("int32")
EPS32 = 2.0**-24
"""Largest relative error of one float32 operation."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Requantization


def test_round_multiply_is_within_half_and_two_float_roundings() -> None:
    value = rng().integers(-(2**31), 2**31, 100_000).astype(np.int32)
    multiplier = np.exp2(rng(1).uniform(-32, -7, 100_000)).astype(np.float32)
    exact = value * multiplier.astype(np.float64)
    got = nm.round_multiply(value, multiplier)
    bound = 0.5 + np.abs(exact) * 2.0000001 * EPS32
    assert np.all(np.abs(got - np.clip(exact, -nm.WIDE_MAX, nm.WIDE_MAX)) <= bound)


def test_round_multiply_rounds_ties_to_even() -> None:
    got = nm.round_multiply(np.array([1, 3, 5, -1, -3, -5], np.int32), np.float32(0.5))
    assert got.tolist() == [0, 2, 2, 0, -2, -2]


def test_round_shift_rounds_ties_up() -> None:
    got = nm.round_shift(np.array([1, 3, 5, -1, -3, -5, 2**31 - 1], np.int32), np.float32(0.5))
    assert got.tolist() == [1, 2, 3, 0, -1, -2, nm.WIDE_MAX]


def test_round_shift_is_exact_for_every_shift() -> None:
    value = rng().integers(-(2**31), 2**31, 1000)
    for shift in range(32):
        exact = np.floor(value.astype(np.float64) * 2.0**-shift + 0.5)
        got = nm.round_shift(value.astype(np.int32), np.float32(2.0**-shift))
        assert np.array_equal(got, np.clip(exact, -nm.WIDE_MAX, nm.WIDE_MAX))


def test_both_kinds_agree_up_to_ties() -> None:
    value = rng().integers(-(2**24), 2**24, 100_000).astype(np.int32)
    multiply, shift = (
        getattr(nm, f"round_{kind}")(value, np.float32(2.0**-7)) for kind in ("multiply", "shift")
    )
    ties = (value & 127) == 64
    assert np.array_equal(multiply[~ties], shift[~ties])
    assert set(np.unique(shift[ties] - multiply[ties])) == {0, 1}


@pytest.mark.parametrize("kind", ["multiply", "shift"])
def test_requantize_saturates(kind: str) -> None:
    out = nm.Output("int8", -128, 127, kind)
    value = np.array([-(2**31), -(2**24), 0, 2**24, 2**31 - 1], np.int32)
    assert nm.requantize(value, np.float32(1.0), 3, out).tolist() == [-128, -128, 3, 127, 127]


def test_requantize_of_narrow_codes_clips_to_their_range() -> None:
    out = nm.Output("int8", -8, 7)
    assert nm.requantize(np.arange(-100, 101, 50), np.float32(1.0), 0, out).tolist() == [-8, -8, 0, 7, 7]


def test_requantize_of_logits_rounds_only_in_float() -> None:
    value = rng().integers(-(2**24), 2**24, 100).astype(np.int32)
    got = nm.requantize(value, np.float32(0.3), 0, nm.Output("float32"))
    assert got.dtype == np.float32 and np.array_equal(got, value.astype(np.float32) * np.float32(0.3))


def test_quantize_then_dequantize_is_within_half_a_step() -> None:
    x = rng().uniform(-3, 4.9, 1000).astype(np.float32)
    scale, zero = 8 / 255, -32
    codes = nm.int_quantize(x, 1 / scale, zero, INT8)
    back = nm.int_dequantize(codes, scale, zero)
    assert np.abs(back - x).max() <= scale * (0.5 + 1e-4)


def test_quantize_of_huge_and_infinite_images_saturates() -> None:
    x = np.array([-np.inf, -1e30, 1e30, np.inf], np.float32)
    assert nm.int_quantize(x, 100.0, 0, INT8).tolist() == [-128, -128, 127, 127]


def test_int_requantize_matches_its_formula() -> None:
    x = rng().integers(-128, 128, (4, 6)).astype(np.int8)
    zero_in, multiplier = np.arange(6, dtype=np.int32), np.linspace(0.1, 2, 6).astype(np.float32)
    got = nm.int_requantize(x, multiplier, 5, zero_in, INT8)
    exact = np.rint((x - zero_in.astype(np.float64)) * multiplier) + 5
    assert np.array_equal(got, np.clip(exact, -128, 127))


# Linear layers


@pytest.mark.parametrize("depth", [1, 3, 1024, 1025, 4096])
def test_integer_matmul_is_exact_on_both_sides_of_the_float32_limit(depth: int) -> None:
    a = rng().integers(-128, 128, (3, depth)).astype(np.int8)
    b = rng(1).integers(-128, 128, (depth, 5)).astype(np.int8)
    a[0], b[:, 0] = -128, -128
    assert nm.matmul_is_exact_in_float32(depth, 128, 128) == (depth <= 1024)
    assert np.array_equal(nm.integer_matmul(a, b), a.astype(np.int64) @ b.astype(np.int64))
    p = rng(2).integers(0, 256, (2, depth)).astype(np.uint8)
    p[0] = 255
    assert np.array_equal(nm.integer_matmul(p, b), p.astype(np.int64) @ b.astype(np.int64))


def test_int_linear_is_its_formula() -> None:
    x = rng().integers(-128, 128, (2, 3, 8)).astype(np.int8)
    w = rng(1).integers(-127, 128, (5, 8)).astype(np.int8)
    bias, m = rng(2).integers(-1000, 1000, 5).astype(np.int32), np.full(5, 0.01, np.float32)
    acc = x.astype(np.int64) @ w.T.astype(np.int64) + bias
    got = nm.int_linear(x, w, bias, m, 7, INT8)
    assert np.array_equal(got, np.clip(np.rint(acc * m.astype(np.float64)) + 7, -128, 127))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("rows", [False, True])
def test_partial_sums_round_once_per_group(groups: int, rows: bool) -> None:
    x = rng().integers(-128, 128, (2, 4, 16)).astype(np.int8)
    w = rng(1).integers(-127, 128, (5, 16)).astype(np.int8)
    m = rng(2).uniform(1, 4, (groups, 5)).astype(np.float32)
    group_bias = rng(3).integers(-500, 500, (groups, 5)).astype(np.int32)
    bias = rng(4).integers(-1000, 1000, 5).astype(np.int32)
    row_m = rng(5).uniform(0.5, 2, 4).astype(np.float32) if rows else None
    row_zero = np.array([-3, 0, 9, 100], np.int32) if rows else None
    colsum = w.reshape(5, groups, -1).sum(-1).T.astype(np.int32) if rows else None
    partial = nm.Partial(m, group_bias, row_m, row_zero, colsum)
    got = nm.int_linear(x, w, bias, np.float32(1.0), 0, WIDE, partial)
    exact = np.zeros((2, 4, 5)) + bias
    for g, part in enumerate(np.split(np.arange(16), groups)):
        dot = x[..., part].astype(np.float64) @ w[:, part].T + group_bias[g]
        if row_zero is not None and colsum is not None and row_m is not None:
            dot = (dot - row_zero[:, None] * colsum[g]) * row_m[:, None]
        exact += dot * m[g]
    assert np.abs(got - exact).max() <= groups * 0.51 and got.shape == exact.shape


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_multiples_round_nothing(groups: int) -> None:
    x = rng().integers(-128, 128, (2, 4, 16)).astype(np.int8)
    w = rng(1).integers(-127, 128, (5, 16)).astype(np.int8)
    count = rng(2).integers(1, 64, (groups, 5)).astype(np.int16)
    bias = rng(4).integers(-1000, 1000, 5).astype(np.int32)
    got = nm.int_linear(x, w, bias, np.float32(1.0), 0, WIDE, nm.Multiples(count))
    exact = x.astype(np.float64) @ (w * np.repeat(count.T.astype(np.float64), 16 // groups, 1)).T + bias
    np.testing.assert_array_equal(got, np.clip(exact, -nm.WIDE_MAX, nm.WIDE_MAX))


# Elementwise


def test_add_saturates() -> None:
    a = np.array([nm.WIDE_MAX, -nm.WIDE_MAX, 5], np.int32)
    assert nm.int_add(a, np.array([1, -1, -7], np.int32)).tolist() == [nm.WIDE_MAX, -nm.WIDE_MAX, -2]


def test_multiply_of_the_largest_gates_fits() -> None:
    a = np.array([32767, -32767], np.int16)
    got = nm.int_multiply(a, a[::-1].copy(), np.float32(2.0**-10), 0, WIDE)
    assert got.tolist() == [round(-(32767**2) / 1024)] * 2


@pytest.mark.parametrize("count", [1, 2, 3, 49, 196])
def test_mean_rounds_half_up(count: int) -> None:
    x = rng(count).integers(-nm.WIDE_MAX, nm.WIDE_MAX, (3, count, 4)).astype(np.int32)
    exact = [
        [math.floor((2 * int(c.sum()) + count) / (2 * count)) for c in row.T] for row in x.astype(object)
    ]
    assert np.array_equal(nm.int_mean(x, 1), exact)
    assert nm.int_mean(np.array([[-1, 0], [0, 1]], np.int32), 1).tolist() == [0, 1]


def test_mean_of_extreme_rows_stays_in_range() -> None:
    x = np.full((1, 5000, 2), -nm.WIDE_MAX, np.int32)
    assert np.all(nm.int_mean(x, 1) == -nm.WIDE_MAX)


# LayerNorm


def test_bit_length() -> None:
    v = np.concatenate([2 ** np.arange(63), 2 ** np.arange(1, 63) - 1, rng().integers(1, 2**62, 1000)])
    assert nm.bit_length(v.astype(np.int64)).tolist() == [int(i).bit_length() for i in v]


def test_rsqrt_seed_is_the_lowered_chord() -> None:
    """The chord of v**-0.5 over [1, 4] is 7/6 - v/6; it is farthest above the curve at v = 3**(2/3)."""
    v = 3 ** (2 / 3)
    gap = (7 / 6 - v / 6) - v**-0.5
    a, b = nm.RSQRT_SEED
    assert a == round((7 / 6 - round(gap / 2, 4)) * 2**30) and b == round(2**30 / 6)
    m = np.linspace(1, 4, 100_001)
    error = np.abs((a - b * m) / 2**30 * np.sqrt(m) - 1).max()
    assert 0.126 < error < 0.127
    for bound in (0.0242, 9e-4, 1.2e-6, 2.2e-12):  # Newton: 1.5 e**2 + 0.5 e**3 at most
        error = 1.5 * error**2
        assert error < bound


def test_rsqrt_over_all_magnitudes() -> None:
    powers = 2 ** np.arange(63, dtype=np.int64)
    v = np.concatenate([rng().integers(1, 2**63 - 1, 50_000), np.arange(1, 50_000), powers, powers[1:] - 1,
                        np.array([2**63 - 1])])  # fmt: skip
    v = np.unique(np.concatenate([v, v >> rng(1).integers(0, 62, len(v))]))[1:].astype(np.int64)
    y, s = nm.int_rsqrt(v)
    relative = y.astype(np.longdouble) * np.longdouble(2) ** (-30 - s) * np.sqrt(v.astype(np.longdouble)) - 1
    assert np.abs(relative).max() <= 4.5 * 2.0**-30
    assert y.min() >= 2**29 and y.max() <= 2**30 and s.max() == 31


def test_norm_max_is_beyond_every_row_of_1025_channels() -> None:
    x = np.zeros((1, 1025), np.int32)
    x[0, 0] = nm.WIDE_MAX
    largest = (x[0, 0] - x.mean()) / x.std()
    assert abs(largest - 32) < 1e-9 and nm.NORM_MAX == 32 * 2**nm.NORM_BITS - 1


def layer_norm_case(channels: int, deviation: float, seed: int, bits: int | None = 8) -> float:
    """Largest excess of the integer LayerNorm's error over its derived bound; negative if the bound holds."""
    r = rng(seed)
    x = np.clip(np.rint(r.normal(r.normal(0, 3), 1, (17, channels)) * deviation), -nm.WIDE_MAX, nm.WIDE_MAX)
    x = x.astype(np.int32)
    x[:, 0] = np.clip(x[:, 0] * 8, -nm.WIDE_MAX, nm.WIDE_MAX)
    gamma, beta = r.normal(1, 0.3, channels), r.normal(0, 0.5, channels)
    out = codes_format(bits, [8 / 255], [120], "tensor") if bits else wide_format(16.0)
    x_format = scalar_format("int32", 2.0**-17, 0, -nm.WIDE_MAX, nm.WIDE_MAX)
    made = layer_norm_constants(gamma, beta, 1e-6, x_format, out, "norm")
    got = nm.int_layer_norm(
        x,
        made.gain,
        made.offset,
        shift=made.shift,
        epsilon=made.epsilon,
        out=nm.Output(out.dtype, out.qmin, out.qmax),
    )
    real = x.astype(np.float64) * 2.0**-17
    variance = real.var(-1, keepdims=True) + 1e-6
    n = (real - real.mean(-1, keepdims=True)) / np.sqrt(variance)
    exact = np.clip((n * gamma + beta) / out.scale + out.zero_point, out.qmin, out.qmax)
    sigma = np.sqrt(variance) * 2.0**17
    norm_error = 2.0**-13 + np.abs(n) * (6 * EPS32 + 1 / (4 * sigma**2)) + 1 / (2 * sigma)
    bound = np.abs(gamma / out.scale) * norm_error + (np.abs(n) * 2**nm.NORM_BITS + 1) * 2.0 ** (
        -made.shift - 1
    )
    return float((np.abs(got - exact) - 0.5 - bound).max())


@pytest.mark.parametrize("channels", [8, 33, 192, 1024])
@pytest.mark.parametrize("deviation", [2.0**20, 2.0**15, 2.0**8, 30.0])
def test_layer_norm_is_within_its_bound(channels: int, deviation: float) -> None:
    assert layer_norm_case(channels, deviation, channels) <= 1e-9
    assert layer_norm_case(channels, deviation, channels + 1, bits=None) <= 1e-9
    assert layer_norm_case(channels, deviation, channels + 2, bits=4) <= 1e-9


def test_layer_norm_of_a_constant_row_is_beta() -> None:
    x = np.repeat(np.array([[0], [5], [nm.WIDE_MAX], [-nm.WIDE_MAX]], np.int32), 48, axis=1)
    beta = np.linspace(-1.99, 1.97, 48)
    out = codes_format(8, [4 / 255], [128], "tensor")
    made = layer_norm_constants(np.ones(48), beta, 1e-6, wide_format(1.0), out, "norm")
    got = nm.int_layer_norm(x, made.gain, made.offset, shift=made.shift, epsilon=made.epsilon, out=INT8)
    assert np.array_equal(got, np.broadcast_to(out.encode(beta), got.shape))


def test_layer_norm_of_extreme_rows() -> None:
    """The largest spread of wide values, and one outlier among 8192 channels, which NORM_MAX limits."""
    x = np.full((2, 8192), -nm.WIDE_MAX, np.int32)
    x[0, ::2] = nm.WIDE_MAX
    x[1, 0] = nm.WIDE_MAX
    out = wide_format(64.0)
    made = layer_norm_constants(np.ones(8192), np.zeros(8192), 1e-6, wide_format(1.0), out, "norm")
    got = nm.int_layer_norm(x, made.gain, made.offset, shift=made.shift, epsilon=made.epsilon, out=WIDE)
    assert np.allclose(got[0] * out.scale, np.where(np.arange(8192) % 2, -1, 1), atol=2.0**-12)
    assert abs(got[1, 0] * float(out.scale) - 32) < 2.0**-11


def test_epsilon_counts() -> None:
    """With a variance far below eps the result is (x - mean) / sqrt(eps), not (x - mean) / std."""
    x = (rng().normal(0, 1e-5, (4, 64)) * 2**30).astype(np.int32)
    x_format, out = wide_format(1e-4), wide_format(1.0)
    assert float(x_format.scale) == 2.0**-30
    made = layer_norm_constants(np.ones(64), np.zeros(64), 1e-4, x_format, out, "norm")
    got = nm.int_layer_norm(x, made.gain, made.offset, shift=made.shift, epsilon=made.epsilon, out=WIDE)
    real = x * 2.0**-30
    exact = (real - real.mean(-1, keepdims=True)) / np.sqrt(real.var(-1, keepdims=True) + 1e-4)
    assert np.abs(got * float(out.scale) - exact).max() < 2.0**-12


# Tables


@pytest.mark.parametrize("kind", sorted(FUNCTIONS))
@pytest.mark.parametrize("largest", [0.5, 4.0, 30.0])
def test_function_tables_are_within_their_bound(kind: str, largest: float) -> None:
    x = rng().uniform(-1.25 * largest, 1.25 * largest, 20_000)
    y = FUNCTIONS[kind].formula(x)
    low, high = min(float(y.min()), 0.0), float(y.max())
    step = (high - low) / 255
    out = codes_format(8, [step], [round(-low / step)], "tensor")
    index = activation_input(kind, largest, out, "act")
    got = nm.int_lookup(index.encode(x), activation_table(kind, index, out, "act"))
    exact = np.clip(y / step + float(out.zero_point), -128, 127)
    slope = np.abs(np.gradient(FUNCTIONS[kind].formula(np.linspace(-8, 8, 16001)), 1e-3)).max() * 1.001
    bound = 0.5 + (slope * float(index.scale) / 2 + 2.0**-16) / step
    assert np.abs(got - exact).max() <= bound + 1e-9
    assert bound < 0.9


@pytest.mark.parametrize("kind", sorted(FUNCTIONS))
def test_functions_are_flat_or_the_identity_outside_their_limits(kind: str) -> None:
    f = FUNCTIONS[kind]
    below = f.formula(np.linspace(f.low - 30, f.low, 1000))
    assert np.abs(below - below[-1]).max() <= 2.0**-16
    if f.high is None:
        x = np.linspace(-f.low + 0.5, 50, 1000)
        assert np.abs(f.formula(x) - x).max() <= 2.0**-12
    else:
        above = f.formula(np.linspace(f.high, f.high + 30, 1000))
        assert np.abs(above - above[0]).max() <= 2.0**-16
