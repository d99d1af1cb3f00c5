"""The canonical float operators back to Relax's own, for running a float graph with TVM."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_vitq import ops
from tvm_vitq.errors import VitqError
from tvm_vitq.ops import op_name
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    Rewriter,
    constant,
    is_constant,
    layer_of,
    rewriting_pass,
    value_of,
)


def _number(value: float) -> Expr:
    return relax.const(value, "float32")


def quick_gelu(x: Expr) -> Expr:
    return relax.op.multiply(x, relax.op.sigmoid(relax.op.multiply(x, _number(1.702))))


def hardswish(x: Expr) -> Expr:
    clipped = relax.op.clip(relax.op.add(x, _number(3.0)), 0.0, 6.0)
    return relax.op.multiply(x, relax.op.multiply(clipped, _number(1 / 6)))


ACTIVATIONS = {
    "gelu": relax.op.nn.gelu,
    "gelu_tanh": relax.op.nn.gelu_tanh,
    "silu": relax.op.nn.silu,
    "sigmoid": relax.op.sigmoid,
    "relu": relax.op.nn.relu,
    "tanh": relax.op.tanh,
    "quick_gelu": quick_gelu,
    "hardswish": hardswish,
}


class DecomposeCanonical(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        operator, attributes = op_name(call), ops.attrs(call) if ops.is_ours(call) else {}
        if operator == "vitq.linear":
            x, weight, bias = call.args
            swapped = constant(value_of(weight).T) if is_constant(weight) else relax.op.permute_dims(weight)
            return relax.op.add(relax.op.matmul(x, swapped), bias)
        if operator == "vitq.layer_norm":
            return relax.op.nn.layer_norm(*call.args, axes=[-1], epsilon=attributes["eps"])
        if operator == "vitq.activation":
            if attributes["kind"] not in ACTIVATIONS:
                raise VitqError(
                    "unknown activation",
                    where=attributes["site"],
                    got=attributes["kind"],
                    expected=sorted(ACTIVATIONS),
                )
            return ACTIVATIONS[attributes["kind"]](call.args[0])
        if operator == "vitq.attention":
            return self.attention(call, attributes, name)
        if operator == "vitq.mean":
            return relax.op.mean(call.args[0], attributes["axis"])
        return call.args[0] if operator == "vitq.quantize" else None

    def attention(self, call: Call, attributes: dict, name: str) -> Expr:
        q, k, v, *additive = call.args
        layer = layer_of(name)
        swapped = self.emit(relax.op.permute_dims(k, [0, 1, 3, 2]), f"{layer}:permute")
        scores = relax.op.multiply(relax.op.matmul(q, swapped), _number(attributes["scale"]))
        for term in additive:
            scores = self.emit(relax.op.add(scores, term), f"{layer}:scores")
        probabilities = relax.op.sigmoid if attributes["kind"] == "sigmoid" else relax.op.nn.softmax
        weights = self.emit(probabilities(scores), f"{layer}:{attributes['kind']}")
        return relax.op.matmul(weights, v)


def decompose_canonical() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(DecomposeCanonical, "DecomposeCanonical")


def run_float(mod: tvm.IRModule, images: np.ndarray) -> np.ndarray:
    """Logits of a float graph, compiled plainly for this machine: slow, meant for small graphs and checks."""
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})  # compiling takes longer than running
    executable = tvm.compile(decompose_canonical()(mod), target=target)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](tvm.runtime.tensor(images)).numpy()
