"""The groups that an image's channels choose, as the kernels need them: ranges, choice and sorted order."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics_groups import GroupQuantizers
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.isa import isa
from tvm_vitq.schedules.kernel import Argument, Kernel, kernel_name
from tvm_vitq.schedules.tir import LANES, TB, Expr

Array = npt.NDArray

ROWS = 8
"""Rows that are read together: extremes are loaded and stored once for all of them."""

DOUBLES = 8
"""float64 lanes of the choice of groups."""


@dataclass(frozen=True)
class GroupLayout:
    """Where an image's table (int32) holds what. Channels are sorted by group; each group is padded to whole
    iterations of the innermost loop, `unit`.

    k, groups, unit : channels, quantizers to choose from, granule of a group.

    order : channel of each position, k in padding;
    multiplier, zero : of each channel's quantizer, the former as the bits of a float32;
    starts : first iteration of each group, and behind the last one.
    """

    k: int
    groups: int
    unit: int

    @property
    def positions(self) -> int:
        """Most positions that groups and padding take, as whole vectors."""
        units = (self.k + self.groups * (self.unit - 1)) // self.unit
        return packing.padded(units * self.unit, packing.GROUP)

    @property
    def order(self) -> int:
        return 0

    @property
    def multiplier(self) -> int:
        return self.positions

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
        """Smallest and largest value of each channel, some rows at a time from the first to the last."""
        tokens = self.spec.tokens
        first = tir.let(self.image * tokens)
        self._rows(first, min(tokens, ROWS), True)
        with TB.serial(1, max(1, tokens // ROWS)) as i:
            self._rows(tir.let(first + i * ROWS), ROWS, False)
        if tokens > ROWS and tokens % ROWS:
            self._rows(tir.let(first + tokens // ROWS * ROWS), tokens % ROWS, False)

    def _rows(self, first: Expr, rows: int, start: bool) -> None:
        """Extremes of some rows and, but for those that `start`, of what came before."""
        for piece, count, lanes in tir.pieces(self.spec.k):
            with TB.serial(0, count) as i:
                at = tir.let(piece + i * lanes)
                values = [tir.let(tir.load(self.b["x"], [first + r, at], lanes)) for r in range(rows)]
                for ends, better in ((self.least, tir.minimum), (self.largest, tir.maximum)):
                    known = values if start else [tir.load(ends, at, lanes), *values]
                    tir.store(ends, functools.reduce(better, known), at, lanes)

    def _choose(self, at: Expr, lanes: int) -> None:
        """Groups of some channels, and what belongs to them. Squares and sums are whole numbers below 2**53,
        exact in float64.
        """
        least, largest = (
            tir.let(tir.cast(tir.load(ends, at, lanes), "float64", lanes))
            for ends in (self.least, self.largest)
        )

        def lanes_of(value: Expr) -> Expr:
            return value if lanes == 1 else tir.splat(value, lanes)

        def wide(name: str, g: int) -> Expr:
            return lanes_of(tir.cast(tir.load(self.b[name], g, 1), "float64", 1))

        def chosen(g: int) -> list[Expr]:
            multiplier = tir.reinterpret(tir.load(self.b["multiplier"], g, 1), "int32")
            numbers = (tir.constant(g, "int32", 1), multiplier, tir.load(self.b["zero_point"], g, 1))
            return [tir.let(lanes_of(number)) for number in numbers]

        best, group = None, chosen(0)
        for g in range(self.spec.groups):
            below, above = tir.let(least - wide("low", g)), tir.let(largest - wide("high", g))
            distance = tir.let(below * below + above * above)
            if best is None:
                best = distance
                continue
            nearer = distance < best
            group = [tir.let(tir.select(nearer, *pair)) for pair in zip(chosen(g), group, strict=True)]
            best = tir.let(tir.minimum(distance, best))
        tir.store(self.group, group[0], at, lanes)
        for value, start in zip(group[1:], (self.at.multiplier, self.at.zero), strict=True):
            tir.store(self.b["out"], value, [self.image, start + at], lanes)

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
        with TB.serial(0, at.positions // LANES) as i:
            tir.store(self.b["out"], tir.constant(spec.k, "int32"), [self.image, at.order + i * LANES])
        with TB.serial(0, spec.k) as c:
            g = tir.let(tir.load(self.group, c, 1))
            position = tir.let(tir.load(following, g, 1))
            tir.store(following, position + 1, g, 1)
            self._put(tir.cast(c, "int32", 1), at.order + position)

    def _put(self, value: Expr, at: Expr) -> None:
        tir.store(self.b["out"], value, [self.image, at], 1)
