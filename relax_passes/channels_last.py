"""Moves image operators that stay in float to channels-last tensors, [N, H, W, C], and transposes past
elementwise operators until they meet and cancel.

Linears on both sides of a convolution are channels-last already, so most transposes vanish; and with channels
innermost every window operator runs in vectors over channels, whatever its stride and the width of its image.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_vitq.graph import Dataflow
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.canonicalize_views import canonicalize_views, permutation
from tvm_vitq.relax_passes.lower_elementwise import EXPRESSIONS
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    Rewriter,
    constant,
    int_list,
    is_constant,
    layer_of,
    value_of,
)

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]

POOLS = {"relax.nn.avg_pool2d": relax.op.nn.avg_pool2d, "relax.nn.max_pool2d": relax.op.nn.max_pool2d}

ELEMENTWISE = {f"relax.{name}" for name in (
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "clip", "sigmoid", "tanh", "exp", "erf",
    "nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu",
)} | (set(EXPRESSIONS) - {"vitq.int_mean"})  # fmt: skip

TABLE = (1, "vitq.int_lookup")
"""The one operand of an elementwise operator that is not aligned with its result."""


def channels_last(mod: tvm.IRModule) -> tvm.IRModule:
    """See the module; a graph without such operators is returned as it is."""
    names = {op_name(b.value) for b in Dataflow(mod).bindings}
    if not names & {*POOLS, "relax.nn.conv2d", "relax.nn.group_norm"}:
        return mod
    return canonicalize_views()(tvm.IRModule({"main": _ChannelsLast().transform(mod["main"])}))


class _ChannelsLast(Rewriter):
    def __init__(self) -> None:
        super().__init__()
        self._moved: dict[Expr, Expr] = {}
        """Tensors with channels first that have been transposed."""

    def rewrite(self, call: Call, name: str) -> Expr | None:
        operator = op_name(call)
        if operator == "relax.permute_dims":
            inner = self.channels_first(call.args[0])
            return inner if inner is not None and permutation(call) == TO_LAST else None
        if operator == "relax.nn.conv2d":
            moved = self.convolution(call, name)
        elif operator in POOLS:
            moved = self.pool(call, name)
        elif operator == "relax.nn.group_norm":
            moved = self.group_norm(call, name)
        elif operator == "relax.concat":
            moved = self.concat(call, name)
        elif operator in ELEMENTWISE:
            moved = self.elementwise(call, name)
        else:
            return None
        return None if moved is None else relax.op.permute_dims(self.emit(moved, name), TO_FIRST)

    def channels_first(self, x: Expr) -> Expr | None:
        """The channels-last tensor that `x` is the transpose of."""
        made = self.call_of(x, "relax.permute_dims")
        return made.args[0] if made is not None and permutation(made) == TO_FIRST else None

    def last(self, x: Expr, name: str) -> Expr:
        """`x`, a tensor [N, C, H, W], with channels last."""
        if is_constant(x):
            return constant(value_of(x).transpose(TO_LAST))
        inner = self.channels_first(x)
        if inner is not None:
            return inner
        if x not in self._moved:
            self._moved[x] = self.emit(relax.op.permute_dims(x, TO_LAST), f"{layer_of(name)}:permute")
        return self._moved[x]

    def convolution(self, call: Call, name: str) -> Expr | None:
        x, weight = call.args
        attrs = call.attrs
        layouts = str(attrs["data_layout"]), str(attrs["kernel_layout"])
        channels, groups = shape_of(x)[1], int(attrs["groups"])
        if layouts != ("NCHW", "OIHW") or not is_constant(weight) or groups not in (1, channels):
            return None
        options = {key: int_list(attrs[key]) for key in ("strides", "padding", "dilation")}
        filters = constant(value_of(weight).transpose(2, 3, 1, 0))
        return relax.op.nn.conv2d(
            self.last(x, name), filters, groups=groups, data_layout="NHWC", kernel_layout="HWIO", **options
        )

    def pool(self, call: Call, name: str) -> Expr | None:
        attrs = call.attrs
        if str(attrs["layout"]) != "NCHW":
            return None
        options = {key: int_list(attrs[key]) for key in ("pool_size", "strides", "padding", "dilation")}
        flags = {key: bool(attrs[key]) for key in ("ceil_mode", "count_include_pad")}
        return POOLS[op_name(call)](self.last(call.args[0], name), **options, **flags, layout="NHWC")

    def group_norm(self, call: Call, name: str) -> Expr | None:
        x, gamma, beta = call.args
        attrs = call.attrs
        axes = [a % 4 for a in int_list(attrs["axes"])]
        if len(shape_of(x)) != 4 or int(attrs["channel_axis"]) % 4 != 1 or axes != [2, 3]:
            return None
        return relax.op.nn.group_norm(
            self.last(x, name), gamma, beta, int(attrs["num_groups"]), 3, [1, 2], float(attrs["epsilon"])
        )

    def concat(self, call: Call, name: str) -> Expr | None:
        fields = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
        if call.attrs["axis"] is None or not any(self.channels_first(f) is not None for f in fields):
            return None
        axis = TO_LAST.index(int(call.attrs["axis"]) % 4)
        return relax.op.concat([self.last(f, name) for f in fields], axis)

    def elementwise(self, call: Call, name: str) -> Expr | None:
        args = list(call.args)
        own = [n for n, a in enumerate(args) if self.is_tensor(a) and (n, op_name(call)) != TABLE]
        tensors = [args[n] for n in own]
        if not any(self.channels_first(a) is not None for a in tensors):
            return None
        if any(len(shape_of(a)) != 4 and not is_constant(a) for a in tensors):
            return None
        for n in own:
            args[n] = self.last(self.four(args[n]), name)
        return Call(call.op, args, call.attrs, call.ty_args)

    @staticmethod
    def is_tensor(arg: Expr) -> bool:
        """Whether an argument has axes that a transpose concerns; numbers have none."""
        return isinstance(arg.ty, relax.TensorType) and int(np.prod(shape_of(arg))) != 1

    @staticmethod
    def four(arg: Expr) -> Expr:
        """A constant with all four axes that it broadcasts over."""
        if not is_constant(arg):
            return arg
        value = value_of(arg)
        return constant(value.reshape((1,) * (4 - value.ndim) + value.shape))
