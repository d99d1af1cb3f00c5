"""Formats, units, graph questions and the constants of each operator: values, headroom and errors."""

from __future__ import annotations

import numpy as np
import pytest
import tvm_ffi
from tvm import relax

from tvm_vitq import numerics as nm
from tvm_vitq.errors import VitqError
from tvm_vitq.formats import (
    WIDE_SMALLEST,
    Format,
    codebook_format,
    codes_format,
    gate_format,
    index_format,
    power_of_two_above,
    scalar_format,
    wide_format,
)
from tvm_vitq.graph import MOVEMENT, Dataflow, columns_read, data_operands, move, rebuild_movement
from tvm_vitq.integerize.activation import activation_input, scalar_function
from tvm_vitq.integerize.attention import ADDITIVE_MAX, additive_scores, attention_constants, probabilities
from tvm_vitq.integerize.headroom import INT32_MAX, linear_bound, require
from tvm_vitq.integerize.layer_norm import layer_norm_constants
from tvm_vitq.integerize.linear import linear_constants
from tvm_vitq.ops import call, shape_of
from tvm_vitq.plan import QuantPlan, SiteQuantizer
from tvm_vitq.units import wide_ranges

RNG = np.random.default_rng

SIGNED = (np.full((1, 1), -127), np.full((1, 1), 127))
"""Ends of the codes of 8-bit weights."""


def decode(codes: np.ndarray, f: Format) -> np.ndarray:
    scale, zero = f.broadcast(list(codes.shape))
    return scale * (codes.astype(np.float64) - zero)


# Formats


