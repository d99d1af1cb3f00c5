"""Questions about a Relax dataflow graph: its bindings, who uses a value, and what moves data without
changing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir.expr import GenericConst

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.ops import op_name, shape_of


def is_constant(expr: relax.Expr) -> bool:
    return isinstance(expr, GenericConst)


def value_of(constant: relax.Expr) -> Array:
    """A constant's value, without a copy; read only."""
    array = np.from_dlpack(constant.value)
    array.flags.writeable = False
    return array


def _ints(tuple_expr: relax.Expr) -> list[int]:
    return [int(getattr(v, "value", v)) for v in tuple_expr.fields]


Move = Callable[..., Array]


def _reshape(call: relax.Call) -> Move:
    shape = shape_of(call)
    return lambda x: x.reshape(shape)


def _permute(call: relax.Call) -> Move:
    axes = [int(a) for a in call.attrs.axes]
    return lambda x: x.transpose(axes)


def _slice(call: relax.Call) -> Move:
    axes, begin, end = (_ints(a) for a in call.args[1:4])
    strides = _ints(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    index: list[slice] = [slice(None)] * len(shape_of(call))
    for axis, b, e, s in zip(axes, begin, end, strides, strict=True):
        index[axis] = slice(b, e, s)
    return lambda x: x[tuple(index)]


def _take(call: relax.Call) -> Move:
    indices = value_of(call.args[1])
    if call.attrs.axis is None:
        return lambda x: x.reshape(-1)[indices]
    axis = int(call.attrs.axis)
    return lambda x: np.take(x, indices, axis=axis)


def _broadcast(call: relax.Call) -> Move:
    shape = shape_of(call)
    return lambda x: np.broadcast_to(x, shape)


def _concat(call: relax.Call) -> Move:
    axis = int(call.attrs.axis)
    return lambda *parts: np.concatenate(parts, axis=axis)


MOVEMENT: dict[str, Callable[[relax.Call], Move]] = {
    "relax.reshape": _reshape,
    "relax.permute_dims": _permute,
    "relax.strided_slice": _slice,
    "relax.take": _take,
    "relax.broadcast_to": _broadcast,
    "relax.concat": _concat,
}
"""Operators that only move data: a call becomes a function of NumPy arrays, of integers as of floats."""


def is_movement(expr: relax.Expr) -> bool:
    return op_name(expr) in MOVEMENT


def data_operands(call: relax.Call) -> list[relax.Expr]:
    """The tensors that a call reads: the fields of a tuple argument count one by one, shapes and numbers do
    not.
    """
    first = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else [call.args[0]]
    if is_movement(call):
        return first
    rest = [a for a in call.args[1:] if isinstance(a, relax.Var) or is_constant(a)]
    return first + rest


def movement(call: relax.Call) -> Move:
    """A data movement call as a function of NumPy arrays."""
    return MOVEMENT[op_name(call)](call)


def move(call: relax.Call, *operands: Array) -> Array:
    """Result of a data movement call on NumPy arrays."""
    return movement(call)(*operands)


def rebuild_movement(call: relax.Call, operands: list[relax.Expr]) -> relax.Call:
    """The same movement of other operands, e.g. of integers instead of floats."""
    first = relax.Tuple(operands) if isinstance(call.args[0], relax.Tuple) else operands[0]
    return relax.Call(call.op, [first, *call.args[1:]], call.attrs)


@dataclass(frozen=True)
class Leaf:
    """A use of a value behind any number of data movements.

    consumer : the binding that uses it, None if it is the function's result
    value : the variable that the consumer reads; path : the movements from the value asked about to that
        variable
    """

    consumer: relax.VarBinding | None
    value: relax.Var
    path: tuple[relax.Call, ...]


class Dataflow:
    """The single dataflow block of a module's `main`, indexed by uses."""

    def __init__(self, mod: object) -> None:
        self.function = mod["main"]  # type: ignore[index]
        blocks = self.function.body.blocks
        if len(blocks) != 1:
            raise VitqError("the graph must be one dataflow block", got=f"{len(blocks)} blocks", expected="1")
        self.bindings: list[relax.VarBinding] = list(blocks[0].bindings)
        self.result: relax.Var = self.function.body.body
        self.inputs: list[relax.Var] = list(self.function.params)
        self.definition = {b.var: b.value for b in self.bindings}
        self.uses: dict[relax.Var, list[relax.VarBinding]] = {v: [] for v in [*self.inputs, *self.definition]}
        for binding in self.bindings:
            for operand in self._operands(binding.value):
                if isinstance(operand, relax.Var):
                    self.uses[operand].append(binding)

    @staticmethod
    def _operands(value: relax.Expr) -> list[relax.Expr]:
        if isinstance(value, relax.Call):
            return data_operands(value)
        if isinstance(value, relax.Tuple):
            return list(value.fields)
        return [value.tuple_value] if isinstance(value, relax.TupleGetItem) else [value]

    def leaves(self, var: relax.Var, path: tuple[relax.Call, ...] = ()) -> Iterator[Leaf]:
        """All uses of `var` behind one-operand data movements; concat counts as a use."""
        if var.same_as(self.result):
            yield Leaf(None, var, path)
        for binding in self.uses[var]:
            if isinstance(binding.value, relax.Var):
                yield from self.leaves(binding.var, path)
            elif is_movement(binding.value) and len(data_operands(binding.value)) == 1:
                yield from self.leaves(binding.var, (*path, binding.value))
            else:
                yield Leaf(binding, var, path)


def columns_read(path: tuple[relax.Call, ...], shape: list[int]) -> Array:
    """For each element behind `path`, the index on the last axis of the tensor of `shape` that it comes
    from.
    """
    columns = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    for call in path:
        columns = move(call, columns)
    return columns


def channels_stay(path: tuple[relax.Call, ...], shape: list[int]) -> bool:
    """Whether the last axis of a tensor of `shape` is as it was behind `path`."""
    columns = columns_read(path, shape)
    return columns.shape[-1] == shape[-1] and bool((columns == np.arange(shape[-1])).all())


def positions(path: Iterable[relax.Call], source_shape: list[int]) -> Array:
    """Where each element behind `path` lies in the flat source."""
    index = np.arange(math.prod(source_shape), dtype=np.int64).reshape(source_shape)
    for step in path:
        index = move(step, index)
    return index


def rows_moved(index: Array, width: int) -> Array | None:
    """Source rows in their new order, if positions `index` only move whole rows of `width` elements, else
    None.
    """
    flat = index.reshape(-1)
    if flat.size % width:
        return None
    rows = flat[::width] // width
    return rows if np.array_equal(flat.reshape(-1, width), rows[:, None] * width + np.arange(width)) else None
