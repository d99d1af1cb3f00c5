"""Step functions of torch tensors: exact, fast, with the gradient of a straight-through quantizer.

Torch is imported when a tensor is at hand, not before.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray

CHUNK = 2**20
"""Elements at a time: temporaries stay in the cache."""

LARGE = 2**16
"""Elements from which on a table over the upper halves of floats pays."""


def straight_through(x: Any, scale: Any, edges: Array, results: Array, shift: float) -> Any:
    """``results[number of edges <= x]`` of a tensor, compared in float32.

    The gradient of x is that of clipping to the results' range. With ``results = scale * level - shift`` the
    gradient of `scale` (a tensor of one element, or None) is ``level - (x + shift) / scale``, and ``level``
    where x is clipped.
    """
    return _function().apply(x.float(), scale, edges, results, shift).to(x.dtype)


@functools.cache
def _function() -> Any:
    import torch

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, scale: Any, edges: Array, results: Array, shift: float) -> Any:
            y = step_function(x, edges, results)
            ctx.save_for_backward(x, y, scale)
            ctx.low, ctx.high, ctx.shift = float(results[0]), float(results[-1]), shift
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, y, scale = ctx.saved_tensors
            inside = (x >= ctx.low) & (x <= ctx.high)
            for_x = gradient * inside if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[1]:
                return for_x, None, None, None, None
            slope = torch.where(inside, y - x, y + ctx.shift).mul_(gradient)
            return for_x, (slope.sum() / scale).reshape(scale.shape), None, None, None

    return StraightThrough


def step_function(x: Any, edges: Array, results: Array) -> Any:
    """``results[number of edges <= x]`` of a float32 tensor, without gradients.

    Large tensors avoid the binary search, which takes three times as long: the upper 16 bits of a float tell
    all edges but at most one, unless edges are closer than 1/256 of their size.
    """
    import torch

    flat = x.detach().reshape(-1)
    halves = _by_upper_half(edges, results) if len(flat) >= LARGE and x.device.type == "cpu" else None
    if halves is None:
        steps, values = (torch.from_numpy(a).to(x.device) for a in (edges, results))
        passed = torch.bucketize(flat, steps, right=True, out_int32=True)
        return values.index_select(0, passed).view(x.shape)
    out = torch.empty_like(flat)
    edge, below, above = (torch.from_numpy(a) for a in halves)
    for part, result in zip(flat.split(CHUNK), out.split(CHUNK), strict=True):
        upper = (part.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        passed = part >= edge.index_select(0, upper)
        torch.where(passed, above.index_select(0, upper), below.index_select(0, upper), out=result)
    return out.view(x.shape)


def _by_upper_half(edges: Array, results: Array) -> tuple[Array, Array, Array] | None:
    """For the floats with each upper half: the edge among them and the results below and above it; None if
    some have more than one edge among them.
    """
    first = np.arange(2**16, dtype=np.uint32) << 16
    ends = first.view(np.float32), (first | 0xFFFF).view(np.float32)
    below, above = (np.searchsorted(edges, f(*ends), side="right") for f in (np.fmin, np.fmax))
    edge = edges[np.minimum(below, len(edges) - 1)]
    if np.any((above > below) & (edge != edges[np.maximum(above - 1, 0)])):
        return None
    return edge, results[below], results[above]
