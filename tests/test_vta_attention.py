"""The two launches of attention against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.vta.launches.heads import Heads
from tvm_vitq.vta.launches.linear import Conversion, whole_sums
from tvm_vitq.vta.launches.scores import Scores
from tvm_vitq.vta.launches.values import layer_launch, values_launch
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.runtime.device import SimulatedDevice
from tvm_vitq.vta.runtime.program import PlacedProgram, Program
from tvm_vitq.vta.stream.epilogue import Epilogue

CONFIG = VtaConfig()


@pytest.mark.parametrize(("passes", "needs_v"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("heads", [Heads(1, 3, 197, 64, 16), Heads(2, 2, 50, 32, 16)], ids=str)
def test_attention_around_the_softmax_of_the_host(heads, passes, needs_v):
    rng = np.random.default_rng(heads.tokens)
    depth, channels = heads.channels, heads.channels
    x = rng.integers(-128, 128, (heads.batch, heads.tokens, depth)).astype(np.int8)
    weight = rng.integers(-127, 128, (3 * channels, depth)).astype(np.int8)
    bias = rng.integers(-(2**16), 2**16, 3 * channels)
    shift = rng.integers(9, 12, 3 * channels)
    scores, v = Scores("qkv", heads, weight, Epilogue(bias, shift), needs_v, CONFIG).launch()
    values = values_launch(
        "attention", heads, v, passes, 2 * 2 ** (14 + 8 * passes - 8) * heads.tokens, CONFIG
    )
    program = Program(CONFIG, {"scores": scores, "values": values})
    placed = PlacedProgram(program, SimulatedDevice(CONFIG, size=32 << 20))

    codes = np.clip((x.astype(int) @ weight.T.astype(int) + bias) >> shift, -128, 127)
    apart = codes.reshape(heads.batch, heads.tokens, 3, heads.heads, heads.width).transpose(2, 0, 3, 1, 4)
    q, k, v_codes = apart
    found, both, *transposed = placed.run("scores", x)
    expected = q @ k.swapaxes(-1, -2)
    assert np.array_equal(found.reshape(expected.shape), expected)
    assert np.array_equal(both, codes[..., : 2 * channels])
    assert len(transposed) == needs_v
    for found in transposed:
        assert np.array_equal(found, codes[..., 2 * channels :].swapaxes(1, 2))

    parts = rng.integers(-128, 128, (passes, *expected.shape)).astype(np.int8)
    whole = sum(256 ** (passes - 1 - n) * part.astype(int) for n, part in enumerate(parts))
    (found,) = placed.run("values", *parts)
    expected = (whole @ v_codes).transpose(0, 2, 1, 3).reshape(heads.batch, heads.tokens, channels)
    assert np.array_equal(found, expected)


def test_every_schedule_of_scores_gives_the_same():
    heads = Heads(1, 2, 70, 32, 16)
    rng = np.random.default_rng(5)
    weight = rng.integers(-127, 128, (192, 48)).astype(np.int8)
    x = rng.integers(-128, 128, (1, 70, 48)).astype(np.int8)
    epilogue = Epilogue(rng.integers(-(2**16), 2**16, 192), rng.integers(9, 12, 192))
    default = Scores("qkv", heads, weight, epilogue, False, CONFIG)
    codes = np.clip((x[0].astype(int) @ weight.T.astype(int) + epilogue.bias) >> epilogue.shift, -128, 127)
    q, k, _ = codes.reshape(70, 3, 2, 32).transpose(1, 2, 0, 3)
    options = list(default.options(default.schedule))
    assert len({str(option) for option in options}) > 50
    for option in [default.schedule, *options[:: len(options) // 8]]:
        assert default.accepts(option)
        made = Scores("qkv", heads, weight, epilogue, False, CONFIG, lambda choice, option=option: option)
        assert made.schedule == option and made.signature == default.signature
        launch, _ = made.launch()
        assert launch.stream.cycles(CONFIG) == default.cycles(option)
        placed = PlacedProgram(Program(CONFIG, {"scores": launch}), SimulatedDevice(CONFIG, size=8 << 20))
        assert np.array_equal(placed.run("scores", x)[0], q @ k.swapaxes(-1, -2)), option


@pytest.mark.parametrize("head", [0, 1])
def test_a_bias_that_is_no_product_in_one_head(head):
    heads = Heads(1, 2, 50, 64, 16)
    rng = np.random.default_rng(head)
    weight = rng.integers(-127, 128, (384, 128)).astype(np.int8)
    bias = rng.integers(-(2**14), 2**14, 384)
    bias[256 + 64 * head] = 400_000
    epilogue = Epilogue(bias, rng.integers(9, 12, 384))
    scores = Scores("qkv", heads, weight, epilogue, True, CONFIG)
    for option in [scores.schedule, *list(scores.options(scores.schedule))[::40]]:
        assert scores.accepts(option) and scores.cycles(option)
    launch, _ = scores.launch()
    placed = PlacedProgram(Program(CONFIG, {"scores": launch}), SimulatedDevice(CONFIG, size=8 << 20))
    x = rng.integers(-128, 128, (1, 50, 128)).astype(np.int8)
    *_, transposed = placed.run("scores", x)
    codes = np.clip(
        (x[0].astype(int) @ weight[256:].T.astype(int) + bias[256:]) >> epilogue.shift[256:], -128, 127
    )
    assert np.array_equal(transposed[0], codes.T)


def test_schedules_that_scores_cannot_have():
    heads = Heads(1, 2, 70, 32, 16)
    weight = np.ones((192, 48), np.int8)
    scores = Scores("qkv", heads, weight, Epilogue(None, np.full(192, 9)), False, CONFIG)
    good = dict(scores.schedule)
    assert scores.accepts(good)
    tile = {"rows": 1, "columns": 1, "depth": 1, "contexts": 4, "rows_last": False}
    without = {key: value for key, value in good.items() if key != "share"}
    for wrong in ({**good, "share": 8}, {**good, "layer": tile}, {**good, "scores": {"rows": 99}}, without):
        assert not scores.accepts(wrong)


def test_sums_take_as_few_bytes_as_hold_them():
    assert [whole_sums(16, largest).planes for largest in (127, 128, 32767, 32768, 2**23, 2**31 - 1)] == [
        *(1, 2, 2, 3, 4, 4)
    ]


@pytest.mark.parametrize("heads", [Heads(1, 3, 197, 64, 16), Heads(2, 2, 50, 24, 16)], ids=str)
def test_values_as_codes_of_the_layer_behind(heads):
    """Terms of rows, shifts and limits by head; channels that fill up a head change nothing."""
    rng = np.random.default_rng(heads.tokens)
    channels = heads.heads * heads.width
    weight = rng.integers(-127, 128, (3 * channels, 32)).astype(np.int8)
    shift = rng.integers(9, 12, 3 * channels)
    x = rng.integers(-128, 128, (heads.batch, heads.tokens, 32)).astype(np.int8)
    scores, v = Scores("qkv", heads, weight, Epilogue(None, shift), False, CONFIG).launch()
    layer = rng.integers(-127, 128, (40, channels)).astype(np.int8)
    held = -(-heads.tokens // 16) * 16
    by_head = [Epilogue(None, np.full(held, 13 + n), -100, 90, by_rows=True) for n in range(heads.heads)]
    made = Conversion(whole_sums(40, 2**21), "int32", False)
    behind = layer_launch("proj", heads, v, 2, by_head, layer, made, CONFIG)
    placed = PlacedProgram(
        Program(CONFIG, {"scores": scores, "proj": behind}), SimulatedDevice(CONFIG, size=32 << 20)
    )

    codes = np.clip((x.astype(int) @ weight.T.astype(int)) >> shift, -128, 127)
    shape = (heads.batch, heads.tokens, 3, heads.heads, heads.width)
    v_codes = codes.reshape(shape).transpose(2, 0, 3, 1, 4)[2]
    placed.run("scores", x)
    parts = rng.integers(-128, 128, (2, heads.batch, heads.heads, heads.tokens, heads.tokens)).astype(np.int8)
    terms = rng.integers(-(2**20), 2**20, (heads.batch, heads.heads, heads.tokens)).astype(np.int32)
    (found,) = placed.run("proj", *parts, terms)
    sums = (256 * parts[0].astype(int) + parts[1]) @ v_codes + terms[..., None]
    shifts = 13 + np.arange(heads.heads)[:, None, None]
    middle = np.clip(sums >> shifts, -100, 90).transpose(0, 2, 1, 3).reshape(heads.batch, heads.tokens, -1)
    assert len(np.unique(middle)) > 100
    assert np.array_equal(found, middle @ layer.T.astype(int))


def test_large_shifts_of_heads_that_are_filled_up():
    heads = Heads(1, 2, 16, 8, 16)
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (48, 32)).astype(np.int8)
    epilogue = Epilogue(2**22 * np.ones(48, np.int64), np.full(48, 18))
    scores, _ = Scores("qkv", heads, weight, epilogue, False, CONFIG).launch()
    placed = PlacedProgram(Program(CONFIG, {"scores": scores}), SimulatedDevice(CONFIG, size=8 << 20))
    x = rng.integers(-128, 128, (1, 16, 32)).astype(np.int8)
    _, both = placed.run("scores", x)
    codes = (x[0].astype(int) @ weight[:32].T.astype(int) + 2**22) >> 18
    found = both.reshape(16, 4, 16)  # q and k of each head, that fill up
    assert np.array_equal(found[..., :8].reshape(16, 32), codes)
    assert not found[..., 8:].any()
