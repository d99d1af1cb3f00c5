"""The parts of a model that reconstruction fits one at a time: blocks, their halves, single layers.

They are found in the graph. A *cut* is a place that one tensor alone crosses; between two cuts lies either
one operator of a chain or, around matmuls, a residual module: attention or MLP with its shortcut. A block is
an attention module with the modules without attention behind it. What is no residual module is a layer:
patch embedding, reductions, head. Operators without matmul belong to the unit that follows them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import tvm
from tvm import relax

from tvm_vitq.errors import VitqError
from tvm_vitq.ops import attrs, op_name, shape_of
from tvm_vitq.relax_passes.sites import OPERANDS, bindings, tensor_arguments

LEVELS = ("block", "module")


@dataclass(frozen=True)
class Unit:
    """A part of a graph that one variable enters and one leaves.

    name : what the paths of its layers have in common;  kind : "block", "module" or "layer"
    start, stop : the variables; the `start` of a unit is the `stop` of the unit in front of it
    layers : its linear and attention layers;  sites : its vitq.quantize, both in program order
    """

    name: str
    kind: str
    start: str
    stop: str
    layers: tuple[str, ...]
    sites: tuple[str, ...]


def find_units(mod: tvm.IRModule, level: str = "block") -> list[Unit]:
    """All units of a canonical or annotated graph, front to back; together they are the whole graph.

    Parameters
    ----------
    level : "block", or "module" for attention and MLP one by one.
    """
    if level not in LEVELS:
        raise VitqError("unknown level of units", where="level", got=level, expected=" or ".join(LEVELS))
    found: list[_Segment] = []
    pending: list[relax.VarBinding] = []
    start = previous = mod["main"].params[0].name
    for segment in _segments(mod):
        pending += segment
        entered, previous = previous, segment[-1].var.name
        if not any(op_name(b.value) in OPERANDS for b in segment):
            continue
        attention = any(op_name(b.value) == "vitq.attention" for b in segment)
        kind = "module" if _is_residual(segment, entered) else "layer"
        last = found[-1] if found else None
        if level == "block" and kind == "module" and not attention and last and last.kind == "block":
            last.bindings += pending
        else:
            named = "block" if level == "block" and attention and kind == "module" else kind
            found.append(_Segment(named, start, pending))
        start, pending = previous, []
    if pending and found:
        found[-1].bindings += pending
    return [_unit(segment) for segment in found]


@dataclass
class _Segment:
    kind: str
    start: str
    bindings: list[relax.VarBinding]


def _segments(mod: tvm.IRModule) -> Iterator[list[relax.VarBinding]]:
    """Bindings between cuts. Only values that depend on the image cross one, and only with the batch axis in
    front.
    """
    image, result = mod["main"].params[0], mod["main"].body.body.name
    batch = shape_of(image)[0]
    everything = list(bindings(mod))
    last_use = {name: i for i, b in enumerate(everything) for name in _read(b)}
    last_use[result] = len(everything)
    alive, varying, segment = {image.name}, {image.name}, []
    for i, binding in enumerate(everything):
        segment.append(binding)
        if varying.intersection(_read(binding)):
            varying.add(binding.var.name)
            alive.add(binding.var.name)
        alive = {name for name in alive if last_use.get(name, -1) > i}
        if alive == {binding.var.name} and _first_axis(binding.var) == batch:
            yield segment
            segment = []
    if segment:
        yield segment


def _first_axis(variable: relax.Var) -> int | None:
    try:
        return shape_of(variable)[0]
    except (AttributeError, IndexError):  # a tuple, a scalar
        return None


def _read(binding: relax.VarBinding) -> list[str]:
    return [a.name for a in tensor_arguments(binding.value) if isinstance(a, relax.Var)]


def _is_residual(segment: list[relax.VarBinding], start: str) -> bool:
    """Whether what enters reaches the end without passing a matmul."""
    reached = {start}
    for binding in segment:
        if op_name(binding.value) not in OPERANDS and reached.intersection(_read(binding)):
            reached.add(binding.var.name)
    return segment[-1].var.name in reached


def _unit(segment: _Segment) -> Unit:
    def named(*ops: str) -> tuple[str, ...]:
        return tuple(attrs(b.value)["site"] for b in segment.bindings if op_name(b.value) in ops)

    layers = named(*OPERANDS)
    parts = zip(*(layer.split(".") for layer in layers), strict=False)
    name = ".".join(p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, parts)) or layers[0]
    stop = segment.bindings[-1].var.name
    return Unit(name, segment.kind, segment.start, stop, layers, named("vitq.quantize"))
