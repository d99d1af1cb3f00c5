"""Convolutions that are matmuls, patch embeddings, patch merging and 1x1, to `vitq.linear`."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_vitq import ops
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    Rewriter,
    constant,
    int_list,
    is_constant,
    layer_of,
    rewriting_pass,
    value_of,
)


class CanonicalizeConvolutions(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        if op_name(call) != "relax.nn.conv2d" or not is_constant(call.args[1]):
            return None
        attrs = call.attrs
        plain = (
            attrs["groups"] == 1
            and str(attrs["data_layout"]) == "NCHW"
            and str(attrs["kernel_layout"]) == "OIHW"
        )
        if not plain or any(int_list(attrs["padding"])) or int_list(attrs["dilation"]) != [1, 1]:
            return None
        out, channels, *kernel = shape_of(call.args[1])
        strides = int_list(attrs["strides"])
        if kernel != strides and kernel != [1, 1]:
            return None
        x = self.rows(call.args[0], kernel, strides, shape_of(call)[2:], name)
        weight = constant(value_of(call.args[1]).reshape(out, channels * kernel[0] * kernel[1]))
        site = layer_of(name)
        bias = constant(np.zeros(out, "float32"))
        y = self.emit(ops.call("vitq.linear", [x, weight, bias], site=site), f"{site}:linear")
        return self.emit(relax.op.permute_dims(y, [0, 3, 1, 2]), f"{site}:permute")

    def rows(self, x: Expr, kernel: list[int], strides: list[int], grid: list[int], name: str) -> Expr:
        """[B, C, H, W] as [B, rows, columns, C * kh * kw], one row per output; the remainder is cropped."""
        batch, channels, *size = shape_of(x)
        layer = layer_of(name)
        if kernel == [1, 1] and strides != [1, 1]:
            x = self.emit(relax.op.strided_slice(x, [2, 3], [0, 0], size, strides), f"{layer}:slice")
        else:
            covered = [g * s for g, s in zip(grid, strides, strict=True)]
            if covered != size:
                x = self.emit(relax.op.strided_slice(x, [2, 3], [0, 0], covered), f"{layer}:slice")
        (rows, columns), (height, width) = grid, kernel
        x = self.emit(
            relax.op.reshape(x, (batch, channels, rows, height, columns, width)), f"{layer}:reshape"
        )
        x = self.emit(relax.op.permute_dims(x, [0, 2, 4, 1, 3, 5]), f"{layer}:permute")
        return self.emit(
            relax.op.reshape(x, (batch, rows, columns, channels * height * width)), f"{layer}:reshape"
        )


def canonicalize_convolutions() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizeConvolutions, "CanonicalizeConvolutions")
