"""The groups that an image's channels choose, as the kernels need them: ranges, choice and sorted order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics_groups import GroupQuantizers
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.isa import isa
from tvm_vitq.schedules.kernel import Argument, Kernel, kernel_name
from tvm_vitq.schedules.tir import TB, Expr

Array = npt.NDArray

DOUBLES = 8
"""float64 lanes of the choice of groups."""


@dataclass(frozen=True)
class GroupLayout:
    """Where an image's table (int32) holds what. Channels are sorted by group; each group is padded to whole
    iterations of the innermost loop, `unit`.

    k, groups, unit : channels, quantizers to choose from, granule of a group.

    order : channel of each position, k in padding;  place : position of each channel;
    multiplier, zero : of each channel's quantizer, the former as the bits of a float32;
    starts : first iteration of each group, and behind the last one.
    """

    k: int
    groups: int
    unit: int

    @property
    def positions(self) -> int:
        """Most positions that groups and padding take, as whole vectors."""
        return packing.padded((self.k + self.groups * (self.unit - 1)) // self.unit * self.unit, packing.GROUP)

    @property
    def order(self) -> int:
        return 0

    @property
    def place(self) -> int:
        return packing.padded(self.positions, packing.GROUP)

    @property
    def multiplier(self) -> int:
        return self.place + packing.padded(self.k, packing.GROUP)

    @property
    def zero(self) -> int:
        return self.multiplier + packing.padded(self.k, packing.GROUP)

    @property
    def starts(self) -> int:
        return self.zero + packing.padded(self.k, packing.GROUP)

    @property
    def size(self) -> int:
        return packing.padded(self.starts + self.groups + 1, packing.GROUP)


@dataclass(frozen=True)
class GroupTable:
    """numerics_groups.int_assign of wide x [M, K] as one table per image.

    tokens : rows of an image;  groups : number of quantizers.

    Arguments of the kernel: x, low, high, multiplier, zero_point, out; `pack` returns low to zero_point.
    """

    isa: str
    m: int
    k: int
    tokens: int
    groups: int

    @property
    def layout(self) -> GroupLayout:
        return GroupLayout(self.k, self.groups, isa(self.isa).unit)

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        shape = (self.m, self.k, self.groups)
        return kernel_name("group_table", "int32", ["int32"], [], shape, f"t{self.tokens}", self.isa)

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        constants = (("low", "int32"), ("high", "int32"), ("multiplier", "float32"), ("zero_point", "int32"))
        return (
            Argument("x", (self.m, self.k), "int32", "input"),
            *(Argument(name, (self.groups,), dtype, "constant") for name, dtype in constants),
            Argument("out", (self.m // self.tokens, self.layout.size), "int32", "output"),
        )

    def pack(self, quantizers: GroupQuantizers) -> list[Array]:
        """The constants of numerics_groups.int_assign, and what belongs to each group."""
        q = quantizers
        arrays = [(q.low, "int32"), (q.high, "int32"), (q.multiplier, "float32"), (q.zero_point, "int32")]
        return [np.asarray(value, dtype) for value, dtype in arrays]

    def kernel(self) -> Kernel:
        """Generates the function."""
        arguments = self.arguments()

        def emit() -> None:
            buffers = {a.name: tir.argument(a.name, a.shape, a.dtype) for a in arguments}
            with TB.parallel(0, self.m // self.tokens) as image:
                _Table(self, buffers, image).emit()

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments)


class _Table:
    def __init__(self, spec: GroupTable, buffers: dict[str, Expr], image: Expr) -> None:
        self.spec, self.b, self.image, self.at = spec, buffers, image, spec.layout
        self.least, self.largest, self.group = (tir.scratch(spec.k, "int32") for _ in range(3))

    def emit(self) -> None:
        self._extremes()
        for start, count, lanes in tir.pieces(self.spec.k, DOUBLES):
            with TB.serial(0, count) as i:
                self._choose(tir.let(start + i * lanes), lanes)
        self._sort()

    def _extremes(self) -> None:
        """Smallest and largest value of each channel, row after row."""
        first = tir.let(self.image * self.spec.tokens)
        for start, count, lanes in tir.pieces(self.spec.k):
            with TB.serial(0, count) as i:
                at = tir.let(start + i * lanes)
                for ends in (self.least, self.largest):
                    tir.store(ends, tir.load(self.b["x"], [first, at], lanes), at, lanes)
        with TB.serial(1, self.spec.tokens) as row:
            for start, count, lanes in tir.pieces(self.spec.k):
                with TB.serial(0, count) as i:
                    at = tir.let(start + i * lanes)
                    value = tir.let(tir.load(self.b["x"], [first + row, at], lanes))
                    for ends, better in ((self.least, tir.minimum), (self.largest, tir.maximum)):
                        tir.store(ends, better(tir.load(ends, at, lanes), value), at, lanes)

    def _choose(self, at: Expr, lanes: int) -> None:
        """Groups of some channels. Squares and sums are whole numbers below 2**53, exact in float64."""
        least, largest = (
            tir.let(tir.cast(tir.load(ends, at, lanes), "float64", lanes))
            for ends in (self.least, self.largest)
        )

        def wide(name: str, g: int) -> Expr:
            value = tir.cast(tir.load(self.b[name], g, 1), "float64", 1)
            return value if lanes == 1 else tir.splat(value, lanes)

        best, group = None, tir.constant(0, "int32", lanes)
        for g in range(self.spec.groups):
            below, above = tir.let(least - wide("low", g)), tir.let(largest - wide("high", g))
            distance = tir.let(below * below + above * above)
            if best is None:
                best = distance
                continue
            group = tir.let(tir.select(distance < best, tir.constant(g, "int32", lanes), group))
            best = tir.let(tir.minimum(distance, best))
        tir.store(self.group, group, at, lanes)

    def _sort(self) -> None:
        """Counts the groups, then deals the channels out to them in order."""
        spec, at, unit = self.spec, self.at, self.at.unit
        following = tir.scratch(spec.groups, "int32")
        for g in range(spec.groups):
            tir.store(following, tir.constant(0, "int32", 1), g, 1)
        with TB.serial(0, spec.k) as c:
            g = tir.let(tir.load(self.group, c, 1))
            tir.store(following, tir.load(following, g, 1) + 1, g, 1)
        start: Expr = tir.constant(0, "int32", 1)
        for g in range(spec.groups):
            self._put(start, at.starts + g)
            count = tir.let(tir.load(following, g, 1))
            tir.store(following, start * unit, g, 1)
            start = tir.let(start + (count + (unit - 1)) // unit)
        self._put(start, at.starts + spec.groups)
        with TB.serial(0, at.positions) as p:
            self._put(tir.constant(spec.k, "int32", 1), at.order + p)
        with TB.serial(0, spec.k) as c:
            g = tir.let(tir.load(self.group, c, 1))
            position = tir.let(tir.load(following, g, 1))
            tir.store(following, position + 1, g, 1)
            self._put(tir.cast(c, "int32", 1), at.order + position)
            self._put(position, at.place + c)
            self._put(tir.reinterpret(tir.load(self.b["multiplier"], g, 1), "int32"), at.multiplier + c)
            self._put(tir.load(self.b["zero_point"], g, 1), at.zero + c)

    def _put(self, value: Expr, at: Expr) -> None:
        tir.store(self.b["out"], value, [self.image, at], 1)
