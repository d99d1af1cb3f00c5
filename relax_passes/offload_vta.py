"""Hands matrix products to VTA: integer linear layers and self-attention become launches, called by number.

``int_linear(x)                      -->  launch(x), then what its ALU cannot do``
``int_linear(fused_attention(qkv))   -->  launch(x), softmax on the host, launch(p, terms of rows)``
``fused_attention(qkv)               -->  launch(x), softmax on the host, launch(p), its zero points, scales``
``int_add(int_linear(x), stream)     -->  launch(x, stream), the limits on the host``

where x are the codes in front of the qkv layer; the second form is that of attention whose result shifts
make codes of. What does not become a launch stays an operator of the host, with the reason in `notes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Expr

from tvm_vitq.errors import VitqError
from tvm_vitq.graph import data_operands, is_movement, value_of
from tvm_vitq.numerics import Array
from tvm_vitq.ops import attrs, call, op_name, probabilities_of, shape_of
from tvm_vitq.relax_passes.offload_conditions import (
    Codes,
    Digits,
    attentions,
    complemented,
    largest_of,
    layer_conversion,
    residual_of,
    residual_sums,
    why_not,
)
from tvm_vitq.relax_passes.rewriter import Rewriter, constant
from tvm_vitq.vta.launches.heads import Heads
from tvm_vitq.vta.launches.linear import Conversion, linear_launch
from tvm_vitq.vta.launches.residual import Residual
from tvm_vitq.vta.launches.scores import Scores, largest_code
from tvm_vitq.vta.launches.values import layer_launch, values_launch
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.runtime.host import LAUNCH
from tvm_vitq.vta.runtime.program import Program
from tvm_vitq.vta.stream.choice import Choose
from tvm_vitq.vta.stream.launch import Launch


class Offload:
    """The pass, and what it made. Products and launches get the schedules that `choose` gives.

    residual : whether residual sums are VTA's.
    program : the launches, numbered in this order.
    notes : layer -> why it stays on the host.
    """

    def __init__(self, config: VtaConfig, choose: Choose | None = None, residual: bool = True) -> None:
        self.choose, self.residual = choose, residual
        self.program = Program(config, {})
        self.notes: dict[str, str] = {}

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        refused: dict[str, str] = {}
        while True:  # again without attention that turned out to be no launch when its layers were taken
            self.program.launches.clear()
            self.notes.clear()
            known = len(refused)
            walk = _Offload(self.program, self.notes, refused, self.choose, self.residual)
            main = walk.transform(mod["main"])
            if len(refused) == known:
                return tvm.IRModule({"main": main})


@dataclass(frozen=True)
class _Layer:
    """The launch that has a layer.

    inputs : of the launch;  bias : of the layer, as it is in the launch.
    residual : where it adds to the residual stream, whose scale and constant are still missing.
    """

    launch: Launch
    inputs: list[Expr]
    made: Conversion
    bias: Array
    residual: Residual | None = None


class _Offload(Rewriter):
    def __init__(
        self,
        program: Program,
        notes: dict[str, str],
        refused: dict[str, str],
        choose: Choose | None,
        residual: bool,
    ) -> None:
        super().__init__()
        self.choose, self.residual = choose, residual
        self.program, self.notes, self.refused = program, notes, refused
        self.config = program.config
        self.taken: set[str] = set()
        """qkv layers that attention takes into its launch."""
        self.following: dict[str, Call] = {}
        """Attention -> the layer behind it."""
        self.behind: dict[str, _Layer] = {}
        """Layers that attention has taken."""
        self.summed: set[str] = set()
        """Layers whose launch adds to the residual stream."""
        self.waiting: dict[str, _Layer] = {}
        """Of them, those whose sum is still to come."""

    def transform(self, function: relax.Function) -> relax.Function:
        for found in attentions(function):
            site = attrs(found.node)["site"]
            reason = self.refused.get(site) or why_not(found)
            if reason is not None or found.before is None:
                self.notes[site] = str(reason)
                continue
            self.taken.add(attrs(found.before)["site"])
            if found.behind is not None:
                self.following[site] = found.behind
        for site, reason in residual_sums(function).items() if self.residual else ():
            if reason is None:
                self.summed.add(site)
            else:
                self.notes[f"{site}.residual"] = reason
        return super().transform(function)

    def rewrite(self, node: Call, name: str) -> Expr | None:
        if op_name(node) == "vitq.int_add":
            return self.total(node)
        try:
            if op_name(node) == "vitq.int_linear":
                return self.linear(node, attrs(node))
            if op_name(node) == "vitq.fused_attention":
                taken = attrs(node)["site"] not in self.notes
                return self.attention(node, attrs(node), name) if taken else None
        except VitqError as error:
            to = self.notes if op_name(node) == "vitq.int_linear" else self.refused
            to[attrs(node)["site"]] = error.what
        return None

    def launch(
        self, name: str, made: Launch, inputs: list[Expr], results: list[tuple[Any, str]]
    ) -> list[Expr]:
        """The call of a launch; `results` are shapes and dtypes."""
        if name in self.program.launches:
            raise ValueError(f"two launches {name}")
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
        layer = self.behind.get(site) or self.layer(node, site)
        if layer.residual is not None:
            self.waiting[site] = layer
            return None  # the sum will read it
        result = self.shaped(self.result(site, layer), shape_of(node), site)
        if layer.made.finished:
            return result
        multiplier, zero = node.args[3], node.args[4]
        bias = constant(-layer.bias)
        if info["out_dtype"] == "float32":
            return call("vitq.int_dequantize", [result, multiplier, bias], out_dtype="float32")
        limits = {key: info[key] for key in ("qmin", "qmax", "kind", "out_dtype", "site")}
        return call("vitq.int_requantize", [result, multiplier, zero, bias], **limits)

    def layer(self, node: Call, site: str) -> _Layer:
        """The launch of a layer by itself."""
        x, weight, bias = node.args[0], value_of(node.args[1]), value_of(node.args[2])
        rows = math.prod(shape_of(x)[:-1])
        source = self.definition(x)
        while is_movement(source) and len(data_operands(source)) == 1:
            source = self.definition(data_operands(source)[0])
        made, residual = self.conversion(node, site, largest_of(source))
        try:
            launch = linear_launch(site, rows, weight, made, self.config, self.choose)
        except VitqError as error:
            if residual is None:
                raise
            self.summed.remove(site)
            self.notes[f"{site}.residual"] = error.what
            return self.layer(node, site)
        return _Layer(launch, [self.shaped(x, (1, rows, weight.shape[1]), site)], made, bias, residual)

    def conversion(self, layer: Call, site: str, largest: int) -> tuple[Conversion, Residual | None]:
        """What the sums of a layer become, the residual stream where that can be."""
        if site in self.summed:
            try:
                residual = residual_of(layer, self.config.block, largest)
                self.notes.pop(f"{site}.residual", None)
                return residual.conversion, residual
            except VitqError as error:
                self.notes[f"{site}.residual"] = error.what
        return layer_conversion(layer, largest), None

    def result(self, site: str, layer: _Layer) -> Expr:
        """What a layer's launch returns."""
        (y,) = layer.launch.outputs
        (result,) = self.launch(site, layer.launch, layer.inputs, [((y.count, y.rows, y.columns), y.dtype)])
        return result

    def total(self, node: Call) -> Expr | None:
        """A residual sum."""
        for own, stream in (node.args, reversed(node.args)):
            source = self.definition(own)
            while op_name(source) == "relax.reshape":
                source = self.definition(source.args[0])
            site = attrs(source)["site"] if op_name(source) == "vitq.int_linear" else None
            if site not in self.waiting:
                continue
            layer = self.waiting.pop(site)
            assert layer.residual is not None
            (y,) = layer.launch.outputs
            stream = self.shaped(stream, (y.count, y.rows, y.columns), site)
            scaled = self.emit(relax.op.multiply(stream, constant(layer.residual.scale)), f"{site}:scaled")
            layer.inputs.append(
                self.emit(relax.op.add(scaled, constant(layer.residual.constant)), f"{site}:added")
            )
            result = self.shaped(self.result(site, layer), shape_of(node), site)
            return call("vitq.int_add", [result, constant(np.zeros(1, np.int32))], out_dtype="int32")
        return None

    def attention(self, node: Call, info: dict[str, Any], name: str) -> Expr | None:
        batch, count, tokens, width = info["shape"]
        heads = Heads(batch, count, tokens, width, self.config.block)
        score, multiplier, zero_q, zero_k, zero_v, *rest = node.args[3:]
        values = [value_of(a) for a in rest]
        probs = probabilities_of(info, values)
        tables, additive = rest[: len(rest) - len(values)], rest[len(rest) - len(values) :]
        score, zero_q, zero_k, zero_v = (
            constant(np.broadcast_to(value_of(a), (count,)).copy()) for a in (score, zero_q, zero_k, zero_v)
        )
        layer = self.definition(node.args[0])
        qkv, codes, made = attrs(layer)["site"], layer.args[0], layer_conversion(layer)
        digits = Digits.of(probs, tokens)
        weight = value_of(layer.args[1])
        scores = Scores(qkv, heads, weight, made.epilogue, digits.needs_v, self.config, self.choose)
        first, v = scores.launch()
        behind = self.layer_behind(node, heads, v, digits, value_of(zero_v))
        if behind is None:
            largest = digits.largest * largest_code(made.epilogue)
            second = values_launch(info["site"], heads, v, probs.planes, largest, self.config, self.choose)
        squares = (batch * count, tokens, tokens)
        given = self.shaped(codes, (batch, tokens, shape_of(codes)[-1]), qkv)
        results = [
            (squares, "int32"),
            ((batch, tokens, 2 * heads.channels), "int8"),
            ((batch, heads.channels, tokens), "int8"),
        ]
        acc, both, *transposed = self.launch(qkv, first, [given], results[: len(first.outputs)])
        shape = {"shape": [batch, count, tokens, width]}
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
        if behind is not None:
            terms = call("vitq.int_row_terms", [p, zero_v, behind.inputs[0]])
            behind.inputs[:] = [*parts, self.emit(terms, f"{name}:terms")]
            return None  # the layer behind will read them
        (sums,) = self.launch(info["site"], second, parts, [((batch, tokens, heads.channels), "int32")])
        scale = np.broadcast_to(value_of(multiplier), (count,))
        if info["kind"] == "shift":
            scale = np.round(-np.log2(scale)).astype(np.int32)
        zero = np.broadcast_to(np.asarray(info["zero_point"], np.int32), (count,))
        operands = [sums, p, constant(scale.copy()), zero_v, constant(zero.copy()), *transposed]
        limits = {key: info[key] for key in ("qmin", "qmax", "kind", "out_dtype", "site")}
        signs = {"offset": digits.offset, "negated": digits.negated, "by_row": probs.by_row}
        return call("vitq.int_values", operands, **shape, **signs, **limits, **quantizer)

    def layer_behind(self, node: Call, heads: Heads, v: Any, digits: Digits, zero_v: Array) -> _Layer | None:
        """The layer behind attention in a launch with it, still without inputs but the rows' constants; None
        if that cannot be: then the host makes the codes, and each is a launch of its own, if it can be one.
        """
        layer = self.following.get(attrs(node)["site"])
        codes = Codes.of(node, digits, zero_v, heads.block)
        if layer is None or codes is None:
            return None
        site = attrs(layer)["site"]
        try:
            changed = complemented(layer)
            if changed is None:
                raise VitqError("the layer behind cannot take complements of its inputs")
            largest = max(map(abs, (-1 - attrs(node)["qmin"], -1 - attrs(node)["qmax"])))
            made, residual = self.conversion(changed, site, largest)
            weight, bias = (value_of(a) for a in changed.args[1:3])
            launch = layer_launch(
                site, heads, v, digits.passes, codes.epilogues, weight, made, self.config, self.choose
            )
        except VitqError as error:
            if site not in self.summed:
                self.notes[f"{attrs(node)['site']}.codes"] = error.what
                return None
            self.summed.remove(site)
            self.notes[f"{site}.residual"] = error.what
            return self.layer_behind(node, heads, v, digits, zero_v)
        self.behind[site] = _Layer(launch, [constant(codes.constant)], made, bias, residual)
        return self.behind[site]
