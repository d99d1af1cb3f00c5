"""The statements of the linear kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm_vitq.numerics import WIDE_MAX
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.delayed_lookup import MAX_SIDE_LOOKUPS, DelayedLookup
from tvm_vitq.schedules.isa import Side, Sink
from tvm_vitq.schedules.kernel import Split
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.requantize import requantize, zero_lanes
from tvm_vitq.schedules.tir import TB, Expr

if TYPE_CHECKING:
    from tvm_vitq.schedules.linear import Linear


TASKS = 6
"""Of a product, at least, where it has so many tiles: few large ones leave threads idle at the end."""


class LinearBody:
    """The body of the kernel.

    Tasks are (block of rows) x (panel of columns), run in parallel: a panel of weights stays in the first or
    second level cache while the rows of the block pass by. A thread takes tasks that follow each other:
    `Tile.order` says which of weights and rows it reads again.
    """

    def __init__(self, spec: Linear, buffers: dict[str, Expr]) -> None:
        self.spec, self.b, self.isa = spec, buffers, spec.target
        self.rows = Split.of(spec.m, spec.tiles.rows)
        self.panels = Split.of(packing.padded(spec.n, GROUP) // GROUP, spec.tiles.columns // GROUP)
        self.blocks = Split.of(self.rows.count, self._block_tiles())
        self.groups = max(spec.groups, 1)
        self.left: Expr = buffers["x"]
        self.weight: Expr = buffers["weight"]  # all panels, or the current one where weights are packed
        self.first_row: Expr = 0  # what rows are counted from
        self.tile: Expr = 0  # of the block, the current one

    def _block_tiles(self) -> int:
        """Row tiles of a block: those of the schedule, or fewer, so that there are `TASKS`."""
        blocks = tir.ceildiv(TASKS, self.panels.count)
        return min(self._asked_tiles(self.spec.m), tir.ceildiv(self.rows.count, blocks))

    def _asked_tiles(self, rows: int) -> int:
        """Row tiles of a block that the schedule asks for, of `rows` rows in all."""
        asked = self.spec.block_rows
        return self.rows.count if asked >= rows else max(1, asked // self.spec.tiles.rows)

    def emit(self) -> None:
        if self.spec.staged:
            self._stage()
        panels, blocks = self.panels.count, self.blocks.count
        with TB.parallel(0, panels * blocks) as task:
            if self.spec.tiles.order == "panels":
                panel = tir.let(task // blocks)
                block = tir.let(task % blocks)
            else:
                block = tir.let(task // panels)
                panel = tir.let(task % panels)
            self._split(
                self.panels, panel, lambda first, size: self._panel(block, first * GROUP, size * GROUP)
            )

    def _split(self, split: Split, index: Expr, body: Callable[[Expr, int], None]) -> None:
        """Runs body(first unit, static size) for piece `index` of a Split."""
        small_first = split.number_large * split.large
        if split.number_large == split.count:
            body(index * split.large, split.large)
        else:
            tir.choose(
                index < split.number_large,
                lambda: body(tir.let(index * split.large), split.large),
                lambda: body(tir.let(small_first + (index - split.number_large) * split.small), split.small),
            )

    def _stage(self) -> None:
        """x in the type and with the padding that the register tile reads."""
        spec, width, depth = self.spec, self.spec.group_width, self.spec.depth
        staged = tir.scratch(spec.m * self.groups * depth, self.isa.left_dtype("int8"))
        # Waking the other threads takes as long as converting some 100 KB.
        rows = TB.parallel(0, spec.m) if spec.m * spec.k > 2**17 else TB.serial(0, spec.m)
        with rows as row, TB.serial(0, self.groups) as group:
            base = tir.let((row * self.groups + group) * depth)
            done = 0
            for lanes in (64, 16, 1):
                count = (width - done) // lanes
                if count:
                    with TB.serial(0, count) as i:
                        at = done + i * lanes
                        value = tir.load(self.b["x"], [row, group * width + at], lanes)
                        tir.store(staged, self.isa.convert_left(value, "int8", lanes), base + at, lanes)
                done += count * lanes
            for i in range(width, depth):
                tir.store(staged, self.isa.convert_left(tir.constant(0, "int8", 1), "int8", 1), base + i, 1)
        self.left = staged

    def _panel(self, block: Expr, column: Expr, columns: int) -> None:
        """All rows of the block for one panel; `columns` is static."""
        large = self.blocks.large
        if self.spec.planes is not None:
            self._unpack(column, columns)
        lookup = DelayedLookup(self, column, columns) if self.delays_lookup else None
        with TB.serial(0, large) as i:
            tile = tir.let(block * large + i)
            self.tile = i
            with tir.when(tile < self.rows.count):
                if lookup is not None:
                    lookup.tile = tile
                self._split(self.rows, tile, lambda row, rows: self._tile(row, column, rows, columns, lookup))
        if lookup is not None:
            lookup.finish(tir.let(tir.minimum(block * large + large, self.rows.count)))

    def _unpack(self, column: Expr, columns: int) -> None:
        """The weights of a panel, which come once for all rows of a block, as bytes."""
        spec, step, planes = self.spec, self.isa.step, self.spec.planes
        assert planes is not None  # by the caller
        width, depths = columns * step, spec.whole_depth // step
        start = self._panel_start(column, columns)
        whole = packing.padded(depths, planes.rows) * width
        self.weight = tir.scratch(whole, "int8")
        base = self.b["weight_base"]
        planes.unpack(self.b["weight"], start, base, column * step, self.weight, depths, width)

    def _panel_start(self, column: Expr, columns: int) -> Expr:
        """Where the weights of a panel begin."""
        wide = self.panels.large * GROUP
        before = self.panels.number_large if columns < wide else 0
        index = tir.let((column - before * wide) // columns)
        return tir.let(before * self.spec.panel_bytes(wide) + index * self.spec.panel_bytes(columns))

    def _next_panel(self, column: Expr, columns: int) -> Callable[[Expr], Expr]:
        """The byte of the next panel to ask for in an iteration of the product's innermost loop.

        All products of the block together ask for all of it: its weights come from the cache of the third
        level or from memory, which this hides. In one burst before a product it costs more than it gains.
        """
        size = self.spec.panel_bytes(columns)
        steps = self.isa.side_steps(columns, self.spec.whole_depth)
        each = tir.ceildiv(size, self.blocks.large * steps)
        start = tir.let(self._panel_start(column, columns) + size + self.tile * (steps * each))
        return lambda i: start + i * each

    @property
    def delays_lookup(self) -> bool:
        """Whether table lookups of a tile are done inside the product of the next one."""
        spec = self.spec
        elements = self.rows.large * spec.tiles.columns
        per_step = tir.ceildiv(elements, self.isa.side_steps(spec.tiles.columns, spec.whole_depth))
        return bool(spec.lookup) and self.isa.has_side and per_step <= MAX_SIDE_LOOKUPS

    def _tile(self, row: Expr, column: Expr, rows: int, columns: int, lookup: DelayedLookup | None) -> None:
        sums = tir.scratch(rows * columns, "int32")
        if self.spec.multiples:
            self._multiples(sums, row, column, rows, columns, lookup)
        elif self.spec.groups:
            self._partial(sums, row, column, rows, columns, lookup)
        else:
            side = self._side(column, columns, lookup, 0)
            self._product(sums, row, column, rows, columns, 0, side)
        if lookup is not None:
            lookup.write_previous()
        self._epilogue(sums, row, column, rows, columns, lookup)

    def _side(self, column: Expr, columns: int, lookup: DelayedLookup | None, group: Expr) -> Side | None:
        """What the product of a group does besides: lookups for the tile before, asking for weights."""
        ahead = self._next_panel(column, columns) if self.isa.fetches_ahead else None
        if not self.isa.has_side or (lookup is None and ahead is None):
            return None
        before = group * self.isa.side_steps(columns, self.spec.depth)

        def side(i: Expr) -> None:
            if lookup is not None:
                lookup.step(before + i)
            if ahead is not None:
                tir.prefetch(self.b["weight"], ahead(before + i))

        return side

    def _product(
        self,
        sums: Expr,
        row: Expr,
        column: Expr,
        rows: int,
        columns: int,
        group: Expr,
        side: Side | None = None,
    ) -> None:
        """sums = x[rows, group] @ weight[columns, group].T"""

        def sink(r: int, c: Expr, value: Expr, lanes: int) -> None:
            tir.store(sums, value, r * columns + c, lanes)

        self._dots(row, column, rows, columns, group, sink, side)

    def _dots(
        self, row: Expr, column: Expr, rows: int, columns: int, group: Expr, sink: Sink, side: Side | None
    ) -> None:
        """Gives x[rows, group] @ weight[columns, group].T to `sink`."""
        spec, depth = self.spec, self.spec.depth
        panel = column if spec.planes is None else 0
        base = tir.let(panel * (self.groups * depth) + group * (depth * columns))

        def left(r: int, k: Expr, n: int) -> Expr:
            if spec.staged:
                return tir.load(self.left, ((row + r) * self.groups + group) * depth + k, n)
            return tir.load(self.left, [row + r, group * depth + k], n)

        def right(offset: Expr, n: int) -> Expr:
            return tir.load(self.weight, base + offset, n)

        options: dict[str, Any] = {} if side is None else {"side": side}
        if spec.tiles.unroll > 1:
            options["unroll"] = spec.tiles.unroll
        self.isa.matmul(rows, columns, depth, left, right, sink, "int8", False, **options)

    def _multiples(
        self, sums: Expr, row: Expr, column: Expr, rows: int, columns: int, lookup: DelayedLookup | None
    ) -> None:
        """sums = sum over groups of count times product: all of them stay in registers."""
        for i in range(0, rows * columns, GROUP):
            tir.store(sums, tir.constant(0, "int32"), i)
        with TB.serial(0, self.groups) as group:

            def sink(r: int, c: Expr, value: Expr, lanes: int) -> None:
                count = tir.cast(tir.load(self.b["count"], [group, column + c], lanes), "int32", lanes)
                at = r * columns + c
                tir.store(sums, tir.load(sums, at, lanes) + value * count, at, lanes)

            side = self._side(column, columns, lookup, group)
            self._dots(row, column, rows, columns, group, sink, side)

    def _partial(
        self, sums: Expr, row: Expr, column: Expr, rows: int, columns: int, lookup: DelayedLookup | None
    ) -> None:
        """sums = sum over groups of the rounded, scaled products; bias comes with the epilogue."""
        dots = tir.scratch(rows * columns, "int32")
        several = self.groups > 1
        if several:
            for i in range(0, rows * columns, GROUP):
                tir.store(sums, tir.constant(0, "int32"), i)
        with TB.serial(0, self.groups) as group:
            side = self._side(column, columns, lookup, group)
            self._product(dots, row, column, rows, columns, group, side)
            for c in range(0, columns, GROUP):
                at = [group, column + c]
                bias = tir.let(tir.load(self.b["group_bias"], at))
                multiplier = tir.let(tir.load(self.b["group_multiplier"], at))
                colsum = tir.let(tir.load(self.b["colsum"], at)) if self.spec.row_zero_points else None
                for r in range(rows):
                    value = tir.load(dots, r * columns + c) + bias
                    if colsum is not None:
                        value = value - tir.splat(tir.load(self.b["row_zero_point"], row + r, 1)) * colsum
                    scaled = tir.cast(value, "float32") * multiplier
                    if self.spec.row_scales:
                        scaled = scaled * tir.splat(tir.load(self.b["row_multiplier"], row + r, 1))
                    scaled = tir.clip(scaled, float(-WIDE_MAX), float(WIDE_MAX), "float32")
                    total = tir.rint(scaled)
                    if several:
                        total = tir.load(sums, r * columns + c) + total
                    tir.store(sums, total, r * columns + c)

    def _epilogue(
        self, sums: Expr, row: Expr, column: Expr, rows: int, columns: int, lookup: DelayedLookup | None
    ) -> None:
        spec, out = self.spec, self.spec.out
        indices = None
        if spec.lookup:
            indices = lookup.indices if lookup else tir.scratch(rows * columns, "uint16")
        for c in range(0, columns, GROUP):
            bias = tir.let(tir.load(self.b["bias"], column + c))
            multiplier = tir.let(tir.load(self.b["multiplier"], column + c))
            zero = zero_lanes(self._zero_point(column + c), out, GROUP, self.isa.saturating_rint)
            for r in range(rows):
                value = tir.load(sums, r * columns + c) + bias
                value = requantize(value, multiplier, zero, out)
                if indices is not None:
                    tir.store(indices, tir.cast(value, "uint16"), r * columns + c)
                else:
                    self.write(tir.let(value), row + r, column + c, last=c + GROUP == columns)
        if indices is not None and lookup is None:
            self._look_up(indices, row, column, rows, columns)

    def _look_up(self, indices: Expr, row: Expr, column: Expr, rows: int, columns: int) -> None:
        """Stores the entries of the table at `indices`."""
        spec, table = self.spec, self.b["table"]

        def entry(at: Expr) -> Expr:
            return tir.load(table, tir.cast(tir.load(indices, at, 1), "int32", 1), 1)

        if spec.codes:
            entries = tir.scratch(rows * columns, spec.lookup)
            with TB.serial(0, rows * columns) as i:
                tir.store(entries, entry(i), i, 1)
            for at in range(0, rows * columns, GROUP):
                r, c = divmod(at, columns)
                value = self.converted(tir.load(entries, at), column + c)
                self.write(tir.let(value), row + r, column + c, last=c + GROUP == columns)
            return
        valid = columns if spec.n % GROUP == 0 else tir.let(tir.minimum(columns, spec.n - column))
        for r in range(rows):
            with TB.serial(0, valid) as c:
                tir.store(self.b["out"], entry(r * columns + c), [self.first_row + row + r, column + c], 1)

    def converted(self, entries: Expr, column: Expr) -> Expr:
        """Entries of the table in the type of the result."""
        codes = self.spec.codes
        if codes is None:
            return entries
        zero = zero_lanes(
            tir.let(tir.load(self.b["entry_zero"], column)), codes, GROUP, self.isa.saturating_rint
        )
        return requantize(entries, tir.load(self.b["entry_multiplier"], column), zero, codes)

    def _zero_point(self, column: Expr) -> Expr | None:
        if self.spec.zero_point == "none":
            return None
        if self.spec.zero_point == "scalar":
            return tir.let(tir.splat(tir.load(self.b["zero_point"], 0, 1)))
        return tir.let(tir.load(self.b["zero_point"], column))

    def write(self, value: Expr, row: Expr, column: Expr, last: bool) -> None:
        """Stores one vector, adding the residual; the last one of a panel may reach beyond column n."""
        row = self.first_row + row
        tail = self.spec.n % GROUP
        if not (last and tail):
            self._write_lanes(value, row, column, GROUP)
            return

        def partly() -> None:
            lane = tir.scratch(GROUP, self._value_dtype)
            tir.store(lane, value, 0)
            with TB.serial(0, tail) as i:
                self._write_lanes(tir.load(lane, i, 1), row, column + i, 1)

        tir.choose(
            column + GROUP <= self.spec.n, lambda: self._write_lanes(value, row, column, GROUP), partly
        )

    @property
    def _value_dtype(self) -> str:
        """Type of the vectors that _write receives."""
        if self.spec.lookup:
            return self.spec.lookup
        return "float32" if self.spec.out.dtype == "float32" else "int32"

    def _write_lanes(self, value: Expr, row: Expr, column: Expr, lanes: int) -> None:
        if self.spec.residual:
            total = value + tir.load(self.b["residual"], [row, column], lanes)
            value = tir.clip(total, -WIDE_MAX, WIDE_MAX, "int32", lanes)
        if self._value_dtype != self.spec.out_dtype:
            value = tir.cast(value, self.spec.out_dtype, lanes)
        tir.store(self.b["out"], value, [row, column], lanes)
