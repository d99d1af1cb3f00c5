"""Which parts of an integer graph can be launches of VTA, and what of their arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr, Var

from tvm_vitq.errors import VitqError
from tvm_vitq.graph import data_operands, is_constant, is_movement, value_of
from tvm_vitq.integerize.codebook import largest_total
from tvm_vitq.numerics import Array, Output
from tvm_vitq.numerics_attention import Probabilities
from tvm_vitq.ops import attrs, dtype_of, op_name, probabilities_of, shape_of
from tvm_vitq.relax_passes.attention_expressions import BYTE_OFFSET, NEGATED_MAX
from tvm_vitq.relax_passes.rewriter import constant, variables
from tvm_vitq.vta.launches.linear import LARGEST_SUM, Conversion, conversion
from tvm_vitq.vta.launches.residual import Residual
from tvm_vitq.vta.launches.scores import largest_code
from tvm_vitq.vta.stream.epilogue import Epilogue


@dataclass(frozen=True)
class Digits:
    """How p is bytes of VTA.

    negated : as digits of -p, else as bytes less an offset each, `offset` in all.
    largest : bound of the sum of their values' magnitudes over a row.
    needs_v : whether the host needs v, for the offset or for p's zero point.
    passes : bytes.
    """

    passes: int
    negated: bool
    offset: int
    largest: int
    needs_v: bool

    @classmethod
    def of(cls, probs: Probabilities, tokens: int) -> Digits:
        """Of a quantizer of probabilities of rows of `tokens`."""
        if probs.planes == 2 and probs.qmax <= NEGATED_MAX:
            largest = largest_total(replace(probs, zero=0), tokens) if probs.kind == "codebook" else math.inf
            return cls(2, True, 0, int(min(tokens * probs.qmax, largest)), probs.zero != 0)
        offset = sum(BYTE_OFFSET << 8 * byte for byte in range(probs.planes))
        return cls(probs.planes, False, offset, tokens * offset, True)


def largest_of(codes: Expr) -> int:
    """Largest magnitude of the int8 codes that an operator returns."""
    if op_name(codes) == "vitq.int_lookup":
        return int(np.abs(value_of(codes.args[1]).astype(np.int32)).max())
    info = attrs(codes) if op_name(codes).startswith("vitq.") else {}
    return max(abs(info["qmin"]), abs(info["qmax"])) if info.get("out_dtype") == "int8" else 128


def layer_conversion(node: Call, largest: int = 128) -> Conversion:
    """What a layer's sums become, of codes of at most `largest` in magnitude; VitqError with the reason why
    it cannot be a launch.
    """
    info = attrs(node)
    x, weight, bias, multiplier, zero, *rest = node.args
    if rest or "tokens" in info or dtype_of(x) != "int8":
        raise VitqError("scales inside the sum")
    limits = {key: info[key] for key in ("qmin", "qmax", "kind") if key in info}
    operands: list[Array] = [value_of(a) for a in (weight, bias, multiplier, zero)]
    return conversion(*operands, Output(info["out_dtype"], **limits), largest)


@dataclass(frozen=True)
class Attention:
    """Attention between two layers.

    node : the fused_attention.
    before : the layer of which it alone reads q, k and v;  behind : the one that alone reads its result.
    """

    node: Call
    before: Expr | None
    behind: Call | None


def attentions(function: relax.Function) -> list[Attention]:
    """Those of a function."""
    defined: dict[Var, Expr] = {}
    readers: dict[Var, list[tuple[Var, Expr]]] = {}
    for block in function.body.blocks:
        for binding in block.bindings:
            defined[binding.var] = binding.value
            for operand in {a for a in getattr(binding.value, "args", ()) if isinstance(a, Var)}:
                readers.setdefault(operand, []).append((binding.var, binding.value))
    found = []
    for var, node in defined.items():
        if op_name(node) == "vitq.fused_attention":
            source = node.args[0]
            same = all(other.same_as(source) for other in node.args[1:3])
            alone = same and len(readers.get(source, [])) == 1
            found.append(Attention(node, defined.get(source) if alone else None, _behind(var, readers)))
    return found


def _behind(var: Var, readers: dict[Var, list[tuple[Var, Expr]]]) -> Call | None:
    """The int_linear that alone reads a tensor, reshaped at most; its channels as they are."""
    channels = shape_of(var)[-1]
    while len(readers.get(var, [])) == 1:
        ((result, value),) = readers[var]
        if op_name(value) == "vitq.int_linear" and shape_of(value.args[0])[-1] == channels:
            return value if value.args[0].same_as(var) else None
        if op_name(value) != "relax.reshape":
            return None
        var = result
    return None


def why_not(attention: Attention) -> str | None:
    """Why attention cannot be launches; None if it can."""
    node, layer = attention.node, attention.before
    info = attrs(node)
    if op_name(layer) != "vitq.int_linear" or not _is_plain(info):
        return "q, k and v do not come from one layer, heads one behind the other"
    try:
        made = layer_conversion(layer)
    except VitqError as error:
        return error.what
    if not made.finished or made.dtype != "int8":
        return "q, k and v are no shifts of sums"
    tokens = info["shape"][2]
    digits = Digits.of(probabilities_of(info, [value_of(a) for a in node.args[8:]]), tokens)
    if 2 * digits.largest * largest_code(made.epilogue) > LARGEST_SUM:
        return f"products with {tokens} probabilities do not fit 32 bits"
    return None


def _is_plain(info: dict[str, Any]) -> bool:
    """q, k and v as timm's qkv layers have them: all heads of q, then of k, then of v, rows by token."""
    batch, heads, tokens, width = info["shape"]
    channels = heads * width
    rows = tokens if batch > 1 else 0
    views = [[3 * channels, n * channels, width if heads > 1 else 0, rows, 0] for n in range(3)]
    same = info["keys"] == tokens and info["depth"] == width
    return same and [list(info[f"{letter}_view"]) for letter in "qkv"] == views


