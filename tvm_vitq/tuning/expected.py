"""Operators as they are lowered, on random operands, by numerics.py: what every candidate must return."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr

from tvm_vitq import numerics
from tvm_vitq.graph import Dataflow, data_operands, is_constant, is_movement, value_of
from tvm_vitq.numerics import WIDE_MAX, Array, Output
from tvm_vitq.ops import attrs, dtype_of, op_name, shape_of
from tvm_vitq.reference import EXECUTE


def example(graph: Dataflow, node: Call, rng: np.random.Generator) -> tuple[list[Array], Array]:
    """Inputs of an operator, each once, and what it gives for them.

    Parameters
    ----------
    graph : the integer graph after fusion, which says what codes a value can have.
    node : one of its operators that become kernels.
    """
    info, variables = attrs(node), [arg for arg in node.args if not is_constant(arg)]
    apart = [v for n, v in enumerate(variables) if not any(v.same_as(w) for w in variables[:n])]
    values = [_random(graph, v, rng) for v in apart]
    if "tokens" in info:
        behind = 5 + ("epilogue" in info)
        low, high = (value_of(v) for v in node.args[behind : behind + 2])
        values[0] = _in_groups(values[0].shape, info["tokens"], low, high, rng)

    def read(arg: Expr) -> Array:
        if is_constant(arg):
            return value_of(arg)
        return next(value for v, value in zip(apart, values, strict=True) if v.same_as(arg))

    arguments = [read(arg) for arg in node.args]
    if op_name(node) == "vitq.fused_attention":
        return values, _attention(info, arguments[:3], arguments[3:])
    if "epilogue" in info:
        return _fused_linear(info, arguments)
    return values, EXECUTE[op_name(node)](info, *arguments)


def _random(graph: Dataflow, value: Expr, rng: np.random.Generator) -> Array:
    dtype, shape = dtype_of(value), tuple(shape_of(value))
    low, high = (-WIDE_MAX, WIDE_MAX) if dtype == "int32" else _limits(graph, value, np.iinfo(dtype))
    return rng.integers(low, high, shape, dtype, endpoint=True)


def _in_groups(
    shape: tuple[int, ...], tokens: int, low: Array, high: Array, rng: np.random.Generator
) -> Array:
    """A wide tensor whose channels choose among all groups, each image for itself."""
    images = math.prod(shape[:-1]) // tokens
    group = rng.integers(0, len(low), (images, 1, shape[-1]))
    return rng.integers(low[group], high[group], (images, tokens, shape[-1]), np.int32, True).reshape(shape)


def _limits(graph: Dataflow, value: Expr, of_type: Any) -> tuple[int, int]:
    """Smallest and largest code of a value: those of the operator that makes it."""
    while isinstance(value, relax.Var) and value in graph.definition:
        made = graph.definition[value]
        if isinstance(made, relax.Var) or (is_movement(made) and len(data_operands(made)) == 1):
            value = made if isinstance(made, relax.Var) else data_operands(made)[0]
            continue
        info = attrs(made) if op_name(made).startswith("vitq.") else {}
        prefix = "codes_" if "codes_qmin" in info else ""
        if f"{prefix}qmin" in info and info.get("epilogue") != "lookup":
            return info[f"{prefix}qmin"], info[f"{prefix}qmax"]
        break
    return of_type.min, of_type.max


def _fused_linear(info: dict[str, Any], arguments: list[Array]) -> tuple[list[Array], Array]:
    """int_linear, then what its epilogue says; the extra operand comes behind the first five arguments."""
    first, extra, rest = arguments[:5], arguments[5], arguments[6:]
    codes = [rest.pop(0) for _ in range(2)] if info["epilogue"] == "codes" else []
    value = EXECUTE["vitq.int_linear"](info, *first, *rest)
    if info["epilogue"] == "residual":
        return [first[0], extra], numerics.int_add(value.reshape(extra.shape), extra)
    value = numerics.int_lookup(value, extra)
    if codes:
        out = Output(info["codes_dtype"], info["codes_qmin"], info["codes_qmax"])
        multiplier, zero = codes
        value = numerics.int_requantize(value, multiplier, zero, np.zeros(1, np.int32), out)
    return [first[0], extra], value


def _attention(info: dict[str, Any], sources: list[Array], rest: list[Array]) -> Array:
    """int_attention on q, k and v as their views find them; [B, T, H * D]."""
    batch, heads, queries, width = info["shape"]
    sizes = {"q": (queries, info["depth"]), "k": (info["keys"], info["depth"]), "v": (info["keys"], width)}
    qkv = []
    for (letter, (tokens, depth)), source in zip(sizes.items(), sources, strict=True):
        columns, column, head_stride, rows, row = info[f"{letter}_view"]
        b, h, t, d = np.ogrid[:batch, :heads, :tokens, :depth]
        qkv.append(source.reshape(-1, columns)[b * rows + row + t, column + h * head_stride + d])
    return EXECUTE["vitq.int_attention"](info, *qkv, *rest).transpose(0, 2, 1, 3)