@pytest.mark.parametrize("largest", [1e-9, 2.0**-10, 0.3, 1.0, 1.5, 7.99, 8.0, 1e4])
def test_wide_format_leaves_a_factor_of_eight(largest: float) -> None:
    f = wide_format(largest)
    steps = max(largest, WIDE_SMALLEST) / float(f.scale)
    assert 2**20 <= steps < 2**21 and np.log2(f.scale) % 1 == 0
    assert f.is_wide and f.qmax == nm.WIDE_MAX and wide_format(largest).key == f.key


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_format_centres(bits: int) -> None:
    f = codes_format(bits, [0.1], [1], "tensor")
    unsigned = np.arange(2**bits)
    real = 0.1 * (unsigned - 1.0)
    assert np.array_equal(f.encode(real), unsigned - 2 ** (bits - 1))
    assert (f.qmin, f.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert f.encode(np.array([-99.0, 99.0])).tolist() == [f.qmin, f.qmax]


@pytest.mark.parametrize(
    "granularity, count, shape",
    [("token", 5, (2, 5, 6)), ("channel", 6, (2, 5, 6)), ("group", 3, (2, 5, 6)), ("head", 4, (2, 4, 5, 6))],
)
def test_broadcast_follows_the_granularity(granularity: str, count: int, shape: tuple[int, ...]) -> None:
    f = codes_format(8, np.arange(1, count + 1).tolist(), [128] * count, granularity)
    scale = np.broadcast_to(f.broadcast(list(shape))[0], shape)
    axis = {"token": -2, "head": 1}.get(granularity, -1)
    per_entry = np.moveaxis(scale, axis, 0).reshape(shape[axis], -1)
    expected = np.repeat(np.arange(1, count + 1), shape[axis] // count)
    assert np.array_equal(per_entry, np.broadcast_to(expected[:, None], per_entry.shape))


def test_one_scale_is_per_tensor_whatever_it_is_called() -> None:
    assert codes_format(8, [0.1], [3], "token").granularity == "tensor"


def test_keys_tell_formats_apart() -> None:
    one = codes_format(8, [0.1], [3], "tensor")
    assert one.key == codes_format(8, [0.1], [3], "tensor").key
    for other in (codes_format(8, [0.2], [3], "tensor"), codes_format(8, [0.1], [4], "tensor"),
                  codes_format(7, [0.1], [3], "tensor"), wide_format(1.0)):  # fmt: skip
        assert one.key != other.key


def test_unknown_granularity_is_refused() -> None:
    with pytest.raises(VitqError, match="unknown granularity"):
        codes_format(8, [1.0, 2.0], [0, 0], "row").broadcast([4, 2])


def test_index_and_gate_formats() -> None:
    f = index_format(-4.7, 3.0)
    reals = decode(np.arange(4096), f)
    assert abs(reals[0] + 4.7) <= f.scale / 2 and abs(reals[-1] - 3.0) <= f.scale / 2 and 0.0 in reals
    assert decode(np.array([nm.Array is not None]), gate_format(2.0)).shape == (1,)
    assert float(gate_format(2.0).scale) * 32767 == pytest.approx(2.0)
    for made in (index_format(-4.7, 3.0, True), gate_format(3.0, True)):
        assert np.log2(made.scale) % 1 == 0 and made.scale * (made.qmax - made.qmin) >= 6.0
    assert [power_of_two_above(v) for v in (1.0, 1.1, 2.0, 0.3)] == [1.0, 2.0, 2.0, 0.5]


# Headroom


def test_linear_bound_is_reached() -> None:
    w = RNG(0).integers(-127, 128, (4, 9)).astype(np.int8)
    bias = RNG(1).integers(-5000, 5000, 4).astype(np.float64)
    reached = max(
        abs(float(bias[n] + np.where(w[n] > 0, high, low) @ w[n].astype(np.int64)))
        for n in range(4)
        for high, low in ((127, -128), (-128, 127))
    )
    assert linear_bound(w, bias, -128, 127) == reached


def test_require_names_layer_and_fix() -> None:
    require(float(INT32_MAX), "layer", "it", "fix")
    with pytest.raises(VitqError, match="could overflow") as caught:
        require(2.0**31, "blocks.0.fc1", "the layer", "use fewer bits")
    assert "blocks.0.fc1" in str(caught.value) and "use fewer bits" in str(caught.value)


def test_layers_that_could_overflow_are_refused() -> None:
    x = codes_format(8, [0.02], [128], "tensor")
    wide = np.ones((1, 140_000))
    with pytest.raises(VitqError, match="could overflow"):
        linear_constants(wide, np.zeros(1), np.full((1, 1), 1 / 127), SIGNED, x, None, 1.0, "fc")
    with pytest.raises(VitqError, match="could overflow"):
        f = codes_format(8, [0.02], [128], "tensor")
        probs = probabilities("softmax", 8, 1 / 255, 40_000, "attn")
        attention_constants(
            f, f, f, f, probs, 1 / 255, heads=1, depth=64, keys=66_000, scale=1.0, site="attn"
        )
    far = codes_format(8, [0.02], [30_000_000], "tensor")
    with pytest.raises(VitqError, match="q @ k"):
        attention_constants(far, f, f, f, probs, 1 / 255, heads=1, depth=64, keys=4, scale=1.0, site="attn")
    with pytest.raises(VitqError, match="too many keys"):
        probabilities("softmax", 8, 1 / 255, 70_000, "attn")
    with pytest.raises(VitqError, match="unknown kind of attention"):
        probabilities("linear", 8, 1 / 255, 4, "attn")


def test_layer_norm_limits_are_refused() -> None:
    x, out = wide_format(1.0), codes_format(8, [0.05], [128], "tensor")
    layer_norm_constants(np.ones(8192), np.zeros(8192), 1e-6, x, out, "norm")
    with pytest.raises(VitqError, match="64-bit"):
        layer_norm_constants(np.ones(8193), np.zeros(8193), 1e-6, x, out, "norm")
    with pytest.raises(VitqError, match="64-bit"):
        layer_norm_constants(np.ones(1024), np.zeros(1024), 1e6, wide_format(1e-5), out, "norm")
    with pytest.raises(VitqError, match="does not fit int32"):
        layer_norm_constants(np.full(8, 1e9), np.zeros(8), 1e-6, x, out, "norm")


@pytest.mark.parametrize("gamma, beta", [(1.0, 0.0), (30.0, 5.0), (1e-3, 3.0), (0.0, 0.0), (-2.0, -1.0)])
def test_layer_norm_constants_use_the_room_they_have(gamma: float, beta: float) -> None:
    out = codes_format(8, [8 / 255], [128], "tensor")
    made = layer_norm_constants(np.full(4, gamma), np.full(4, beta), 1e-6, wide_format(1.0), out, "norm")
    used = nm.NORM_MAX * np.abs(made.gain.astype(np.int64)) + np.abs(made.offset.astype(np.int64))
    assert used.max() <= INT32_MAX and (made.shift == 30 or 2 * used.max() > INT32_MAX * 0.99)
    assert np.abs(made.gain * 2.0 ** (nm.NORM_BITS - made.shift) - gamma / out.scale).max() <= 2.0 ** (
        nm.NORM_BITS - made.shift - 1
    )


# Linear constants


def linear_case(x: Format, groups: int, *, out: Format | None, seed: int = 0, bits: int = 8) -> None:
    """Integer result of a layer against float64 arithmetic on the same codes, within its bound."""
    r = RNG(seed)
    codes = r.integers(x.qmin, x.qmax + 1, (2, 5, 24)).astype(np.int8)
    weight, bias = r.normal(0, 0.2, (7, 24)), r.normal(0, 1, 7)
    qmax = 2 ** (bits - 1) - 1
    scale = np.abs(weight.reshape(7, groups, -1)).max(-1) / qmax
    wide = np.repeat(scale, 24 // groups, axis=1)
    exact = decode(codes, x) @ (np.clip(np.rint(weight / wide), -qmax, qmax) * wide).T + bias
    ends = np.full_like(scale, -qmax), np.full_like(scale, qmax)
    made = linear_constants(weight, bias, scale, ends, x, out, float(np.abs(exact).max()), "fc")
    form = nm.Output("float32") if out is None else nm.Output(out.dtype, out.qmin, out.qmax)
    got = nm.int_linear(codes, made.weight, made.bias, made.multiplier, made.zero_point, form, made.inner)
    largest = float(np.abs(exact).max())
    if made.inner is None:  # half an accumulator unit from the bias
        inner = 0.5 * float(x.scale) * scale[:, 0]
    else:  # half a unit from the bias and from each part
        inner = np.full(7, 0.5 * (1 + len(made.inner.multiplier)) * float(wide_format(largest).scale))
    inner = inner + 8 * 2.0**-24 * largest * groups
    if out is None:
        assert np.all(np.abs(got - exact) <= inner)
    else:
        wanted = np.clip(exact / float(out.scale) + float(out.zero_point), out.qmin, out.qmax)
        assert np.all(np.abs(got - wanted) <= 0.5 + inner / float(out.scale))


OUTPUTS = [
    codes_format(8, [0.05], [100], "tensor"),
    wide_format(20.0),
    index_format(-4.7, 8.0),
    gate_format(9.0),
    None,
]


@pytest.mark.parametrize("out", OUTPUTS, ids=["codes", "wide", "index", "gate", "logits"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_linear_constants_of_every_granularity(out: Format | None, bits: int) -> None:
    r = RNG(bits)
    half = 2**bits
    tensor = codes_format(bits, [2 / half], [half // 2], "tensor")
    group = codes_format(bits, (r.uniform(1, 3, 4) / half).tolist(), r.integers(0, half, 4).tolist(), "group")
    token = codes_format(bits, (r.uniform(1, 3, 5) / half).tolist(), r.integers(0, half, 5).tolist(), "token")
    for x in (tensor, group, token):
        for groups in (1, 2, 4, 8):
            linear_case(x, groups, out=out, bits=bits, seed=groups)


@pytest.mark.parametrize(
    ("bits", "zero", "align"),
    [(4, 8, 8), (4, 7, 8), (4, 0, 8), (3, 3, 16), (3, 7, 16), (2, 1, 32), (7, 64, 1)],
)
def test_weights_with_zero_points_keep_all_codes_in_a_byte(bits, zero, align) -> None:
    """Integers are ``align * (q - zero)``, and the layer is that of the dequantized weight."""
    codes = np.arange(2**bits) - zero
    weight = np.stack([codes, codes[::-1]]) * 0.25
    x = codes_format(8, [0.5], [128], "tensor")
    ends = np.full((2, 1), -zero), np.full((2, 1), 2**bits - 1 - zero)
    scale = np.full((2, 1), 0.25)
    made = linear_constants(weight * 1.5, np.zeros(2), scale, ends, x, None, 1e3, "fc")
    assert made.weight.min() >= -127
    np.testing.assert_array_equal(made.weight[0], np.clip(np.rint(codes * 1.5), codes[0], codes[-1]) * align)
    np.testing.assert_allclose(made.multiplier * align, 0.5 * 0.25)


def test_groups_that_do_not_fit_are_refused() -> None:
    x = codes_format(8, [0.1] * 3, [128] * 3, "group")
    with pytest.raises(VitqError, match="do not fit each other"):
        linear_constants(np.ones((2, 24)), np.zeros(2), np.ones((2, 4)), SIGNED, x, None, 1.0, "fc")
    with pytest.raises(VitqError, match="larger groups"):
        linear_constants(
            np.ones((2, 512)),
            np.zeros(2),
            np.ones((2, 256)),
            SIGNED,
            codes_format(8, [0.1], [0], "tensor"),
            None,
            1.0,
            "fc",
        )
    with pytest.raises(VitqError, match="folded"):
        per_channel = codes_format(8, [0.1] * 24, [128] * 24, "channel")
        ones = np.ones((2, 24)), np.zeros(2), np.ones((2, 1))
        linear_constants(*ones, SIGNED, per_channel, None, 1.0, "fc")


@pytest.mark.parametrize("out", [OUTPUTS[0], OUTPUTS[1], None], ids=["codes", "wide", "logits"])
def test_dead_channels_keep_their_bias(out: Format | None) -> None:
    """Weights of zero, or negligible beside the bias, leave the bias as the result."""
    x = codes_format(8, [0.05], [128], "tensor")
    weight = np.zeros((5, 16))
    weight[3:] = 1e-12
    bias = np.array([0.0, 2.5, -3.1, 1.7, 4.0])
    for scale in (np.ones((5, 1)), np.full((5, 1), 1e-12 / 127)):
        made = linear_constants(weight, bias, scale, SIGNED, x, out, 4.0, "fc")
        form = nm.Output("float32") if out is None else nm.Output(out.dtype, out.qmin, out.qmax)
        codes = RNG(0).integers(-128, 128, (3, 16)).astype(np.int8)
        got = nm.int_linear(codes, made.weight, made.bias, made.multiplier, made.zero_point, form)
        wanted = np.broadcast_to(bias if out is None else out.encode(bias), got.shape)
        assert np.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_layer_whose_output_is_zero_builds() -> None:
    x = codes_format(8, [0.05] * 5, [128] * 5, "token")
    made = linear_constants(
        np.zeros((3, 8)), np.zeros(3), np.ones((3, 1)), SIGNED, x, wide_format(0.0), 0.0, "fc"
    )
    codes = RNG(0).integers(-128, 128, (1, 5, 8)).astype(np.int8)
    assert not nm.int_linear(
        codes, made.weight, made.bias, made.multiplier, 0, nm.Output("int32"), made.inner
    ).any()


# Tables and masks


def test_additive_scores() -> None:
    got = additive_scores(np.array([0.0, 1.0, -np.inf, np.inf, -1e30, 1e9]))
    assert got.tolist() == [
        0,
        round(np.log2(np.e) * 4096),
        -ADDITIVE_MAX,
        ADDITIVE_MAX,
        -ADDITIVE_MAX,
        ADDITIVE_MAX,
    ]


def test_unknown_activation_names_the_nearest() -> None:
    with pytest.raises(VitqError, match="gelu"):
        scalar_function("geluu", "mlp.act")


def test_index_ends_where_the_output_saturates() -> None:
    out = codes_format(8, [3 / 255], [10], "tensor")
    f = activation_input("gelu", 50.0, out, "act")
    low, high = decode(np.array([f.qmin, f.qmax]), f)
    assert low == pytest.approx(-4.7, abs=0.01) and high == pytest.approx(3 - 10 * 3 / 255, abs=0.1)
    narrow = activation_input("silu", 0.1, out, "act")
    assert decode(np.array([narrow.qmin, narrow.qmax]), narrow) == pytest.approx([-0.125, 0.125], abs=1e-3)


# Graph


def moves(x: relax.Var) -> list[relax.Call]:
    """One call of every movement operator and variants, on a [2, 6, 4] tensor."""
    take = relax.const(np.array([[3, 0], [1, 1]], "int64"))
    return [
        relax.op.reshape(x, (2, 2, 3, 4)),
        relax.op.permute_dims(x, [2, 0, 1]),
        relax.op.strided_slice(x, axes=[1], begin=[1], end=[5]),
        relax.op.strided_slice(x, axes=[0, 2], begin=[0, 3], end=[2, 0], strides=[1, -2]),
        relax.op.take(x, take, axis=2),
        relax.op.broadcast_to(x, (3, 2, 6, 4)),
        relax.op.concat([x, x], axis=1),
    ]


NUMPY = [
    lambda a: a.reshape(2, 2, 3, 4),
    lambda a: a.transpose(2, 0, 1),
    lambda a: a[:, 1:5],
    lambda a: a[:, :, 3:0:-2],
    lambda a: np.take(a, [[3, 0], [1, 1]], axis=2),
    lambda a: np.broadcast_to(a, (3, 2, 6, 4)),
    lambda a: np.concatenate([a, a], 1),
]


@pytest.mark.parametrize("index", range(len(NUMPY)))
def test_move_equals_numpy(index: int) -> None:
    x = relax.Var("x", relax.TensorType((2, 6, 4), "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            node = block.normalize(moves(x)[index])
            result = block.emit_output(node)
        block.emit_func_output(result)
    array = np.arange(48, dtype=np.int32).reshape(2, 6, 4)
    got = move(node, *[array] * len(data_operands(node)))
    assert np.array_equal(got, NUMPY[index](array)) and list(got.shape) == shape_of(node)
    again = relax.BlockBuilder().normalize(rebuild_movement(node, data_operands(node)))
    assert shape_of(again) == shape_of(node) and tvm_ffi.structural_equal(again, node)


def test_every_movement_is_covered() -> None:
    x = relax.Var("x", relax.TensorType((2, 6, 4), "float32"))
    assert {node.op.name for node in moves(x)} == set(MOVEMENT)


def graph_of_slices() -> Dataflow:
    """x [1, 3, 8] sliced in two on the last axis; the first half also reshaped to heads; one linear each."""
    x = relax.Var("x", relax.TensorType((1, 3, 8), "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            first = block.emit(relax.op.strided_slice(x, axes=[2], begin=[0], end=[4]), "first")
            heads = block.emit(relax.op.reshape(first, (1, 3, 2, 2)), "heads")
            turned = block.emit(relax.op.permute_dims(heads, [0, 2, 1, 3]), "turned")
            second = block.emit(relax.op.strided_slice(x, axes=[2], begin=[4], end=[8]), "second")
            a = block.emit(call("vitq.activation", [turned], site="a", kind="gelu"), "a")
            b = block.emit(call("vitq.activation", [second], site="b", kind="gelu"), "b")
            c = block.emit(relax.op.reshape(a, (1, 3, 4)), "c")
            both = block.emit(relax.op.concat([c, b], axis=2), "both")
            total = block.emit(relax.op.add(both, x), "total")
            mean = block.emit(call("vitq.mean", [total], site="m", axis=1), "mean")
            result = block.emit_output(mean)
        block.emit_func_output(result)
    return Dataflow(block.get())


def test_leaves_see_through_movement() -> None:
    graph = graph_of_slices()
    leaves = list(graph.leaves(graph.inputs[0]))
    assert sorted(leaf.consumer.var.name for leaf in leaves if leaf.consumer) == ["a", "b", "total"]
    paths = {leaf.value.name: [c.op.name.removeprefix("relax.") for c in leaf.path] for leaf in leaves}
    assert paths == {
        "turned": ["strided_slice", "reshape", "permute_dims"],
        "second": ["strided_slice"],
        "x": [],
    }
    read = {leaf.value.name: columns_read(leaf.path, [1, 3, 8]) for leaf in leaves}
    assert np.array_equal(read["turned"][0, :, 0], [[0, 1], [2, 3]]) and read["turned"].shape == (1, 2, 3, 2)
    assert np.array_equal(read["second"][0, 0], [4, 5, 6, 7]) and read["x"].shape == (1, 3, 8)
    (end,) = graph.leaves(graph.result)
    assert end.consumer is None


def test_units_join_what_is_added_moved_and_averaged() -> None:
    graph = graph_of_slices()
    names = [v.name for v in graph.uses]
    plan = QuantPlan(ranges={n: float(i + 1) for i, n in enumerate(names)} | {"a": 50.0, "mean": 99.0})
    ranges = {v.name: r for v, r in wide_ranges(graph, plan).items()}
    assert set(ranges.values()) == {99.0}  # everything hangs together through the concat and the sum
    del plan.ranges["mean"]
    assert {v.name: r for v, r in wide_ranges(graph, plan).items()}["x"] == 50.0


def test_units_count_constants_and_leave_out_what_has_no_range() -> None:
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            y = block.emit(relax.op.add(x, relax.const(np.full((1, 4), -7.0, "float32"))), "y")
            z = block.emit(call("vitq.activation", [y], site="z", kind="gelu"), "z")
            result = block.emit_output(call("vitq.activation", [z], site="w", kind="gelu"), "w")
        block.emit_func_output(result)
    ranges = wide_ranges(Dataflow(block.get()), QuantPlan(ranges={"x": 1.0, "y": 2.0, "w": 1.0}))
    assert {v.name: r for v, r in ranges.items()} == {"x": 7.0, "y": 7.0, "w": 1.0}


def test_two_blocks_are_refused() -> None:
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            y = block.emit_output(relax.op.add(x, x))
        z = block.emit(relax.op.add(y, y))
        block.emit_func_output(z)
    with pytest.raises(VitqError, match="one dataflow block"):
        Dataflow(block.get())


def test_scalar_format_is_what_it_says() -> None:
    f = scalar_format("int16", 0.5, 3, -10, 10)
    assert f.encode(np.array([0.0, 0.25, 0.75, 100.0])).tolist() == [3, 3, 5, 10]


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_attention_refuses_levels_that_count_from_an_offset(role: str) -> None:
    plain = codes_format(8, [0.02], [128], "tensor")
    shifted = SiteQuantizer(4, [2.0], [0], "lloyd_max", params={"levels": [0, 100, 255], "shift": 1.0})
    book = codebook_format(shifted, f"attn.{role}")
    operands = [book if r == role else plain for r in ("q", "k", "v")]
    probs = probabilities("softmax", 8, 1 / 255, 4, "attn")
    with pytest.raises(VitqError, match=rf"offset[\s\S]*attn\.{role}"):
        attention_constants(
            *operands, plain, probs, 1 / 255, heads=1, depth=64, keys=4, scale=1.0, site="attn"
        )
