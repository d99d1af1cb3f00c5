"""The statements of the linear kernel with groups that are known at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.delayed_lookup import DelayedLookup
from tvm_vitq.schedules.isa import Left, Side, Sink, Start
from tvm_vitq.schedules.kernel import Split
from tvm_vitq.schedules.linear_body import LinearBody
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.tir import TB, Expr

if TYPE_CHECKING:
    from tvm_vitq.schedules.group_linear import GroupLinear

CACHE_LINE = 64
"""Bytes."""


class GroupLinearBody(LinearBody):
    """The body of the kernel.

    Tasks are (image) x (panel of columns) x (block of rows). Each first gathers its panel: the weights of
    the channels in the image's order, interleaved as the instruction wants them. So the product finds both
    operands in one piece and runs through them group by group, with sums that start from 0 in each group.
    """

    spec: GroupLinear

    def __init__(self, spec: GroupLinear, buffers: dict[str, Expr]) -> None:
        super().__init__(spec, buffers)
        self.rows = Split.of(spec.tokens, spec.tiles.rows)
        self.blocks = Split.of(self.rows.count, self._asked_tiles(spec.tokens))
        self.image: Expr = 0
        self.panel: Expr = None
        self.start: Expr = None

    def emit(self) -> None:
        images = self.spec.m // self.spec.tokens
        with TB.parallel(0, images * self.panels.count * self.blocks.count) as task:
            block = tir.let(task % self.blocks.count)
            rest = tir.let(task // self.blocks.count)
            panel = tir.let(rest % self.panels.count)
            self.image = tir.let(rest // self.panels.count)
            self.first_row = tir.let(self.image * self.spec.tokens)
            self._split(
                self.panels, panel, lambda first, size: self._gathered(block, first * GROUP, size * GROUP)
            )

    def _gathered(self, block: Expr, column: Expr, columns: int) -> None:
        column = tir.let(column)
        self.panel = tir.scratch(self.spec.most_depth * columns, "int8")
        self.start = tir.scratch(self.spec.choices * columns, "int32")
        self._gather(column, columns)
        self._starts(columns)
        self._panel(block, column, columns)

    def _entry(self, at: Expr) -> Expr:
        """An entry of the image's table."""
        return tir.load(self.b["groups"], [self.image, at], 1)

    def _gather(self, column: Expr, columns: int) -> None:
        """The panel's weights in the order of the image's groups, ``[position / step][columns][step]``."""
        step, layout = self.isa.step, self.spec.layout
        base = tir.let(column * (self.spec.k + 1))
        end = tir.let(self._entry(layout.starts + self.spec.choices) * (self.isa.unit // step))
        with TB.serial(0, end) as i:
            rows = [tir.let(base + self._entry(layout.order + i * step + j) * columns) for j in range(step)]
            for c, width in self.spec.parts(columns):
                vectors = [tir.let(tir.load(self.b["weight"], row + c, width)) for row in rows]
                for v, packed in enumerate(tir.interleave_parts(vectors, width)):
                    tir.store(self.panel, packed, i * (columns * step) + c * step + v * width, width)

    def _starts(self, columns: int) -> None:
        """What each group's product is too small by: its zero point, and what the instruction adds to codes,
        times the sums of its weights. The latter are the product of a row of ones.
        """
        ones = self.isa.left_dtype("int8")
        offset = self.isa.offset("int8")
        with TB.serial(0, self.spec.choices) as group:
            excess = tir.let(tir.load(self.b["code_zero"], group, 1) + offset)

            def sink(r: int, c: Expr, value: Expr, lanes: int) -> None:
                tir.store(self.start, value * tir.splat(-excess, lanes), group * columns + c, lanes)

            self._group(group, columns, 1, lambda _, __, n: tir.constant(1, ones, n), sink)

    def _group(
        self,
        group: Expr,
        columns: int,
        rows: int,
        left: Left,
        sink: Sink,
        side: Side | None = None,
        start: Start | None = None,
    ) -> None:
        """Products of one group; `left` takes positions, `side` iterations of all groups."""
        layout = self.spec.layout
        first = tir.let(self._entry(layout.starts + group))
        count = tir.let(self._entry(layout.starts + group + 1) - first)
        position = tir.let(first * self.isa.unit)
        base = tir.let(position * columns)

        def right(offset: Expr, n: int) -> Expr:
            return tir.load(self.panel, base + offset, n)

        def shifted(r: int, k: Expr, n: int) -> Expr:
            return left(r, position + k, n)

        options: dict[str, Any] = {} if start is None else {"start": start}
        if side is not None:
            done = tir.let(first * self.isa.side_steps(columns, self.isa.unit))
            options["side"] = lambda i: side(done + i)
        self.isa.matmul(rows, columns, count * self.isa.unit, shifted, right, sink, "int8", False, **options)

    def _fetch_ahead(self, row: Expr, column: Expr, columns: int) -> None:
        """Asks for a share of the next panel's weights: gathering them has nothing else to do meanwhile."""
        lines = tir.ceildiv((self.spec.k + 1) * columns, CACHE_LINE)
        share = tir.ceildiv(lines, min(self.rows.count, self.blocks.large))
        base = tir.let((column + columns) * (self.spec.k + 1) + row // self.rows.large * (share * CACHE_LINE))
        for i in range(share):
            tir.prefetch(self.b["weight"], base + i * CACHE_LINE)

    def _tile(self, row: Expr, column: Expr, rows: int, columns: int, lookup: DelayedLookup | None) -> None:
        self._fetch_ahead(row, column, columns)
        sums = tir.scratch(rows * columns, "int32")
        for i in range(0, rows * columns, GROUP):
            tir.store(sums, tir.constant(0, "int32"), i)

        def left(r: int, k: Expr, n: int) -> Expr:
            return tir.load(self.b["x"], [self.first_row + row + r, k], n)

        with TB.serial(0, self.spec.choices) as group:

            def start(c: Expr, lanes: int) -> Expr:
                return tir.load(self.start, group * columns + c, lanes)

            def sink(r: int, c: Expr, value: Expr, lanes: int) -> None:
                if not self.isa.has_start:
                    value = value + start(c, lanes)
                multiplier = tir.load(self.b["group_multiplier"], [group, column + c], lanes)
                part = tir.rint(tir.cast(value, "float32", lanes) * multiplier, lanes)
                at = r * columns + c
                tir.store(sums, tir.load(sums, at, lanes) + part, at, lanes)

            side = lookup.step if lookup is not None else None
            self._group(group, columns, rows, left, sink, side, start if self.isa.has_start else None)
        if lookup is not None:
            lookup.write_previous()
        self._epilogue(sums, row, column, rows, columns, lookup)
