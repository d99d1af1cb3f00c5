"""Data movement to reshape, permute_dims, strided_slice, take and concat, every chain as short as it can be.

Slices move up through views to the tensor that they cut: q, k and v become column ranges of their joint
projection.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    GraphBuilder,
    Rewriter,
    constant,
    int_list,
    is_constant,
    layer_of,
    rewriting_pass,
    value_of,
)
from tvm_vitq.relax_passes.view_algebra import AxisMap, Step

VIEWS = ("relax.reshape", "relax.permute_dims")


def permutation(call: Call) -> list[int]:
    """Axes of a permute_dims; none given means reversed."""
    rank = len(shape_of(call.args[0]))
    axes = call.attrs["axes"]
    return list(range(rank))[::-1] if axes is None else [int(a) % rank for a in axes]


class CanonicalizeViews(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        operator = op_name(call)
        if operator in ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten"):
            return self.view(call.args[0], Step("reshape", tuple(shape_of(call))), name)
        if operator == "relax.permute_dims":
            return self.view(call.args[0], Step("permute", tuple(permutation(call))), name)
        if operator == "relax.strided_slice":
            return self.cut(call, name)
        if operator == "relax.take":
            return self.gather(call, name)
        if operator == "relax.concat":
            return self.concat(call)
        if operator == "relax.broadcast_to":
            if shape_of(call.args[0]) == shape_of(call):
                return call.args[0]
            if is_constant(call.args[0]):
                return constant(np.broadcast_to(value_of(call.args[0]), shape_of(call)))
        if operator == "relax.astype" and call.args[0].ty.dtype == call.ty.dtype:
            return call.args[0]
        if operator == "relax.stack":
            return self.stack(call, name)
        if operator == "relax.nn.pad":
            return self.pad(call, name)
        return None

    def rewrite_item(self, item: relax.TupleGetItem, name: str) -> Expr | None:
        whole = self.definition(item.tuple_value)
        if isinstance(whole, relax.Tuple):
            return whole.fields[item.index]
        if op_name(whole) != "relax.split":
            return None
        x, axis = whole.args[0], int(whole.attrs["axis"]) % len(shape_of(whole.args[0]))
        begin = sum(shape_of_field(whole, i)[axis] for i in range(item.index))
        return self.slice(x, axis, begin, begin + shape_of_field(whole, item.index)[axis], name)

    def view(self, x: Expr, step: Step, name: str) -> Expr:
        """`step` after x, joined with the views that made x where that costs no further copy."""
        if is_constant(x):
            array = value_of(x)
            return constant(
                array.reshape(step.values) if step.kind == "reshape" else array.transpose(step.values)
            )
        chain, source, shared = [step], x, False
        best = (x, apply_views(shape_of(x), chain))
        while (made := self.call_of(source, *VIEWS)) is not None:
            shared = shared or self.readers(source) > 1
            chain.insert(0, view_step(made))
            source = made.args[0]
            joined = apply_views(shape_of(source), chain)
            if joined is None:
                break
            if shared and sum(s.kind == "permute" for s in joined.steps()) > (step.kind == "permute"):
                continue  # the permuted tensor is read elsewhere anyway: permuting again would cost a copy
            best = (source, joined)
        source, joined = best
        if joined is None:  # sizes that do not refine each other, e.g. (6, 4) to (4, 6)
            return emit_views(self, x, [step], name)
        return emit_views(self, source, joined.steps(), name)

    def cut(self, call: Call, name: str) -> Expr | None:
        x, axes = call.args[0], int_list(call.args[1])
        begins, ends = int_list(call.args[2]), int_list(call.args[3])
        strides = int_list(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
        if any(s < 1 for s in strides):
            return None
        shape = shape_of(x)
        for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
            axis %= len(shape)
            begin, end, _ = slice(begin, end).indices(shape[axis])
            if stride == 1:
                x = self.slice(x, axis, begin, end, name)
            elif is_constant(x):
                x = constant(value_of(x)[(slice(None),) * axis + (slice(begin, end, stride),)])
            else:
                x = self.emit(relax.op.strided_slice(x, [axis], [begin], [end], [stride]), name)
        return x

    def slice(self, x: Expr, axis: int, begin: int, end: int, name: str) -> Expr:
        """x[begin:end] along `axis`, cut out of the earliest tensor where the cut is still a plain range."""
        shape = shape_of(x)
        if (begin, end) == (0, shape[axis]):
            return x
        if is_constant(x):
            return constant(value_of(x)[(slice(None),) * axis + (slice(begin, end),)])
        chain: list[Step] = []
        source, best = x, None
        while (made := self.call_of(source, *VIEWS)) is not None:
            chain.insert(0, view_step(made))
            source = made.args[0]
            mapped = apply_views(shape_of(source), chain)
            found = mapped.slice(axis, begin, end) if mapped is not None else None
            if found is None:
                break
            best = (source, found)
        if best is None:
            return self.emit(relax.op.strided_slice(x, [axis], [begin], [end]), f"{layer_of(name)}:slice")
        source, (origin, first, last, part) = best
        cut = self.slice(source, origin, first, last, name)
        return emit_views(self, cut, part.steps(), name)

    def gather(self, call: Call, name: str) -> Expr | None:
        x, indices = call.args[0], call.args[1]
        if not is_constant(indices) or call.attrs["axis"] is None:
            return None
        shape, at = shape_of(x), value_of(indices)
        axis = int(call.attrs["axis"]) % len(shape)
        at = np.where(at < 0, at + shape[axis], at)
        if is_constant(x):
            return constant(np.take(value_of(x), at, axis=axis))
        flat = at.reshape(-1)
        if flat.size and np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)):
            part = self.slice(x, axis, int(flat[0]), int(flat[0]) + flat.size, name)
            return self.view(part, Step("reshape", tuple(shape_of(call))), name)
        if at.ndim == 1 and at.dtype == np.int64:
            return None if np.array_equal(at, value_of(indices)) else relax.op.take(x, constant(at), axis)
        taken = self.emit(relax.op.take(x, constant(flat.astype("int64")), axis=axis), name)
        return self.view(taken, Step("reshape", tuple(shape_of(call))), name)

    def concat(self, call: Call) -> Expr | None:
        parts = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
        axis = int(call.attrs["axis"])
        if len(parts) == 1:
            return parts[0]
        if parts and all(is_constant(p) for p in parts):
            return constant(np.concatenate([value_of(p) for p in parts], axis=axis))
        return self._rolled(parts, axis)

    def _rolled(self, parts: list[Expr], axis: int) -> Expr | None:
        """concat(x[s:], x[:s]) is a rotation: one gather."""
        cuts = [self.call_of(p, "relax.strided_slice") for p in parts]
        first = cuts[0] if cuts else None
        if first is None or not all(c is not None and c.args[0].same_as(first.args[0]) for c in cuts):
            return None
        x = first.args[0]
        size, axis, order = shape_of(x)[axis], axis % len(shape_of(x)), []
        for cut in cuts:
            if cut is None or [a % len(shape_of(x)) for a in int_list(cut.args[1])] != [axis]:
                return None
            order.extend(range(*slice(int_list(cut.args[2])[0], int_list(cut.args[3])[0]).indices(size)))
        if sorted(order) != list(range(size)):
            return None
        return relax.op.take(x, relax.const(np.array(order), "int64"), axis=axis, mode="clip")

    def stack(self, call: Call, name: str) -> Expr:
        axis = int(call.attrs["axis"]) % len(shape_of(call))
        parts = []
        for part in call.args[0].fields:
            shape = shape_of(part)
            parts.append(self.view(part, Step("reshape", (*shape[:axis], 1, *shape[axis:])), name))
        joined = relax.op.concat(parts, axis=axis)
        return self.emit(joined, f"{layer_of(name)}:concat")

    def pad(self, call: Call, name: str) -> Expr | None:
        """Constant padding as concatenation with constants; other modes stay."""
        widths = [int(v) for v in call.attrs["pad_width"]]
        if str(call.attrs["pad_mode"]) != "constant" or min(widths) < 0:
            return None
        x, fill = call.args[0], np.float32(call.attrs["pad_value"])
        for axis in range(len(widths) // 2):
            parts = [x]
            for side, width in enumerate(widths[2 * axis : 2 * axis + 2]):
                if width:
                    shape = shape_of(x)
                    shape[axis] = width
                    parts.insert(0 if side == 0 else len(parts), constant(np.full(shape, fill, "float32")))
            if len(parts) > 1:
                x = self.emit(relax.op.concat(parts, axis=axis), f"{layer_of(name)}:pad")
        return x


def view_step(call: Call) -> Step:
    """A reshape or permute_dims as a step of the view algebra."""
    if op_name(call) == "relax.reshape":
        return Step("reshape", tuple(shape_of(call)))
    return Step("permute", tuple(permutation(call)))


def apply_views(shape: list[int], chain: list[Step]) -> AxisMap | None:
    """The map of a chain of views of a tensor; None where sizes do not refine each other."""
    mapped = AxisMap(shape)
    for step in chain:
        if step.kind == "permute":
            mapped.permute(list(step.values))
        elif not mapped.reshape(list(step.values)):
            return None
    return mapped


def emit_views(graph: GraphBuilder, x: Expr, steps: list[Step], name: str) -> Expr:
    """Emit steps as reshape and permute_dims, named after the layer of `name`."""
    layer = layer_of(name)
    for step in steps:
        if step.kind == "reshape":
            x = graph.emit(relax.op.reshape(x, step.values), f"{layer}:reshape")
        else:
            x = graph.emit(relax.op.permute_dims(x, list(step.values)), f"{layer}:permute")
    return x


def shape_of_field(call: Call, index: int) -> list[int]:
    """Shape of one element of a call that returns a tuple."""
    return [int(v) for v in call.ty.fields[index].shape]


def canonicalize_views():
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizeViews, "CanonicalizeViews", repeat=True)
