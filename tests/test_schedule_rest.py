"""Operators that stay in float: layout, schedules and values, against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch.nn import functional
from tvm import relax

from tvm_vitq import targets
from tvm_vitq.compiler import _after_kernels
from tvm_vitq.pipeline import lower_passes, run_passes
from tvm_vitq.relax_passes import legalize_activations
from tvm_vitq.relax_passes.channels_last import channels_last
from tvm_vitq.schedules.window_rule import most_sums, tile_sizes

TARGETS = ["x86-64", "llvm"]
ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Window:
    """A convolution (groups of one or of `channels`) or, without `out`, a pooling."""

    channels: int
    out: int
    size: tuple[int, int]
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    depthwise: bool = False
    batch: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, *self.size

    @property
    def groups(self) -> int:
        return self.channels if self.depthwise else 1


CONVOLUTIONS = [
    Window(3, 16, (32, 32), 3, 2, 1),
    Window(16, 32, (14, 14), 3, 1, 1, batch=2),
    Window(32, 48, (15, 13), 3, 2, 1),
    Window(8, 24, (11, 7), 5, 1, 2),
    Window(5, 7, (9, 10), 7, 3, 3, batch=2),
    Window(24, 20, (12, 12), 1, 2),
    Window(16, 64, (17, 31), 2, 1),
    Window(16, 16, (13, 14), 3, 1, 2, dilation=2),
    Window(32, 32, (14, 14), 3, 1, 1, depthwise=True),
    Window(48, 48, (28, 15), 3, 2, 1, depthwise=True, batch=2),
    Window(24, 24, (9, 11), 5, 1, 2, depthwise=True),
    Window(16, 16, (14, 7), 7, 2, 3, depthwise=True),
    Window(16, 32, (14, 14), 3, 2, 1, depthwise=True),
    Window(6, 6, (8, 9), 3, 1, 1, depthwise=True),
]
POOLINGS = [
    Window(32, 0, (14, 14), 3, 1, 1),
    Window(24, 0, (15, 28), 3, 2, 1, batch=2),
    Window(16, 0, (8, 8), 2, 2),
    Window(7, 0, (9, 11), 5, 3, 2),
]


def compiled(
    emit: Callable[[relax.BlockBuilder, Any], Any], shape: tuple[int, ...], target: str
) -> tuple[tvm.IRModule, Callable[[np.ndarray], np.ndarray]]:
    """The scheduled module of a float graph, and the function that it computes."""
    profile = targets.parse(target)
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            out = block.emit_output(block.normalize(emit(block, x)))
        block.emit_func_output(out)
    with profile.target:
        mod = run_passes(block.get(), lower_passes(profile))
    executable = relax.build(mod, target=profile.target, relax_pipeline=_after_kernels())
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return mod, lambda array: machine["main"](tvm.runtime.tensor(array)).numpy()


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + sum(shape)).uniform(-1, 1, shape).astype("float32")


def scheduled_as_windows(mod: tvm.IRModule) -> int:
    """Functions whose sums live in registers together with what follows them."""
    texts = [f.script() for f in mod.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    return sum('scope="local"' in text and "T.unroll" in text for text in texts)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions(case: Window, target: str) -> None:
    """With bias and ReLU. A sum of n products is off by at most n + 2 roundings of sum(|products|)."""
    weight = numbers(case.out, case.channels // case.groups, case.kernel, case.kernel)
    bias = numbers(case.out)
    options = {"padding": case.padding, "dilation": case.dilation, "groups": case.groups}

    def emit(block: relax.BlockBuilder, x: Any) -> Any:
        y = relax.op.nn.conv2d(x, relax.const(weight), strides=case.stride, **options)
        return relax.op.nn.relu(relax.op.add(y, relax.const(bias.reshape(1, -1, 1, 1))))

    mod, run = compiled(emit, case.shape, target)
    assert scheduled_as_windows(mod) == 1
    x = numbers(*case.shape)

    def reference(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        operands = [change(torch.from_numpy(v).double()) for v in (x, weight, bias)]
        return functional.conv2d(*operands, stride=case.stride, **options)

    bound = (weight[0].size + 2) * ROUNDING * reference(torch.abs).numpy()
    assert (np.abs(run(x) - reference(lambda v: v).relu().numpy()) <= bound).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("case", POOLINGS, ids=str)
def test_poolings(case: Window, counted: bool, target: str) -> None:
    """Averages with and without the border in the count; the largest element is exact."""
    window = (case.kernel, case.stride, case.padding)
    x = numbers(*case.shape)
    exact = torch.from_numpy(x).double()

    mod, run = compiled(
        lambda block, x: relax.op.nn.avg_pool2d(x, *window, count_include_pad=counted), case.shape, target
    )
    assert scheduled_as_windows(mod) == 1
    want = functional.avg_pool2d(exact, *window, count_include_pad=counted).numpy()
    np.testing.assert_allclose(run(x), want, rtol=0, atol=(case.kernel**2 + 2) * ROUNDING)

    mod, run = compiled(lambda block, x: relax.op.nn.max_pool2d(x, *window), case.shape, target)
    assert scheduled_as_windows(mod) == 1
    np.testing.assert_array_equal(run(x), functional.max_pool2d(exact, *window).numpy().astype("float32"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("channels", "groups"), [(32, 1), (24, 3), (7, 1), (10, 5)])
def test_group_norm(channels: int, groups: int, target: str) -> None:
    gamma, beta = numbers(channels), numbers(channels) + 1

    def emit(block: relax.BlockBuilder, x: Any) -> Any:
        return relax.op.nn.group_norm(x, relax.const(gamma), relax.const(beta), groups, 1, [2, 3], 1e-5)

    x = numbers(2, channels, 9, 14) + 3  # a mean far from zero
    _, run = compiled(emit, x.shape, target)
    exact = functional.group_norm(*(torch.from_numpy(v).double() for v in (x,)), groups, eps=1e-5)
    want = exact.numpy() * gamma.reshape(-1, 1, 1) + beta.reshape(-1, 1, 1)
    np.testing.assert_allclose(run(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "reference", "relative", "absolute"),
    [
        ("exp", torch.exp, 2e-7, 0.0),
        ("sigmoid", torch.sigmoid, 4e-7, 0.0),
        ("tanh", torch.tanh, 0.0, 4e-7),
        ("erf", torch.erf, 0.0, 5e-7),
        ("nn.silu", functional.silu, 5e-7, 0.0),
        ("nn.gelu", functional.gelu, 0.0, 5e-7),
        ("nn.gelu_tanh", lambda v: functional.gelu(v, approximate="tanh"), 0.0, 5e-7),
    ],
)
def test_activations(name: str, reference: Any, relative: float, absolute: float, target: str) -> None:
    """`absolute` is per unit of the input where that is above 1."""
    x = np.concatenate([np.linspace(-16, 16, 1 << 14), np.geomspace(1e-30, 80, 1 << 10)]).astype("float32")
    x = np.concatenate([x, -x[-1024:], [0.0, *legalize_activations.EXP_RANGE]]).astype("float32")
    operator = relax.op
    for part in name.split("."):
        operator = getattr(operator, part)
    _, run = compiled(lambda block, x: operator(x), x.shape, target)
    want = reference(torch.from_numpy(x).double()).numpy()
    bound = relative * np.abs(want) + absolute * np.maximum(np.abs(x), 1)
    assert (np.abs(run(x) - want) <= bound).all()


def test_transposes_meet_and_cancel() -> None:
    """conv, activation, residual sum, concat, conv: one transpose on the way in, one on the way out."""
    weights = [relax.const(numbers(8, channels, 3, 3)) for channels in (8, 16)]
    scale = relax.const(numbers(8, 1, 1))

    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 8, 10, 10), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            y = block.emit(relax.op.nn.conv2d(x, weights[0], padding=1))
            y = block.emit(relax.op.nn.silu(block.emit(relax.op.multiply(y, scale))))
            y = block.emit(relax.op.add(y, x))
            y = block.emit(relax.op.concat([x, y], 1))
            out = block.emit_output(relax.op.nn.conv2d(y, weights[1], padding=1))
        block.emit_func_output(out)
    mod = block.get()
    moved = channels_last(mod)
    assert moved.script().count("R.permute_dims") == 2
    image = numbers(1, 8, 10, 10)
    results = [
        relax.VirtualMachine(tvm.compile(m, targets.parse("llvm").target), tvm.cpu())["main"](
            tvm.runtime.tensor(image)
        ).numpy()
        for m in (mod, moved)
    ]
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def test_other_graphs_stay_as_they_are() -> None:
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 8, 4, 4), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            out = block.emit_output(relax.op.nn.relu(block.emit(relax.op.permute_dims(x, [0, 3, 1, 2]))))
        block.emit_func_output(out)
    mod = block.get()
    assert channels_last(mod).same_as(mod)


def test_grouped_convolutions_keep_their_layout() -> None:
    weight = numbers(8, 4, 3, 3)
    shape = (1, 8, 9, 9)
    _, run = compiled(lambda block, x: relax.op.nn.conv2d(x, relax.const(weight), groups=2), shape, "llvm")
    want = functional.conv2d(*(torch.from_numpy(v).double() for v in (numbers(*shape), weight)), groups=2)
    np.testing.assert_allclose(run(numbers(*shape)), want.numpy(), atol=1e-5)


def test_threads_change_no_value(use_threads) -> None:
    weight = numbers(32, 16, 3, 3)
    shape = (1, 16, 28, 28)
    _, run = compiled(lambda block, x: relax.op.nn.conv2d(x, relax.const(weight), padding=1), shape, "llvm")
    results = []
    for threads in (1, 2):
        use_threads(threads)
        results.append(run(numbers(*shape)))
    np.testing.assert_array_equal(*results)


def test_tiles_divide_and_fit() -> None:
    for target in TARGETS:
        sums = most_sums(targets.parse(target).target)
        assert 1 <= sums <= 14
        for vectors in range(1, 9):
            for width in (1, 7, 13, 14, 31, 56, 128):
                for shared in (False, True):
                    count, pixels = tile_sizes(vectors, width, sums, shared)
                    assert vectors % count == width % pixels == 0 and count * pixels <= sums
    assert tile_sizes(4, 14, 14, shared=True) == (2, 7)
    assert tile_sizes(4, 14, 14, shared=False) == (1, 14)
