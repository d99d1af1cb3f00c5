"""Hands matrix products to VTA: integer linear layers and self-attention become launches, called by number.

``int_linear(x)          -->  launch(x), then what its ALU cannot do``
``fused_attention(qkv)   -->  launch(x), softmax on the host, launch(p), its zero points and scales``

where x are the codes in front of the qkv layer. What does not become a launch stays an operator of the host,
with the reason in `notes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Expr, Var

from tvm_vitq.errors import VitqError
from tvm_vitq.graph import value_of
from tvm_vitq.integerize.codebook import largest_total
from tvm_vitq.numerics import Array, Output
from tvm_vitq.numerics_attention import Probabilities
from tvm_vitq.ops import attrs, call, dtype_of, op_name, probabilities_of, shape_of
from tvm_vitq.relax_passes.attention_expressions import BYTE_OFFSET, NEGATED_MAX
from tvm_vitq.relax_passes.rewriter import Rewriter, constant
from tvm_vitq.vta.attention import Heads, largest_code, scores_launch, values_launch
from tvm_vitq.vta.config import VtaConfig
from tvm_vitq.vta.host import LAUNCH
from tvm_vitq.vta.linear import LARGEST_SUM, Conversion, conversion, linear_launch
from tvm_vitq.vta.matmul import Choose
from tvm_vitq.vta.program import Launch, Program


class Offload:
    """The pass, and what it made. Products get the tiles that `choose` gives, see `matmul.Product`.

    program : the launches, numbered in this order.
    notes : layer -> why it stays on the host.
    """

    def __init__(self, config: VtaConfig, choose: Choose | None = None) -> None:
        self.choose = choose
        self.program = Program(config, {})
        self.notes: dict[str, str] = {}

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        return tvm.IRModule({"main": _Offload(self.program, self.notes, self.choose).transform(mod["main"])})


class _Offload(Rewriter):
    def __init__(self, program: Program, notes: dict[str, str], choose: Choose | None) -> None:
        super().__init__()
        self.choose = choose
        self.program, self.notes = program, notes
        self.config = program.config
        self.taken: set[str] = set()
        """qkv layers that attention takes into its launch."""

    def transform(self, function: relax.Function) -> relax.Function:
        for node, layer in _attentions(function):
            reason = _why_not(node, layer)
            if reason is None:
                self.taken.add(attrs(layer)["site"])
            else:
                self.notes[attrs(node)["site"]] = reason
        return super().transform(function)

    def rewrite(self, node: Call, name: str) -> Expr | None:
        try:
            if op_name(node) == "vitq.int_linear":
                return self.linear(node, attrs(node))
            if op_name(node) == "vitq.fused_attention":
                taken = attrs(node)["site"] not in self.notes
                return self.attention(node, attrs(node), name) if taken else None
        except VitqError as error:
            self.notes[attrs(node)["site"]] = error.what
        return None

    def launch(
        self, name: str, made: Launch, inputs: list[Expr], results: list[tuple[Any, str]]
    ) -> list[Expr]:
        """The call of a launch; `results` are shapes and dtypes."""
        number = constant(np.int32(len(self.program.launches)))
        self.program.launches[name] = made
        types = [relax.TensorType(shape, dtype) for shape, dtype in results]
        called = self.emit(relax.op.call_dps_packed(LAUNCH, [number, *inputs], types), f"{name}:launch")
        if len(types) == 1:
            return [called]
        return [self.emit(relax.TupleGetItem(called, n), f"{name}:result") for n in range(len(types))]

    def shaped(self, value: Expr, shape: Any, name: str) -> Expr:
        if tuple(shape_of(value)) == tuple(shape):
            return value
        return self.emit(relax.op.reshape(value, tuple(shape)), f"{name}:shaped")

    def linear(self, node: Call, info: dict[str, Any]) -> Expr | None:
        site = info["site"]
        if site in self.taken:
            return None  # nothing will read it
        x, weight, made = node.args[0], value_of(node.args[1]), _conversion(node, info)
        rows = math.prod(shape_of(x)[:-1])
        launch = linear_launch(site, rows, weight, made, self.config, self.choose)
        given = self.shaped(x, (1, rows, weight.shape[1]), site)
        (result,) = self.launch(site, launch, [given], [((1, rows, len(weight)), made.dtype)])
        result = self.shaped(result, shape_of(node), site)
        if made.finished:
            return result
        multiplier, zero = node.args[3], node.args[4]
        bias = constant(-value_of(node.args[2]))
        if info["out_dtype"] == "float32":
            return call("vitq.int_dequantize", [result, multiplier, bias], out_dtype="float32")
        limits = {key: info[key] for key in ("qmin", "qmax", "kind", "out_dtype", "site")}
        return call("vitq.int_requantize", [result, multiplier, zero, bias], **limits)

    def attention(self, node: Call, info: dict[str, Any], name: str) -> Expr | None:
        batch, count, tokens, width = info["shape"]
        heads = Heads(batch, count, tokens, width, self.config.block)
        score, multiplier, zero_q, zero_k, zero_v, *rest = node.args[3:]
        values = [value_of(a) for a in rest]
        probs = probabilities_of(info, values)
        tables, additive = rest[: len(rest) - len(values)], rest[len(rest) - len(values) :]
        layer = self.definition(node.args[0])
        qkv, codes, made = attrs(layer)["site"], layer.args[0], _conversion(layer, attrs(layer))
        first, v = scores_launch(qkv, heads, value_of(layer.args[1]), made.epilogue, self.config)
        digits = Digits.of(probs, tokens)
        largest = digits.largest * largest_code(made.epilogue)
        second = values_launch(info["site"], heads, v, probs.planes, largest, self.config, self.choose)
        if not digits.needs_v:
            first.outputs.pop()
        squares = (batch * count, tokens, tokens)
        given = self.shaped(codes, (batch, tokens, shape_of(codes)[-1]), qkv)
        results = [
            (squares, "int32"),
            ((batch, tokens, 2 * heads.channels), "int8"),
            ((batch, heads.channels, tokens), "int8"),
        ]
        acc, both, *transposed = self.launch(qkv, first, [given], results[: len(first.outputs)])
        shape = {"shape": [batch, count, tokens, width]}
        full = [
            constant(np.broadcast_to(value_of(a), (count,)).copy()) for a in (score, zero_q, zero_k, zero_v)
        ]
        score, zero_q, zero_k, zero_v = full
        t = self.emit(call("vitq.int_scores", [acc, both, score, zero_q, zero_k, *additive], **shape), name)
        kinds = ("probs", "prob_max", "prob_zero", "numerator", "shift", "guard", "relative")
        quantizer = {key: info[key] for key in kinds if key in info}
        dtype = "uint16" if probs.kind == "codebook" else "uint8"
        p = self.emit(call("vitq.int_probabilities", [t, *tables], out_dtype=dtype, **quantizer), name)
        parts = []
        for byte in reversed(range(probs.planes)):
            part = self.emit(
                call("vitq.int_byte", [p], byte=byte, negated=digits.negated, out_dtype="int8"), name
            )
            parts.append(self.shaped(part, squares, name))
        (sums,) = self.launch(info["site"], second, parts, [((batch, tokens, heads.channels), "int32")])
        scale = np.broadcast_to(value_of(multiplier), (count,))
        if info["kind"] == "shift":
            scale = np.round(-np.log2(scale)).astype(np.int32)
        zero = np.broadcast_to(np.asarray(info["zero_point"], np.int32), (count,))
        operands = [sums, p, constant(scale.copy()), zero_v, constant(zero.copy()), *transposed]
        limits = {key: info[key] for key in ("qmin", "qmax", "kind", "out_dtype", "site")}
        signs = {"offset": digits.offset, "negated": digits.negated, "by_row": probs.by_row}
        return call("vitq.int_values", operands, **shape, **signs, **limits, **quantizer)


@dataclass(frozen=True)
class Digits:
    """How p is bytes of VTA.

    negated : as digits of -p, else as bytes less an offset each, `offset` in all.
    largest : bound of the sum of their values' magnitudes over a row.
    needs_v : whether the host needs v, for the offset or for p's zero point.
    """

    negated: bool
    offset: int
    largest: int
    needs_v: bool

    @classmethod
    def of(cls, probs: Probabilities, tokens: int) -> Digits:
        """Of a quantizer of probabilities of rows of `tokens`."""
        if probs.planes == 2 and probs.qmax <= NEGATED_MAX:
            largest = largest_total(replace(probs, zero=0), tokens) if probs.kind == "codebook" else math.inf
            return cls(True, 0, int(min(tokens * probs.qmax, largest)), probs.zero != 0)
        offset = sum(BYTE_OFFSET << 8 * byte for byte in range(probs.planes))
        return cls(False, offset, tokens * offset, True)


def _conversion(node: Call, info: dict[str, Any]) -> Conversion:
    """What a layer's sums become; VitqError with the reason why it cannot be a launch."""
    x, weight, bias, multiplier, zero, *rest = node.args
    if rest or "tokens" in info or dtype_of(x) != "int8":
        raise VitqError("scales inside the sum")
    limits = {key: info[key] for key in ("qmin", "qmax", "kind") if key in info}
    operands: list[Array] = [value_of(a) for a in (weight, bias, multiplier, zero)]
    return conversion(*operands, Output(info["out_dtype"], **limits))


def _attentions(function: relax.Function) -> list[tuple[Call, Expr | None]]:
    """Every fused_attention, and the layer of which it alone reads q, k and v."""
    defined: dict[Var, Expr] = {}
    readers: dict[Var, int] = {}
    found = []
    for block in function.body.blocks:
        for binding in block.bindings:
            defined[binding.var] = binding.value
            for operand in {a for a in getattr(binding.value, "args", ()) if isinstance(a, Var)}:
                readers[operand] = readers.get(operand, 0) + 1
            if op_name(binding.value) == "vitq.fused_attention":
                found.append(binding.value)
    layers = []
    for node in found:
        source = node.args[0]
        alone = readers.get(source) == 1 and all(other.same_as(source) for other in node.args[1:3])
        layers.append((node, defined.get(source) if alone else None))
    return layers


def _why_not(node: Call, layer: Expr | None) -> str | None:
    """Why attention cannot be launches; None if it can."""
    info = attrs(node)
    if op_name(layer) != "vitq.int_linear" or not _is_plain(info):
        return "q, k and v do not come from one layer, heads one behind the other"
    try:
        made = _conversion(layer, attrs(layer))
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