@dataclass(frozen=True)
class Codes:
    """The result of attention as codes on VTA, which has the negated sums of ``p v``: ``~c = -1 - c``,

    ``~(clip(((o + half) >> s) + z)) = clip((-o - half - (z << s) - 1) >> s, -1 - qmax, -1 - qmin)``

    epilogues : of each head, without a bias;  constant : int32 [heads], added to each row's sums beside
        ``zero_v sum(p)``.
    """

    epilogues: list[Epilogue]
    constant: Array

    @classmethod
    def of(cls, node: Call, digits: Digits, zero_v: Array, block: int) -> Codes | None:
        """Of a fused_attention; None where shifts do not give them."""
        info, heads = attrs(node), attrs(node)["shape"][1]
        if info["kind"] != "shift" or info["out_dtype"] != "int8" or not digits.negated or digits.needs_v:
            return None
        scale = np.broadcast_to(value_of(node.args[4]), (heads,)).astype(np.float64)
        shift = np.round(-np.log2(scale)).astype(np.int64)
        zero = np.broadcast_to(np.asarray(info["zero_point"], np.int64), (heads,))
        if shift.min() < 0 or shift.max() > 30:
            return None
        half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
        constant = -half - (zero << shift) - 1
        most = digits.largest * (128 + int(np.abs(zero_v).max())) + int(np.abs(constant).max())
        if most > LARGEST_SUM:
            return None
        rows = -(-info["shape"][2] // block) * block
        limits = -1 - info["qmax"], -1 - info["qmin"]
        epilogues = [Epilogue(None, np.full(rows, s), *limits, by_rows=True) for s in shift]
        return cls(epilogues, constant.astype(np.int32))


def complemented(layer: Call) -> Call | None:
    """The layer with weights and bias for ``~x`` instead of x: ``w x + b = -w ~x + b - sum(w)``. None where
    these do not fit.
    """
    x, weight, bias, *rest = layer.args
    negated = -value_of(weight).astype(np.int32)
    changed = value_of(bias).astype(np.int64) + negated.sum(1)
    if negated.max() > 127 or np.abs(changed).max() > LARGEST_SUM:
        return None
    operands = [x, constant(negated.astype(np.int8)), constant(changed.astype(np.int32)), *rest]
    return relax.Call(layer.op, operands, layer.attrs)


def residual_sums(function: relax.Function) -> dict[str, str | None]:
    """Layers whose results are but added to the residual stream, by site, and why a sum cannot be VTA's."""
    defined: dict[Var, Expr] = {}
    readers: dict[Var, int] = {}
    for block in function.body.blocks:
        for binding in block.bindings:
            defined[binding.var] = binding.value
            for var in variables(binding.value):
                readers[var] = readers.get(var, 0) + 1
    found: dict[str, str | None] = {}
    for node in defined.values():
        if op_name(node) != "vitq.int_add":
            continue
        for own, other in (node.args, reversed(node.args)):
            if is_constant(other):
                continue
            path, layer = [], own
            while readers.get(layer) == 1 and is_movement(moved := defined.get(layer)):
                if len(data_operands(moved)) != 1:
                    break
                path.append(op_name(moved))
                (layer,) = data_operands(moved)
            layer = defined.get(layer) if readers.get(layer) == 1 else None
            if op_name(layer) == "vitq.int_linear" and math.prod(shape_of(other)) == math.prod(shape_of(own)):
                moved = any(name != "relax.reshape" for name in path)
                found[attrs(layer)["site"]] = "rows move between the layer and the sum" if moved else None
                break
    return found


def residual_of(layer: Call, block: int, largest: int) -> Residual:
    """The sum behind a layer on VTA, of codes of at most `largest`; VitqError with the reason why not."""
    layer_conversion(layer)
    info = attrs(layer)
    weight, bias, multiplier, zero = (value_of(a) for a in layer.args[1:5])
    if zero.any():
        raise VitqError("the layer's result has a zero point")
    out = Output(info["out_dtype"], **{key: info[key] for key in ("qmin", "qmax", "kind") if key in info})
    return Residual.of(weight, bias, multiplier, out, block, largest)
