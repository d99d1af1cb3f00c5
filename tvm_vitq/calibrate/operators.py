"""Torch form of every Relax operator that a float graph may hold.

A handler is ``f(hooks, layer, attributes, *arguments)``. Tensors are [n, *shape in the graph], constants [1,
*shape]; so axis a of the graph is axis a + 1 here, and weights are taken out of their extra axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tvm_vitq.errors import VitqError

Handler = Callable[..., Any]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
}


def shifted(axis: int) -> int:
    """Axis of the graph as an axis here; those counted from the end are the same."""
    return axis + 1 if axis >= 0 else axis


def weight_of(x: Tensor) -> Tensor:
    """A constant without its extra axis."""
    return x[0]


def aligned(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one rank: ones go between the extra axis and the shape in the graph, as broadcasting would
    add them.
    """
    rank = max(t.dim() for t in tensors)
    return [t.reshape(t.shape[0], *[1] * (rank - t.dim()), *t.shape[1:]) for t in tensors]


def linear(hooks: Any, layer: str, attributes: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, hooks.weight(f"{layer}.weight", weight_of(weight)), weight_of(bias))


def layer_norm(hooks: Any, layer: str, attributes: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight_of(gamma), weight_of(beta), attributes["eps"])


def activation(hooks: Any, layer: str, attributes: Any, x: Tensor) -> Tensor:
    kind = attributes["kind"]
    if kind not in ACTIVATIONS:
        raise VitqError("unknown activation", where=layer, got=kind, expected=", ".join(ACTIVATIONS))
    return ACTIVATIONS[kind](x)


def attention(
    hooks: Any, layer: str, attributes: Any, q: Tensor, k: Tensor, v: Tensor, *additive: Tensor
) -> Tensor:
    scores = (q * attributes["scale"]) @ k.transpose(-1, -2)
    for term in additive:
        scores = scores + aligned(scores, term)[1]
    probs = scores.softmax(-1) if attributes["kind"] == "softmax" else scores.sigmoid()
    return hooks.probs(f"{layer}.probs", probs) @ v


def elementwise(function: Callable[..., Tensor]) -> Handler:
    return lambda hooks, layer, attributes, *args: function(
        *aligned(*(a if isinstance(a, Tensor) else torch.tensor([a]) for a in args))
    )


def reduction(function: Callable[..., Tensor]) -> Handler:
    def run(hooks: Any, layer: str, attributes: Any, x: Tensor) -> Tensor:
        axes = range(x.dim() - 1) if attributes.axis is None else attributes.axis
        return function(x, tuple(shifted(int(a)) for a in axes), keepdim=bool(attributes.keepdims))

    return run


def on_images(function: Callable[..., Tensor]) -> Handler:
    """An operator with a batch axis of its own: both batch axes are made one around it."""

    def run(hooks: Any, layer: str, attributes: Any, x: Tensor, *args: Any) -> Tensor:
        front = x.shape[:2]
        constants = [weight_of(a) if isinstance(a, Tensor) else a for a in args]
        return function(attributes, x.flatten(0, 1), *constants).unflatten(0, front)

    return run


def _padding(attributes: Any, x: Tensor, value: float = 0.0) -> Tensor:
    top, left, bottom, right = (int(p) for p in attributes.padding)
    return F.pad(x, (left, right, top, bottom), value=value) if any((top, left, bottom, right)) else x


def conv2d(attributes: Any, x: Tensor, weight: Tensor) -> Tensor:
    stride, dilation = list(attributes.strides), list(attributes.dilation)
    return F.conv2d(_padding(attributes, x), weight, None, stride, 0, dilation, int(attributes.groups))


def max_pool2d(attributes: Any, x: Tensor) -> Tensor:
    x = _padding(attributes, x, -torch.inf)
    return F.max_pool2d(
        x,
        list(attributes.pool_size),
        list(attributes.strides),
        0,
        list(attributes.dilation),
        bool(attributes.ceil_mode),
    )


def avg_pool2d(attributes: Any, x: Tensor) -> Tensor:
    top, left, bottom, right = (int(p) for p in attributes.padding)
    if (top, left) != (bottom, right):
        raise VitqError("average pooling with uneven padding", got=(top, left, bottom, right))
    size, stride = list(attributes.pool_size), list(attributes.strides)
    return F.avg_pool2d(
        x, size, stride, (top, left), bool(attributes.ceil_mode), bool(attributes.count_include_pad)
    )


