"""The two launches of attention against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.vta.attention import Heads, scores_launch, values_launch
from tvm_vitq.vta.config import VtaConfig
from tvm_vitq.vta.device import SimulatedDevice
from tvm_vitq.vta.linear import whole_sums
from tvm_vitq.vta.matmul import Epilogue
from tvm_vitq.vta.program import PlacedProgram, Program

CONFIG = VtaConfig()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("heads", [Heads(1, 3, 197, 64, 16), Heads(2, 2, 50, 32, 16)], ids=str)
def test_attention_around_the_softmax_of_the_host(heads, passes):
    rng = np.random.default_rng(heads.tokens)
    depth, channels = heads.channels, heads.channels
    x = rng.integers(-128, 128, (heads.batch, heads.tokens, depth)).astype(np.int8)
    weight = rng.integers(-127, 128, (3 * channels, depth)).astype(np.int8)
    bias = rng.integers(-(2**16), 2**16, 3 * channels)
    shift = rng.integers(9, 12, 3 * channels)
    scores, v = scores_launch("qkv", heads, weight, Epilogue(bias, shift), CONFIG)
    values = values_launch(
        "attention", heads, v, passes, 2 * 2 ** (14 + 8 * passes - 8) * heads.tokens, CONFIG
    )
    program = Program(CONFIG, {"scores": scores, "values": values})
    placed = PlacedProgram(program, SimulatedDevice(CONFIG, megabytes=32))

    codes = np.clip((x.astype(int) @ weight.T.astype(int) + bias) >> shift, -128, 127)
    apart = codes.reshape(heads.batch, heads.tokens, 3, heads.heads, heads.width).transpose(2, 0, 3, 1, 4)
    q, k, v_codes = apart
    found, both, transposed = placed.run("scores", x)
    expected = q @ k.swapaxes(-1, -2)
    assert np.array_equal(found.reshape(expected.shape), expected)
    assert np.array_equal(both, codes[..., : 2 * channels])
    assert np.array_equal(transposed, codes[..., 2 * channels :].swapaxes(1, 2))

    parts = rng.integers(-128, 128, (passes, *expected.shape)).astype(np.int8)
    whole = sum(256 ** (passes - 1 - n) * part.astype(int) for n, part in enumerate(parts))
    (found,) = placed.run("values", *parts)
    expected = (whole @ v_codes).transpose(0, 2, 1, 3).reshape(heads.batch, heads.tokens, channels)
    assert np.array_equal(found, expected)


def test_sums_take_as_few_bytes_as_hold_them():
    assert [whole_sums(16, largest).planes for largest in (127, 128, 32767, 32768, 2**23, 2**31 - 1)] == [
        *(1, 2, 2, 3, 4, 4)
    ]
