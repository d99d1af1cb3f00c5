"""Converters for ONNX operators that TVM expands into dynamic shapes or loops although all is static.

Each takes the importer, the node and its attributes, and returns the Relax value, or None to leave it to TVM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from tvm import relax

from tvm_vitq.ops import shape_of
from tvm_vitq.relax_passes.rewriter import Expr

if TYPE_CHECKING:
    from tvm_vitq.frontend.onnx_model import OnnxImporter


def gather(importer: OnnxImporter, node: onnx.NodeProto, attributes: dict[str, Any]) -> Expr | None:
    """Constant indices as `take`, negative ones counted from the end here."""
    indices = importer.values.get(node.input[1])
    if indices is None:
        return None
    x, axis = importer.operand(node.input[0]), int(attributes.get("axis", 0))
    at = np.where(indices < 0, indices + shape_of(x)[axis], indices).astype("int64")
    return relax.op.take(x, relax.const(at, "int64"), axis=axis)


def pad(importer: OnnxImporter, node: onnx.NodeProto, attributes: dict[str, Any]) -> Expr | None:
    """Constant padding by known, non-negative widths."""
    mode = attributes.get("mode", b"constant")
    operands = [importer.values.get(name) if name else None for name in node.input[1:]]
    if mode not in (b"constant", "constant") or not operands or operands[0] is None:
        return None
    x, widths = importer.operand(node.input[0]), [int(w) for w in operands[0]]
    fill = float(operands[1].reshape(())) if len(operands) > 1 and operands[1] is not None else 0.0
    rank = len(shape_of(x))
    axes = (
        [int(a) % rank for a in operands[2]]
        if len(operands) > 2 and operands[2] is not None
        else list(range(rank))
    )
    if min(widths) < 0:
        return None
    both = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        both[2 * axis], both[2 * axis + 1] = widths[i], widths[len(axes) + i]
    return relax.op.nn.pad(x, both, pad_mode="constant", pad_value=fill) if any(both) else x


CONVERTERS: dict[str, Callable[[OnnxImporter, onnx.NodeProto, dict[str, Any]], Expr | None]] = {
    "Gather": gather,
    "Pad": pad,
}
