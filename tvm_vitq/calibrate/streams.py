"""Which tensors of a model share their channels, as the residual stream does, found in the graph.

Two tensors belong to one stream if an operator needs their channels in the same order: additions, movements
of rows, concatenation of tokens, means over tokens. A LayerNorm belongs in between if its gamma and beta can
be moved into the linear layers behind it: what is left of it, ``(x - mean(x)) / std(x)``, treats all channels
alike.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from tvm_vitq.graph import columns_read, data_operands, is_constant, is_movement
from tvm_vitq.ops import attrs, op_name, shape_of
from tvm_vitq.relax_passes.constants import constants_of
from tvm_vitq.relax_passes.sites import bindings, tensor_arguments

Path = tuple[relax.Call, ...]


@dataclass
class Stream:
    """Tensors whose channels any matrix that keeps means and lengths may turn, all by the same.

    width : channels
    writers, readers : linear layers whose output, whose input is part of it
    constants : those added to it or concatenated with it, by their names for `replace_constants`
    norms : LayerNorms inside, each with the linear layers that read its output
    declined : why it must stay as it is; empty if it need not
    """

    width: int
    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    norms: dict[str, list[str]] = field(default_factory=dict)
    declined: str = ""


def find_streams(mod: tvm.IRModule) -> list[Stream]:
    """All streams of a canonical or annotated graph that a LayerNorm reads, in program order."""
    apart = _trace(mod, ())
    behind = {part.behind[0]: part.readers for part in apart if part.is_behind_norm}
    streams = []
    for part in _trace(mod, behind):
        norms = [*part.inside, *part.before]
        if not norms:
            continue
        reason = part.declined
        if not reason and part.before:
            reason = f"the affine part of {part.before[0]} has other readers than linear layers"
        if not reason and part.behind:
            reason = f"{part.behind[0]} writes it"
        inside = {norm: behind.get(norm, []) for norm in part.inside or norms[:1]}
        streams.append(Stream(part.width, part.writers, part.readers, part.constants, inside, reason))
    return streams


@dataclass
class _Part:
    """What is known of one set of tensors. LayerNorms are inside, or read it (before), or make it
    (behind).
    """

    width: int
    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    declined: str = ""

    @property
    def is_behind_norm(self) -> bool:
        """Whether it is the output of one LayerNorm, which linear layers alone read."""
        others = self.declined or self.writers or self.constants or self.before
        return len(self.behind) == 1 and bool(self.readers) and not others

    def merge(self, other: _Part) -> None:
        for name in ("writers", "readers", "constants", "inside", "before", "behind"):
            getattr(self, name).extend(getattr(other, name))
        self.declined = self.declined or other.declined


def _trace(mod: tvm.IRModule, inside: Collection[str]) -> list[_Part]:
    """Parts of the graph; the LayerNorms `inside` connect their input and output."""
    tracer = _Tracer(inside)
    (image,) = mod["main"].params
    tracer.new(image).declined = "the image writes it"
    for binding in bindings(mod):
        tracer.visit(binding)
    tracer.part(mod["main"].body.body, "the model's result").declined = "it is the model's result"
    return [part for name, part in tracer.parts.items() if tracer.owners[name] == name]


class _Tracer:
    def __init__(self, inside: Collection[str]) -> None:
        self.inside = inside
        self.owners: dict[str, str] = {}
        self.parts: dict[str, _Part] = {}
        self.moved: dict[str, tuple[relax.Var, Path]] = {}
        """Variables that are not in the shape of their part: the member they come from, and how."""

    def new(self, variable: relax.Var) -> _Part:
        self.owners[variable.name] = variable.name
        shape = getattr(variable.ty, "shape", None)
        width = shape_of(variable)[-1] if shape is not None and len(shape.values) else 0
        self.parts[variable.name] = _Part(width)
        return self.parts[variable.name]

    def find(self, name: str) -> str:
        while self.owners[name] != name:
            name = self.owners[name]
        return name

    def join(self, variable: relax.Var, other: relax.Var) -> None:
        """Put a variable in the part of another."""
        if variable.name not in self.owners:
            self.new(variable)
        first, second = self.find(other.name), self.find(variable.name)
        if first != second:
            self.parts[first].merge(self.parts[second])
            self.owners[second] = first

    def part(self, variable: relax.Var, reader: str) -> _Part:
        """The part of what `reader` reads; declined if its channels are not in place there."""
        origin, path = self.moved.get(variable.name, (variable, ()))
        part = self.parts[self.find(origin.name)]
        if path:
            part.declined = part.declined or f"{reader} reads it with its channels moved"
        return part

    def visit(self, binding: relax.VarBinding) -> None:
        variable, value, op = binding.var, binding.value, op_name(binding.value)
        site = attrs(value)["site"] if op.startswith("vitq.") else variable.name
        read = [a for a in tensor_arguments(value) if isinstance(a, relax.Var)]
        if isinstance(value, relax.Var) or (
            is_movement(value) and len(data_operands(value)) == 1 == len(read)
        ):
            self.move(variable, read[0], () if isinstance(value, relax.Var) else (value,))
        elif op == "vitq.linear":
            self.part(read[0], site).readers.append(site)
            self.new(variable).writers.append(site)
        elif op == "vitq.layer_norm":
            self.norm(variable, read[0], site)
        elif self.keeps_channels(binding):
            for operand in read:
                self.part(operand, site)
                self.join(variable, operand if operand.name in self.owners else self.moved[operand.name][0])
            part = self.parts[self.find(variable.name)]
            for name, constant in constants_of(binding):
                part.constants.append(name)
                if shape_of(constant)[-1:] != [part.width]:
                    part.declined = part.declined or f"{name} has one value for several channels"
        else:
            for operand in read:
                part = self.part(operand, site)
                part.declined = part.declined or f"{site} ({op or 'a tuple'}) reads it"
            self.new(variable).declined = f"{site} ({op or 'a tuple'}) writes it"

    def move(self, variable: relax.Var, source: relax.Var, step: Path) -> None:
        origin, path = self.moved.get(source.name, (source, ()))
        path = path + step
        columns = columns_read(path, shape_of(origin))
        width = shape_of(origin)[-1]
        if columns.shape[-1:] == (width,) and bool((columns == np.arange(width)).all()):
            self.join(variable, origin)
        else:
            self.moved[variable.name] = origin, path

    def norm(self, variable: relax.Var, source: relax.Var, site: str) -> None:
        part = self.part(source, site)
        if site in self.inside and source.name in self.owners:
            self.join(variable, source)
            self.parts[self.find(variable.name)].inside.append(site)
        else:
            part.before.append(site)
            self.new(variable).behind.append(site)

    @staticmethod
    def keeps_channels(binding: relax.VarBinding) -> bool:
        """Whether channel by channel the result is a sum, mean or copy of the operands."""
        value, op = binding.value, op_name(binding.value)
        if op == "vitq.quantize":
            return True
        if op == "vitq.mean":
            return attrs(value)["axis"] % len(shape_of(value.args[0])) != len(shape_of(value.args[0])) - 1
        if op == "relax.concat":
            return int(value.attrs.axis) % len(shape_of(value)) != len(shape_of(value)) - 1
        if op != "relax.add":
            return False
        return all(is_constant(a) or shape_of(a)[-1] == shape_of(value)[-1] for a in value.args)
