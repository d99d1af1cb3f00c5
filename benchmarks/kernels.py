"""Time of single kernels against the rate at which this core issues the dot product instruction.

python benchmarks/kernels.py                 # the best instruction set of this machine
python benchmarks/kernels.py --isa avx2 --model deit_tiny

The peak is measured, not looked up: a loop of dot products and little else, run in turns with the
kernels. One thread; times are processor time of that thread, so that other work on the machine costs
precision, not truth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from tvm_vitq import ffi, targets
from tvm_vitq.integerize.attention import probabilities, site_probabilities
from tvm_vitq.numerics import Output
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.codebook import PROBABILITY_GRID
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.attention import Attention, View
from tvm_vitq.schedules.isa import Isa, isa
from tvm_vitq.schedules.kernel import Argument, Kernel
from tvm_vitq.schedules.layer_norm import LayerNorm
from tvm_vitq.schedules.linear import Linear
from tvm_vitq.schedules.tir import TB

CODES, INDEX, WIDE = Output("int8", -128, 127), Output("uint16", 0, 4095), Output("int32")
PEAK_STEPS, PEAK_TILE = 20_000, 3


@dataclass(frozen=True)
class Model:
    """Sizes of a Vision Transformer: tokens, channels, heads (of one window), windows of an image."""

    tokens: int
    channels: int
    heads: int
    windows: int = 1


MODELS = {
    "deit_tiny": Model(197, 192, 3),
    "deit_small": Model(197, 384, 6),
    "deit_base": Model(197, 768, 12),
    "dinov2_small": Model(1370, 384, 6),
    "swin_tiny_stage1": Model(49, 96, 3, windows=64),
    "swin_tiny_stage3": Model(49, 384, 12, windows=4),
}


def kernels(name: str, model: Model, batch: int) -> dict[str, Any]:
    """Specifications of the kernels of one block, by what they are in it."""
    c, images = model.channels, batch * model.windows
    rows, depth = images * model.tokens, c // model.heads
    by_row = probabilities("softmax", 8, None, model.tokens, "benchmark")
    log2 = SiteQuantizer(4, [1.0], [0], "log2", params={"grid": PROBABILITY_GRID})
    book, _ = site_probabilities("softmax", log2, model.tokens, "benchmark")
    views = [View(0, i * c, depth, model.tokens) for i in range(3)]
    sizes = (images, model.heads, model.tokens, model.tokens, depth, depth)
    return {
        "norm": LayerNorm(rows, c, CODES),
        "qkv": Linear(name, rows, 3 * c, c, CODES, zero_point="vector"),
        "attention": Attention(name, *sizes, ((rows, 3 * c),), *views, by_row, CODES),
        "attention, log2": Attention(name, *sizes, ((rows, 3 * c),), *views, book, CODES),
        "proj + residual": Linear(name, rows, c, c, WIDE, residual=True),
        "fc1 + gelu": Linear(name, rows, 4 * c, c, INDEX, lookup="int8", zero_point="scalar"),
        "fc2 + residual": Linear(name, rows, c, 4 * c, WIDE, residual=True),
    }


def peak_kernel(target: Isa) -> Kernel:
    """Nothing but dot products: PEAK_TILE squared independent sums, right operands in registers.

    Left operands change with every step, or the compiler would take equal products out of the loop.
    """
    vector, lanes, words = target.lanes * target.step, target.lanes, 16
    sizes = {
        "left": PEAK_TILE * words * target.step,
        "right": PEAK_TILE * vector,
        "out": PEAK_TILE**2 * lanes,
    }
    dtypes = {"left": target.left_dtype("int8"), "right": "int8", "out": "int32"}
    arguments = tuple(Argument(name, (sizes[name],), dtypes[name], "input") for name in sizes)

    def emit() -> None:
        left, right, out = (tir.argument(a.name, a.shape, a.dtype) for a in arguments)
        loads = [lambda offset, n, at=i * vector: tir.load(right, at + offset, n) for i in range(PEAK_TILE)]
        vectors = [tir.let(target.load_right(load, 0)) for load in loads]
        sums = [tir.scratch(lanes, "int32") for _ in range(PEAK_TILE**2)]
        for chain in sums:
            tir.store(chain, tir.constant(0, "int32", lanes), 0, lanes)
        with TB.serial(0, PEAK_STEPS) as step:
            for i in range(PEAK_TILE):
                at = (i * words + step % words) * target.step
                word = tir.let(target.broadcast_left(tir.load(left, at, target.step), "int8"))
                for j, right_operand in enumerate(vectors):
                    chain = sums[i * PEAK_TILE + j]
                    value = target.dot(tir.load(chain, 0, lanes), word, right_operand, "int8", True)
                    tir.store(chain, value, 0, lanes)
        for i, chain in enumerate(sums):
            tir.store(out, tir.load(chain, 0, lanes), i * lanes, lanes)

    return Kernel("peak", tir.prim_func("peak", emit), arguments, PEAK_STEPS * PEAK_TILE**2 * vector)


def runner(kernel: Kernel, profile: targets.TargetProfile) -> Callable[[], None]:
    """A call of the compiled kernel on random operands; integer kernels take the same time for any."""
    executable = tvm.compile(tvm.IRModule({kernel.name: kernel.func}), profile.target)
    rng = np.random.default_rng(0)
    arrays = [(rng.random(a.shape) * 100).astype(a.dtype) for a in kernel.arguments]
    operands = [tvm.runtime.tensor(a) for a in arrays]
    function = executable[kernel.name]
    return lambda: function(*operands)


def seconds_per_call(run: Callable[[], None], budget: float) -> float:
    """Processor time of a call: the tenth percentile of many."""
    run()
    times: list[int] = []
    end = time.monotonic() + budget
    while len(times) < 5 or time.monotonic() < end:
        start = time.thread_time_ns()
        run()
        times.append(time.thread_time_ns() - start)
    return float(np.percentile(times, 10)) * 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="llvm", help="a target that this machine runs (default: llvm)")
    parser.add_argument("--isa", help="kernels of this instruction set (default: the target's)")
    parser.add_argument("--model", choices=MODELS, nargs="*", default=["deit_small"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each kernel")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    ffi.use_threads(1)
    profile = targets.parse(options.target)
    target = isa(options.isa or profile.isa)
    reference = peak_kernel(target)
    run_peak = runner(reference, profile)
    records = []
    if not options.json:
        print(f"{target.name} ({target.instruction}), {profile}")
        print(f"{'model':18} {'batch':>5} {'kernel':16} {'us':>9} {'GMAC/s':>7} {'of peak':>7}")
    for name in options.model:
        for batch in options.batch:
            for label, spec in kernels(target.name, MODELS[name], batch).items():
                kernel = spec.kernel()
                seconds = seconds_per_call(runner(kernel, profile), options.seconds)
                peak = reference.macs / seconds_per_call(run_peak, options.seconds / 5)
                rate = kernel.macs / seconds
                record = {
                    "model": name, "batch": batch, "kernel": label, "name": kernel.name, "us": seconds * 1e6,
                    "gmacs": rate * 1e-9, "peak_gmacs": peak * 1e-9,
                }  # fmt: skip
                records.append(record)
                if not options.json:
                    share = f"{rate * 1e-9:7.1f} {rate / peak:7.1%}" if kernel.macs else ""
                    print(f"{name:18} {batch:5} {label:16} {seconds * 1e6:9.1f} {share}", flush=True)
    if options.json:
        print(json.dumps({"isa": target.name, "target": str(profile), "kernels": records}, indent=1))


if __name__ == "__main__":
    main()
