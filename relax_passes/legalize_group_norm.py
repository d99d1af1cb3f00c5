"""Group norm of channels-last images: sums in vectors over channels.

TVM's own legalization sums a group element by element, in one chain that no vector shortens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import relax, te, tirx, topi
from tvm.ir import Call, Expr

from tvm_vitq.ops import shape_of
from tvm_vitq.relax_passes.rewriter import int_list

LANES = 16
"""Sums of a group side by side. Two passes, mean before variance, so that nothing cancels."""


def group_norm(x: te.Tensor, gamma: te.Tensor, beta: te.Tensor, groups: int, epsilon: float) -> te.Tensor:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta, with x [N, H, W, C], over H, W and C / groups."""
    n, height, width, channels = (int(v) for v in x.shape)
    size = channels // groups
    lanes = math.gcd(size, LANES)
    count = tirx.const(1.0 / (height * width * size), "float32")

    def total(name: str, term: Callable[..., Expr]) -> te.Tensor:
        """Sums [N, groups] of a term over a group's elements."""
        y, i, b = (te.reduce_axis((0, v)) for v in (height, width, size // lanes))
        partial = te.compute(
            (n, groups, lanes),
            lambda image, g, lane: te.sum(term(image, y, i, g * size + b * lanes + lane), axis=[y, i, b]),
            name=f"{name}_lanes",
        )
        k = te.reduce_axis((0, lanes))
        return te.compute((n, groups), lambda image, g: te.sum(partial(image, g, k), axis=k), name=name)

    sums = total("group_sum", x)

    def centred(*index: Expr) -> Expr:
        return x(*index) - sums(index[0], index[3] // size) * count

    variance = total("group_variance", lambda *index: centred(*index) * centred(*index))

    def element(*index: Expr) -> Expr:
        *_, channel = index
        scale = tirx.rsqrt(variance(index[0], channel // size) * count + tirx.const(epsilon, "float32"))
        return centred(*index) * scale * gamma(channel) + beta(channel)

    return te.compute(x.shape, element, name="group_norm")


def legalize_group_norm(builder: relax.BlockBuilder, call: Call) -> Expr:
    """For relax.transform.LegalizeOps; other layouts are TVM's."""
    x, gamma, beta = call.args
    attrs = call.attrs
    rank = len(shape_of(x))
    groups, epsilon = int(attrs["num_groups"]), float(attrs["epsilon"])
    channel, axes = int(attrs["channel_axis"]) % rank, [a % rank for a in int_list(attrs["axes"])]
    if (rank, channel, axes) == (4, 3, [1, 2]) and str(x.ty.dtype) == "float32":
        return builder.call_te(group_norm, x, gamma, beta, groups, epsilon)
    return builder.call_te(topi.nn.group_norm, x, gamma, beta, groups, channel, axes, epsilon)
