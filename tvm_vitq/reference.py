"""Executes an integer graph in NumPy: the answer that every compiled library must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_vitq import numerics
from tvm_vitq.errors import VitqError
from tvm_vitq.graph import Dataflow, data_operands, is_constant, is_movement, move, value_of
from tvm_vitq.numerics import Array, Output, Partial, Probabilities
from tvm_vitq.ops import attrs, op_name

Attributes = dict[str, Any]


def _output(a: Attributes) -> Output:
    wide = numerics.WIDE_MAX
    return Output(a["out_dtype"], a.get("qmin", -wide), a.get("qmax", wide), a.get("kind", "multiply"))


def _quantize(a: Attributes, x: Array, inverse_scale: Array, zero: Array) -> Array:
    return numerics.int_quantize(x, inverse_scale, zero, _output(a))


def _requantize(a: Attributes, x: Array, multiplier: Array, zero: Array, input_zero: Array) -> Array:
    return numerics.int_requantize(x, multiplier, zero, input_zero, _output(a))


def _linear(a: Attributes, x: Array, w: Array, bias: Array, m: Array, zero: Array, *partial: Array) -> Array:
    return numerics.int_linear(x, w, bias, m, zero, _output(a), Partial(*partial) if partial else None)


def _layer_norm(a: Attributes, x: Array, gain: Array, offset: Array) -> Array:
    return numerics.int_layer_norm(x, gain, offset, shift=a["shift"], epsilon=a["epsilon"], out=_output(a))


def _attention(a: Attributes, q: Array, k: Array, v: Array, *rest: Array) -> Array:
    score, multiplier, zero_q, zero_k, zero_v, *additive = rest
    table = additive.pop(0) if a["softmax"] == "sigmoid" else None
    probs = Probabilities(a["softmax"], a["prob_max"], a["numerator"], a["shift"], a["guard"], table)
    return numerics.int_attention(
        q, k, v, score, multiplier, tuple(additive), zero_q=zero_q, zero_k=zero_k, zero_v=zero_v,
        zero_point=a["zero_point"], probs=probs, out=_output(a),
    )  # fmt: skip


def _multiply(a: Attributes, x: Array, y: Array, multiplier: Array, zero: Array) -> Array:
    return numerics.int_multiply(x, y, multiplier, zero, _output(a))


EXECUTE: dict[str, Callable[..., Array]] = {
    "vitq.int_quantize": _quantize,
    "vitq.int_requantize": _requantize,
    "vitq.int_dequantize": lambda a, x, scale, zero: numerics.int_dequantize(x, scale, zero),
    "vitq.int_linear": _linear,
    "vitq.int_lookup": lambda a, x, table: numerics.int_lookup(x, table),
    "vitq.int_add": lambda a, x, y: numerics.int_add(x, y),
    "vitq.int_multiply": _multiply,
    "vitq.int_layer_norm": _layer_norm,
    "vitq.int_attention": _attention,
    "vitq.int_mean": lambda a, x: numerics.int_mean(x, a["axis"]),
}


def run(mod: tvm.IRModule, *inputs: Array, keep: dict[str, Array] | None = None) -> Array:
    """Result of an integer graph's main for float32 inputs of its static shapes.

    Every intermediate result goes into `keep`, if given, under its variable name.
    Raises VitqError at a float operator: a model with float islands has no bit-exact reference.
    """
    graph = Dataflow(mod)
    left = {v: len(uses) for v, uses in graph.uses.items()}
    values: dict[relax.Var, Array] = dict(zip(graph.inputs, inputs, strict=True))
    for binding in graph.bindings:
        value = binding.value
        if isinstance(value, relax.Var):
            values[binding.var] = values[value]
            continue
        operands = data_operands(value)
        arrays = [value_of(o) if is_constant(o) else values[o] for o in operands]
        if is_movement(value):
            result = np.ascontiguousarray(move(value, *arrays))
        elif op_name(value) in EXECUTE:
            result = EXECUTE[op_name(value)](attrs(value), *arrays)
        else:
            raise VitqError(
                "the NumPy reference runs integer operators only",
                where=binding.var.name,
                got=op_name(value),
                fix="build with strict=True to refuse models with float operators",
            )
        values[binding.var] = result
        if keep is not None:
            keep[binding.var.name] = result
        for operand in operands:
            if isinstance(operand, relax.Var):
                left[operand] -= 1
                if left[operand] == 0:
                    del values[operand]
    return values[graph.result]