def group_norm(attributes: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.group_norm(x, int(attributes.num_groups), gamma, beta, float(attributes.epsilon))


def batch_norm(attributes: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    axis = int(attributes.axis)
    fit = [1] * x.dim()
    fit[axis] = x.shape[axis]
    scale = gamma * torch.rsqrt(var + float(attributes.epsilon))
    return x * scale.reshape(fit) + (beta - mean * scale).reshape(fit)


def resize2d(attributes: Any, x: Tensor, size: list[int]) -> Tensor:
    method = {"nearest_neighbor": "nearest", "linear": "bilinear", "cubic": "bicubic"}[str(attributes.method)]
    corners = str(attributes.coordinate_transformation_mode) == "align_corners"
    return F.interpolate(x, size, mode=method, align_corners=None if method == "nearest" else corners)


def relax_layer_norm(
    hooks: Any, layer: str, attributes: Any, x: Tensor, gamma: Tensor, beta: Tensor
) -> Tensor:
    shape = [x.shape[shifted(int(a))] for a in attributes.axes]
    return F.layer_norm(x, shape, weight_of(gamma), weight_of(beta), float(attributes.epsilon))


def permute_dims(hooks: Any, layer: str, attributes: Any, x: Tensor) -> Tensor:
    rank = x.dim() - 1
    axes = (
        list(reversed(range(rank))) if attributes.axes is None else [int(a) % rank for a in attributes.axes]
    )
    return x.permute(0, *(a + 1 for a in axes))


def strided_slice(
    hooks: Any, layer: str, attributes: Any, x: Tensor, axes: list[int], *bounds: list[int]
) -> Tensor:
    begin, end, steps = (*bounds, [1] * len(axes))[:3]
    for axis, first, last, step in zip(axes, begin, end, steps, strict=True):
        if step < 1:
            raise VitqError("slice with a negative step", where=layer, got=step)
        index = [slice(None)] * x.dim()
        index[shifted(axis) % x.dim()] = slice(first, last, step)
        x = x[tuple(index)]
    return x


def concat(hooks: Any, layer: str, attributes: Any, tensors: list[Tensor]) -> Tensor:
    return torch.cat(_expanded(tensors), shifted(int(attributes.axis or 0)))


def stack(hooks: Any, layer: str, attributes: Any, tensors: list[Tensor]) -> Tensor:
    return torch.stack(_expanded(tensors), shifted(int(attributes.axis or 0)))


def _expanded(tensors: list[Tensor]) -> list[Tensor]:
    count = max(t.shape[0] for t in tensors)
    return [t.expand(count, *t.shape[1:]) for t in tensors]


def take(hooks: Any, layer: str, attributes: Any, x: Tensor, index: Any) -> Tensor:
    if isinstance(index, int):
        return x.select(shifted(int(attributes.axis)), index)
    axis, which = shifted(int(attributes.axis)) % x.dim(), weight_of(index)
    picked = x.index_select(axis, which.reshape(-1).long())
    return picked.reshape(*x.shape[:axis], *which.shape, *x.shape[axis + 1 :])


def split(hooks: Any, layer: str, attributes: Any, x: Tensor) -> list[Tensor]:
    axis, where = shifted(int(attributes.axis)), attributes.indices_or_sections
    if hasattr(where, "value") or isinstance(where, int):
        return list(x.chunk(int(where), axis))
    return list(x.tensor_split([int(w) for w in where], axis))


def squeeze(hooks: Any, layer: str, attributes: Any, x: Tensor) -> Tensor:
    axes = [i for i, e in enumerate(x.shape[1:]) if e == 1] if attributes.axis is None else attributes.axis
    return x.squeeze(tuple(shifted(int(a)) for a in axes))


def expand_dims(hooks: Any, layer: str, attributes: Any, x: Tensor) -> Tensor:
    rank = x.dim() - 1 + len(attributes.axis)
    for axis in sorted(int(a) % rank for a in attributes.axis):
        x = x.unsqueeze(axis + 1)
    return x


def pad(hooks: Any, layer: str, attributes: Any, x: Tensor, value: Any = 0.0) -> Tensor:
    widths = [int(w) for w in attributes.pad_width]
    pairs = [w for i in reversed(range(len(widths) // 2)) for w in widths[2 * i : 2 * i + 2]]
    if str(attributes.pad_mode) != "constant":
        raise VitqError("padding other than with a constant", where=layer, got=attributes.pad_mode)
    return F.pad(x, pairs, value=float(attributes.pad_value))


HANDLERS: dict[str, Handler] = {
    "vitq.linear": linear,
    "vitq.layer_norm": layer_norm,
    "vitq.activation": activation,
    "vitq.attention": attention,
    "vitq.mean": lambda hooks, layer, attributes, x: x.mean(shifted(attributes["axis"])),
    "vitq.quantize": lambda hooks, layer, attributes, x: hooks.quantize(attributes["site"], x),
    "relax.reshape": lambda hooks, layer, attributes, x, shape: x.reshape(x.shape[0], *shape),
    "relax.flatten": lambda hooks, layer, attributes, x: x.flatten(1),
    "relax.permute_dims": permute_dims,
    "relax.strided_slice": strided_slice,
    "relax.concat": concat,
    "relax.stack": stack,
    "relax.split": split,
    "relax.take": take,
    "relax.squeeze": squeeze,
    "relax.expand_dims": expand_dims,
    "relax.broadcast_to": lambda hooks, layer, attributes, x, shape: aligned(
        x, torch.empty(1, *[1] * len(shape))
    )[0].expand(-1, *shape),
    "relax.flip": lambda hooks, layer, attributes, x: x.flip(shifted(int(attributes.axis))),
    "relax.tile": lambda hooks, layer, attributes, x: x.repeat(1, *(int(r) for r in attributes.repeats)),
    "relax.nn.pad": pad,
    "relax.add": elementwise(torch.add),
    "relax.subtract": elementwise(torch.subtract),
    "relax.multiply": elementwise(torch.multiply),
    "relax.divide": elementwise(torch.divide),
    "relax.power": elementwise(torch.pow),
    "relax.maximum": elementwise(torch.maximum),
    "relax.minimum": elementwise(torch.minimum),
    "relax.equal": elementwise(torch.eq),
    "relax.greater": elementwise(torch.gt),
    "relax.less": elementwise(torch.lt),
    "relax.where": elementwise(torch.where),
    "relax.matmul": elementwise(torch.matmul),
    "relax.negative": elementwise(torch.neg),
    "relax.abs": elementwise(torch.abs),
    "relax.square": elementwise(torch.square),
    "relax.sqrt": elementwise(torch.sqrt),
    "relax.rsqrt": elementwise(torch.rsqrt),
    "relax.exp": elementwise(torch.exp),
    "relax.log": elementwise(torch.log),
    "relax.erf": elementwise(torch.erf),
    "relax.sin": elementwise(torch.sin),
    "relax.cos": elementwise(torch.cos),
    "relax.tanh": elementwise(torch.tanh),
    "relax.sigmoid": elementwise(torch.sigmoid),
    "relax.nn.relu": elementwise(F.relu),
    "relax.nn.relu6": elementwise(F.relu6),
    "relax.nn.silu": elementwise(F.silu),
    "relax.nn.gelu": elementwise(F.gelu),
    "relax.nn.gelu_tanh": elementwise(ACTIVATIONS["gelu_tanh"]),
    "relax.nn.softplus": elementwise(F.softplus),
    "relax.nn.leakyrelu": lambda hooks, layer, attributes, x: F.leaky_relu(x, float(attributes.alpha)),
    "relax.clip": lambda hooks, layer, attributes, x, low, high: x.clamp(low, high),
    "relax.astype": lambda hooks, layer, attributes, x: x.to(getattr(torch, str(attributes.dtype))),
    "relax.nn.softmax": lambda hooks, layer, attributes, x: x.softmax(shifted(int(attributes.axis))),
    "relax.mean": reduction(torch.mean),
    "relax.sum": reduction(torch.sum),
    "relax.max": reduction(torch.amax),
    "relax.min": reduction(torch.amin),
    "relax.variance": reduction(lambda x, axes, keepdim: x.var(axes, unbiased=False, keepdim=keepdim)),
    "relax.nn.layer_norm": relax_layer_norm,
    "relax.nn.group_norm": on_images(group_norm),
    "relax.nn.batch_norm": lambda *arguments: [on_images(batch_norm)(*arguments)],
    "relax.nn.conv2d": on_images(conv2d),
    "relax.nn.max_pool2d": on_images(max_pool2d),
    "relax.nn.avg_pool2d": on_images(avg_pool2d),
    "relax.nn.adaptive_avg_pool2d": on_images(lambda a, x: F.adaptive_avg_pool2d(x, list(a.output_size))),
    "relax.image.resize2d": on_images(resize2d),
    "TupleGetItem": lambda hooks, layer, attributes, items, index: items[index],
    "Tuple": lambda hooks, layer, attributes, *items: list(items),
    "Var": lambda hooks, layer, attributes, x: x,
    "DataflowVar": lambda hooks, layer, attributes, x: x,
    "GenericConst": lambda hooks, layer, attributes, x: x,
}
"""Handlers by operator name, or by class name for expressions that are no calls."""
