"""Float operators of hybrid models against the same operators in ONNX Runtime; with --profile, whole models.

python benchmarks/hybrids.py --models levit_128s mobilevit_xxs
python benchmarks/hybrids.py --profile

Convolutions and poolings that stay in float are cut out of the model and compiled alone. One thread, both
sides in turns; times are processor time of that thread, so that other work on the machine costs precision,
not truth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx import helper, numpy_helper
from recipes import build, quick, synthetic
from tvm import relax

from tvm_vitq import ffi, targets
from tvm_vitq.frontend import import_model
from tvm_vitq.frontend.canonicalize import bindings_of
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.pipeline import lower_passes, run_passes
from tvm_vitq.relax_passes.rewriter import int_list

MODELS = (
    "levit_128s", "poolformer_s12", "mobilevit_xxs", "tiny_vit_5m_224", "efficientformer_l1", "pit_ti_224",
)  # fmt: skip
OPERATORS = {
    "relax.nn.conv2d": "Conv",
    "relax.nn.avg_pool2d": "AveragePool",
    "relax.nn.max_pool2d": "MaxPool",
}


def label(call: Any) -> str:
    """What tells one operator from another."""
    x, attrs = shape_of(call.args[0]), call.attrs
    channels, size = x[1], "x".join(map(str, x[2:]))
    stride = int_list(attrs["strides"])[0]
    if op_name(call) != "relax.nn.conv2d":
        window = int_list(attrs["pool_size"])[0]
        return f"{OPERATORS[op_name(call)]} {channels}x{size} {window}x{window}/{stride}"
    out, _, window, _ = shape_of(call.args[1])
    kind = "depthwise" if int(attrs["groups"]) > 1 else "conv"
    return f"{kind} {channels}x{size} to {out} {window}x{window}/{stride}"


def function_of(call: Any, profile: targets.TargetProfile) -> Callable[[], None]:
    """The operator alone as this compiler builds it, between channels-last tensors as inside of a model."""
    block = relax.BlockBuilder()
    n, c, h, w = shape_of(call.args[0])
    x = relax.Var("x", relax.TensorType((n, h, w, c), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            first = block.emit(relax.op.permute_dims(x, [0, 3, 1, 2]))
            made = block.emit(tvm.ir.Call(call.op, [first, *call.args[1:]], call.attrs, call.ty_args))
            out = block.emit_output(relax.op.permute_dims(made, [0, 2, 3, 1]))
        block.emit_func_output(out)
    with profile.target:
        mod = run_passes(block.get(), lower_passes(profile))
    (function,) = (f for f in mod.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    function = function.with_attr("global_symbol", "run")
    executable = tvm.compile(tvm.IRModule({"run": function}), profile.target)
    rng = np.random.default_rng(0)
    shapes = [[int(v) for v in p.shape] for p in function.params]
    operands = [tvm.runtime.tensor(rng.random(shape, dtype="float32")) for shape in shapes]
    run = executable["run"]
    return lambda: run(*operands)


def session_of(call: Any) -> Callable[[], None]:
    """The operator alone in ONNX Runtime."""
    attrs, shape = call.attrs, shape_of(call.args[0])
    options = {"strides": int_list(attrs["strides"]), "pads": int_list(attrs["padding"])}
    weights = []
    rng = np.random.default_rng(0)
    if op_name(call) == "relax.nn.conv2d":
        weights = [numpy_helper.from_array(rng.random(shape_of(call.args[1]), dtype="float32"), "w")]
        options["group"] = int(attrs["groups"])
    else:
        options["kernel_shape"] = int_list(attrs["pool_size"])
    if op_name(call) == "relax.nn.avg_pool2d":
        options["count_include_pad"] = int(attrs["count_include_pad"])
    node = helper.make_node(OPERATORS[op_name(call)], ["x", *(w.name for w in weights)], ["y"], **options)
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape_of(call))
    graph = helper.make_graph([node], "operator", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = chosen.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), chosen, ["CPUExecutionProvider"])
    feed = {"x": rng.random(shape, dtype="float32")}
    return lambda: session.run(None, feed)


def in_turns(ours: Callable[[], None], theirs: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Milliseconds of processor time of each: the tenth percentiles."""
    times: list[list[int]] = []
    end = time.monotonic() + seconds
    while len(times) < 10 or time.monotonic() < end:
        row = []
        for run in (ours, theirs):
            start = time.thread_time_ns()
            run()
            row.append(time.thread_time_ns() - start)
        times.append(row)
    first, second = np.percentile(np.array(times[2:]), 10, axis=0) * 1e-6
    return float(first), float(second)


def shares(model: Any) -> dict[str, float]:
    """Milliseconds of a call of the quantized model: integer kernels, everything else, all of it."""
    library = build(model, "w8a8", quick("minmax"), synthetic(model, 2))
    kernels = library.profile()
    integer = sum(k.milliseconds for k in kernels if k.name.startswith("vitq_"))
    runtime = sum(k.milliseconds for k in kernels if k.name.startswith("vm."))
    rest = sum(k.milliseconds for k in kernels) - integer - runtime
    return {"integer_ms": integer, "rest_ms": rest, "ms": library.benchmark()["median_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names; random weights")
    parser.add_argument("--target", default="llvm", help="a target that this machine runs (default: llvm)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each operator")
    parser.add_argument("--profile", action="store_true", help="time in integer kernels and outside of them")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    options = parser.parse_args()

    ffi.use_threads(1)
    profile = targets.parse(options.target)
    for name in options.models:
        model = import_model(name)
        operators: dict[str, list[Any]] = {}
        for binding in bindings_of(model.mod):
            if op_name(binding.value) in OPERATORS:
                operators.setdefault(label(binding.value), []).append(binding.value)
        total = np.zeros(2)
        for text, calls in operators.items():
            ours, theirs = in_turns(function_of(calls[0], profile), session_of(calls[0]), options.seconds)
            total += len(calls) * np.array([ours, theirs])
            row = {"model": name, "operator": text, "calls": len(calls), "ms": ours, "onnxruntime_ms": theirs}
            line = f"{name:20} {text:34} {len(calls):2} {ours:8.3f} {theirs:8.3f} {ours / theirs:6.2f}"
            print(json.dumps(row) if options.json else line, flush=True)
        if not options.json:
            print(f"{name:20} {'all of them':37} {total[0]:8.3f} {total[1]:8.3f} {total[0] / total[1]:6.2f}")
        if options.profile:
            row = {"model": name, **shares(model)}
            line = (
                f"{name:20} integer kernels {row['integer_ms']:.2f} ms, rest {row['rest_ms']:.2f} ms, "
                f"a call {row['ms']:.2f} ms"
            )
            print(json.dumps(row) if options.json else line, flush=True)


if __name__ == "__main__":
    main()
