"""Executes an integer graph in NumPy: the answer that every compiled library must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_vitq import numerics, numerics_attention, numerics_groups
from tvm_vitq.errors import VitqError
from tvm_vitq.graph import Dataflow, data_operands, is_constant, is_movement, movement, value_of
from tvm_vitq.numerics import Array, Output, inner_scales
from tvm_vitq.numerics_groups import GroupQuantizers
from tvm_vitq.ops import attrs, op_name, probabilities_of

Attributes = dict[str, Any]


def _output(a: Attributes) -> Output:
    wide = numerics.WIDE_MAX
    return Output(a["out_dtype"], a.get("qmin", -wide), a.get("qmax", wide), a.get("kind", "multiply"))


def _quantize(a: Attributes, x: Array, inverse_scale: Array, zero: Array) -> Array:
    return numerics.int_quantize(x, inverse_scale, zero, _output(a))


def _requantize(a: Attributes, x: Array, multiplier: Array, zero: Array, input_zero: Array) -> Array:
    return numerics.int_requantize(x, multiplier, zero, input_zero, _output(a))


def _linear(a: Attributes, x: Array, w: Array, bias: Array, m: Array, zero: Array, *inner: Array) -> Array:
    if "tokens" in a:
        low, high, inverse, code_zero, scale = inner
        limits = a["code_min"], a["code_max"]
        quantizers = GroupQuantizers(a["tokens"], low, high, inverse, code_zero, *limits)
        return numerics_groups.int_group_linear(x, w, bias, m, zero, _output(a), quantizers, scale)
    return numerics.int_linear(x, w, bias, m, zero, _output(a), inner_scales(inner))


def _layer_norm(a: Attributes, x: Array, gain: Array, offset: Array) -> Array:
    return numerics.int_layer_norm(x, gain, offset, shift=a["shift"], epsilon=a["epsilon"], out=_output(a))


def _attention(a: Attributes, q: Array, k: Array, v: Array, *rest: Array) -> Array:
    score, multiplier, zero_q, zero_k, zero_v, *additive = rest
    probs = probabilities_of(a, additive)
    return numerics_attention.int_attention(
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


@dataclass(frozen=True)
class Step:
    """One operator: results by name; operands that are None come from `slots`, then leave them if `last`."""

    name: str
    execute: Callable[..., Array]
    constants: tuple[Array | None, ...]
    slots: tuple[int, ...]
    last: tuple[int, ...]
    result: int

    def __call__(self, values: list[Array | None]) -> None:
        variables = iter([values[slot] for slot in self.slots])
        values[self.result] = self.execute(*(next(variables) if c is None else c for c in self.constants))
        for slot in self.last:
            values[slot] = None


class Program:
    """An integer graph made ready to be run many times: what can be read from the graph once is read once.

    Raises VitqError at a float operator: a model with float islands has no bit-exact reference.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        graph = Dataflow(mod)
        left = {v: len(uses) for v, uses in graph.uses.items()}
        left[graph.result] = left.get(graph.result, 0) + 1
        slots: dict[relax.Var, int] = {v: n for n, v in enumerate(graph.inputs)}
        self.steps: list[Step] = []
        for binding in graph.bindings:
            value = binding.value
            alias = isinstance(value, relax.Var)
            operands = [value] if alias else data_operands(value)
            variables = [o for o in operands if not is_constant(o)]
            last = []
            for variable in variables:
                left[variable] -= 1
                if left[variable] == 0:
                    last.append(slots[variable])
            slots[binding.var] = len(slots)
            constants = tuple(value_of(o) if is_constant(o) else None for o in operands)
            execute = _same if alias else _executor(binding)
            read = tuple(slots[v] for v in variables)
            self.steps.append(
                Step(binding.var.name, execute, constants, read, tuple(last), slots[binding.var])
            )
        self.size = len(slots)
        self.result = slots[graph.result]

    def __call__(self, *inputs: Array, keep: dict[str, Array] | None = None) -> Array:
        """Result for float32 inputs of the graph's static shapes; see `run`."""
        values: list[Array | None] = [*inputs, *[None] * (self.size - len(inputs))]
        for step in self.steps:
            step(values)
            if keep is not None:
                keep[step.name] = values[step.result]  # type: ignore[assignment]
        return values[self.result]  # type: ignore[return-value]


def _same(x: Array) -> Array:
    return x


def _executor(binding: relax.VarBinding) -> Callable[..., Array]:
    value = binding.value
    if is_movement(value):
        move = movement(value)
        return lambda *arrays: np.ascontiguousarray(move(*arrays))
    if op_name(value) in EXECUTE:
        return partial(EXECUTE[op_name(value)], attrs(value))
    raise VitqError(
        "the NumPy reference runs integer operators only",
        where=binding.var.name,
        got=op_name(value),
        fix="build with strict=True to refuse models with float operators",
    )


def run(mod: tvm.IRModule, *inputs: Array, keep: dict[str, Array] | None = None) -> Array:
    """Result of an integer graph's main for float32 inputs of its static shapes.

    Every intermediate result goes into `keep`, if given, under its variable name.
    Raises VitqError at a float operator: a model with float islands has no bit-exact reference.
    """
    return Program(mod)(*inputs, keep=keep)
