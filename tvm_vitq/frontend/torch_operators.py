"""Converters for the torch operators that TVM's importer flattens or converts less directly.

Each takes the importer and the node, and returns the Relax value. The canonical operators are emitted right
here when the weights are constants; whatever arrives in pieces is recognized by the canonicalization passes
instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from tvm_vitq import ops
from tvm_vitq.errors import VitqError
from tvm_vitq.ops import shape_of
from tvm_vitq.relax_passes.rewriter import Expr, constant

if TYPE_CHECKING:
    from tvm_vitq.frontend.torch_program import ProgramImporter


REPLACE = "express this layer by other operators"


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Positional or keyword argument of a node."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def linear(importer: ProgramImporter, node: fx.Node) -> Expr:
    x, weight = importer.env[node.args[0]], node.args[1]
    bias = argument(node, 2, "bias")
    value = importer.tensor(weight)
    if value is None:  # a weight computed from the input
        return importer.emit(relax.op.linear(x, importer.env[weight], importer.env[bias] if bias else None))
    bias_value = constant(np.zeros(value.shape[0], "float32")) if bias is None else importer.env[bias]
    site = importer.owner(weight, node)
    return importer.emit(
        ops.call("vitq.linear", [x, importer.env[weight], bias_value], site=site), f"{site}:linear"
    )


def layer_norm(importer: ProgramImporter, node: fx.Node) -> Expr:
    x, normalized = importer.env[node.args[0]], [int(v) for v in node.args[1]]
    if normalized != shape_of(x)[-1:]:
        raise VitqError(
            "LayerNorm over more than the last axis",
            where=importer.block_builder.name.split(":")[0],
            got=normalized,
            expected=shape_of(x)[-1:],
            fix=REPLACE,
        )
    width = normalized[0]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    gamma = importer.env[weight] if weight is not None else constant(np.ones(width, "float32"))
    beta = importer.env[bias] if bias is not None else constant(np.zeros(width, "float32"))
    site = importer.block_builder.name.split(":")[0]
    eps = float(argument(node, 4, "eps", 1e-5))
    return importer.emit(ops.call("vitq.layer_norm", [x, gamma, beta], site=site, eps=eps))


def attention(importer: ProgramImporter, node: fx.Node) -> Expr:
    """scaled_dot_product_attention written out; the attention pass gathers it again, whoever wrote it out."""
    q, k, v = (importer.env[a] for a in node.args[:3])
    mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
    if argument(node, 7, "enable_gqa", False):
        raise VitqError(
            "grouped-query attention is not supported",
            where=importer.block_builder.name.split(":")[0],
            fix="repeat keys and values to as many heads as the queries have",
        )
    scale = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    rank = len(shape_of(k))
    swapped = importer.emit(relax.op.permute_dims(k, [*range(rank - 2), rank - 1, rank - 2]))
    scores = importer.emit(relax.op.multiply(relax.op.matmul(q, swapped), relax.const(scale, "float32")))
    if causal:
        allowed = torch.ones(shape_of(q)[-2], shape_of(k)[-2], dtype=torch.bool).tril()
        scores = importer.emit(relax.op.add(scores, importer.constant(additive_mask(allowed))))
    if mask is not None:
        value = importer.tensor(mask)
        if value is not None and value.dtype == torch.bool:
            bias = importer.constant(additive_mask(value))
        else:
            bias = importer.env[mask]
        scores = importer.emit(relax.op.add(scores, bias))
    return importer.emit(relax.op.matmul(relax.op.nn.softmax(scores, axis=-1), v))


def additive_mask(allowed: torch.Tensor) -> torch.Tensor:
    """A boolean mask as the number to add: 0 where attention is allowed, -inf elsewhere."""
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf)


def activation(kind: str) -> Callable[[ProgramImporter, fx.Node], Expr]:
    def convert(importer: ProgramImporter, node: fx.Node) -> Expr:
        chosen = (
            "gelu_tanh" if kind == "gelu" and argument(node, 1, "approximate", "none") == "tanh" else kind
        )
        site = importer.block_builder.name.split(":")[0]
        return importer.emit(
            ops.call("vitq.activation", [importer.env[node.args[0]]], site=site, kind=chosen)
        )

    return convert


def roll(importer: ProgramImporter, node: fx.Node) -> Expr:
    """A gather per axis: one copy each, and a row permutation that the passes can move."""
    x, shifts, axes = importer.env[node.args[0]], node.args[1], argument(node, 2, "dims", [])
    shape = shape_of(x)
    if not axes:
        raise VitqError(
            "roll of a flattened tensor is not supported",
            where=importer.block_builder.name.split(":")[0],
            fix="give roll its axes",
        )
    for shift, axis in zip(shifts, axes, strict=True):
        axis %= len(shape)
        indices = np.roll(np.arange(shape[axis], dtype="int64"), shift)
        x = importer.emit(relax.op.take(x, relax.const(indices, "int64"), axis=axis))
    return x


def select(importer: ProgramImporter, node: fx.Node) -> Expr:
    x, axis, index = importer.env[node.args[0]], int(node.args[1]), int(node.args[2])
    shape = shape_of(x)
    axis, index = axis % len(shape), index % shape[axis]
    one = importer.emit(relax.op.strided_slice(x, axes=[axis], begin=[index], end=[index + 1]))
    return importer.emit(relax.op.reshape(one, shape[:axis] + shape[axis + 1 :]))


CONVERTERS: dict[str, Callable[[ProgramImporter, fx.Node], Expr]] = {
    "linear.default": linear,
    "layer_norm.default": layer_norm,
    "scaled_dot_product_attention.default": attention,
    "gelu.default": activation("gelu"),
    "silu.default": activation("silu"),
    "sigmoid.default": activation("sigmoid"),
    "relu.default": activation("relu"),
    "tanh.default": activation("tanh"),
    "hardswish.default": activation("hardswish"),
    "roll.default": roll,
    "select.int": select,
}
