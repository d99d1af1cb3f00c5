"""The default schedule: every function that TVM makes of leftover operators keeps its values."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_vitq import targets
from tvm_vitq.schedules.default_rule import schedule_default

IMAGE = (2, 8, 14, 14)

OPERATORS = {
    "conv": lambda x: relax.op.nn.conv2d(x, weight(16, 8, 3, 3), padding=1),
    "conv_stride": lambda x: relax.op.nn.conv2d(x, weight(24, 8, 3, 3), strides=2),
    "conv_depthwise": lambda x: relax.op.nn.conv2d(x, weight(8, 1, 3, 3), padding=1, groups=8),
    "conv_odd": lambda x: relax.op.nn.conv2d(x, weight(5, 8, 2, 2), strides=3),
    "conv_odd_width": lambda x: relax.op.nn.conv2d(x, weight(16, 8, 4, 4), strides=3),
    "pool_odd": lambda x: relax.op.nn.avg_pool2d(x, 2, 3),
    "average_pool": lambda x: relax.op.nn.avg_pool2d(x, 2, 2),
    "max_pool": lambda x: relax.op.nn.max_pool2d(x, 3, 2, 1),
    "adaptive_pool": lambda x: relax.op.nn.adaptive_avg_pool2d(x, (1, 1)),
    "softmax": lambda x: relax.op.nn.softmax(x),
    "layer_norm": lambda x: relax.op.nn.layer_norm(x, weight(14), weight(14), [-1]),
    "mean": lambda x: relax.op.mean(x, [2, 3]),
    "sum": lambda x: relax.op.sum(x),
    "max": lambda x: relax.op.max(x, [1]),
    "gelu": lambda x: relax.op.nn.gelu(x),
    "transpose": lambda x: relax.op.permute_dims(x, [0, 2, 3, 1]),
    "slice": lambda x: relax.op.strided_slice(x, [2], [1], [12]),
    "concat": lambda x: relax.op.concat([x, x], 1),
    "take": lambda x: relax.op.take(x, relax.const(np.array([3, 0, 0, 7]), "int64"), 1),
    "matmul": lambda x: relax.op.matmul(x, weight(14, 40)),
    "row": lambda x: relax.op.matmul(relax.op.reshape(x, (2, 1568)), weight(1568, 10)),
}


def weight(*shape: int) -> relax.Constant:
    return relax.const(np.random.default_rng(1).uniform(-1, 1, shape).astype("float32"))


def program(name: str) -> tvm.IRModule:
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(IMAGE, "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            out = block.emit_output(block.normalize(OPERATORS[name](x)))
        block.emit_func_output(out)
    return relax.transform.LegalizeOps()(block.get())


def run(mod: tvm.IRModule) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(mod, targets.parse("llvm").target), tvm.cpu())
    x = np.random.default_rng(0).uniform(-1, 1, IMAGE).astype("float32")
    return machine["main"](tvm.runtime.tensor(x)).numpy()


@pytest.mark.parametrize("name", OPERATORS)
def test_keeps_values(name):
    """Contraction of products and sums may differ between loop nests, hence a few units in the last place."""
    mod = program(name)
    scheduled = {
        variable: schedule_default(function) if isinstance(function, tvm.tirx.PrimFunc) else function
        for variable, function in mod.functions.items()
    }
    np.testing.assert_allclose(run(tvm.IRModule(scheduled)), run(mod), rtol=2e-5, atol=2e-6)
