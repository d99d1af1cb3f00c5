"""Linear layer on codes: staging, product, output conversion, table lookup and residual add in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics import WIDE_MAX, Output, Partial
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.isa import Isa, Tile, isa
from tvm_vitq.schedules.kernel import Argument, Kernel, Split, kernel_name
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.requantize import requantize, zero_lanes
from tvm_vitq.schedules.tir import TB, Expr

Array = npt.NDArray


@dataclass(frozen=True)
class Linear:
    """numerics.int_linear of x [M, K] and weight [N, K], optionally followed by int_lookup or int_add.

    isa : name of the instruction set.
    out : conversion of the sums. With `lookup` it is Output("uint16", 0, 4095) and the result is the table's
        entry.
    lookup : dtype of the table (4096 entries, an argument), or None.
    residual : adds a wide tensor [M, N] with saturation; `out` is then int32.
    zero_point : "none" (0), "scalar" or "vector", how the output's zero point is given.
    groups : K is cut into this many groups with multipliers of their own (numerics.Partial); 0 for none.
    row_scales, row_zero_points : Partial.row_multiplier and Partial.row_zero_point are present (needs groups
        >= 1).
    tile : tile sizes; None takes the instruction set's default.

    Arguments of the kernel, in order: x, weight, bias, multiplier, [zero_point], [group_multiplier,
    group_bias], [row_multiplier], [row_zero_point, colsum], [table], [residual], out. `pack` returns those
    from weight to colsum.
    """

    isa: str
    m: int
    n: int
    k: int
    out: Output
    lookup: str | None = None
    residual: bool = False
    zero_point: str = "none"
    groups: int = 0
    row_scales: bool = False
    row_zero_points: bool = False
    tile: Tile | None = None

    @property
    def target(self) -> Isa:
        return isa(self.isa)

    @property
    def tiles(self) -> Tile:
        """The tile sizes in force."""
        return self.tile or self.target.tile

    @property
    def group_width(self) -> int:
        """Depths of a group."""
        return self.k // max(self.groups, 1)

    @property
    def depth(self) -> int:
        """Depths of a group as stored: padded to whole iterations."""
        return packing.padded(self.group_width, self.target.unit)

    @property
    def out_dtype(self) -> str:
        return self.lookup or self.out.dtype

    @property
    def staged(self) -> bool:
        """Whether x is first converted into a private copy."""
        return self.target.left_dtype("int8") != "int8" or self.depth != self.group_width

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        epilogue = ["shift"] if self.out.kind == "shift" else []
        epilogue += ["lut"] if self.lookup else []
        epilogue += ["add"] if self.residual else []
        weight = "qs8cx" if not self.groups else f"qs8g{self.group_width}"
        left = "qs8" + ("px" if self.row_scales else "") + ("pz" if self.row_zero_points else "")
        zero = {"none": "", "scalar": "z", "vector": "zv"}[self.zero_point]
        clip = "" if self.out_dtype == "float32" else f"{self.out.qmin}to{self.out.qmax}".replace("-", "m")
        tile = "" if self.tile is None else f"t{self.tile.rows}x{self.tile.columns}x{self.tile.block_rows}"
        shape = (self.m, self.k, self.n)
        return kernel_name("linear", self.out_dtype, [left, weight], epilogue, shape, clip, zero, tile)

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        m, n, k, padded = self.m, self.n, self.k, packing.padded(self.n, GROUP)
        size = padded * self.depth * max(self.groups, 1)
        result = [Argument("x", (m, k), "int8", "input"), Argument("weight", (size,), "int8", "constant")]
        result.append(Argument("bias", (padded,), "int32", "constant"))
        result.append(Argument("multiplier", (padded,), packing.multiplier_dtype(self.out), "constant"))
        if self.zero_point != "none":
            shape = (1,) if self.zero_point == "scalar" else (padded,)
            result.append(Argument("zero_point", shape, "int32", "constant"))
        if self.groups:
            result.append(Argument("group_multiplier", (self.groups, padded), "float32", "constant"))
            result.append(Argument("group_bias", (self.groups, padded), "int32", "constant"))
        if self.row_scales:
            result.append(Argument("row_multiplier", (m,), "float32", "constant"))
        if self.row_zero_points:
            result.append(Argument("row_zero_point", (m,), "int32", "constant"))
            result.append(Argument("colsum", (self.groups, padded), "int32", "constant"))
        if self.lookup:
            result.append(Argument("table", (4096,), self.lookup, "input"))
        if self.residual:
            result.append(Argument("residual", (m, n), "int32", "input"))
        return (*result, Argument("out", (m, n), self.out_dtype, "output"))

    def pack(
        self,
        weight: Array,
        bias: Array,
        multiplier: Array | float,
        zero_point: Array | int = 0,
        partial: Partial | None = None,
    ) -> list[Array]:
        """The constants of numerics.int_linear as this kernel's arguments from `weight` to `colsum`.

        The offset that the instruction adds to x (128 on x86) is taken back here: ``bias - offset * sum_k
        weight``.
        """
        target, groups = self.target, max(self.groups, 1)
        packed = packing.pack_right(weight, self.tiles.columns, target.step, target.unit, groups)
        excess = target.offset("int8") * weight.astype(np.int32).reshape(self.n, groups, -1).sum(
            -1, dtype=np.int32
        )
        if partial is None:
            bias = bias.astype(np.int32) - excess[:, 0]
        arrays = [packed, packing.pack_columns(bias, self.n, "int32")]
        arrays.append(packing.pack_multiplier(multiplier, self.n, self.out))
        if self.zero_point == "scalar":
            arrays.append(np.asarray(zero_point, np.int32).reshape(1))
        elif self.zero_point == "vector":
            arrays.append(packing.pack_columns(zero_point, self.n, "int32"))
        if partial is not None:
            group_bias = partial.bias.astype(np.int32) - excess.T
            per_group = [(partial.multiplier, "float32"), (group_bias, "int32")]
            arrays += [np.stack([packing.pack_columns(row, self.n, t) for row in v]) for v, t in per_group]
            if partial.row_multiplier is not None:
                arrays.append(self._rows(partial.row_multiplier, np.float32))
            if partial.row_zero_point is not None and partial.colsum is not None:
                arrays.append(self._rows(partial.row_zero_point, np.int32))
                arrays.append(
                    np.stack([packing.pack_columns(row, self.n, "int32") for row in partial.colsum])
                )
        return arrays

    def _rows(self, values: Array, dtype: type) -> Array:
        """Per token constants, repeated for every image of the batch."""
        return np.tile(np.asarray(values, dtype), self.m // len(values))

    def kernel(self) -> Kernel:
        """Generates the function."""
        arguments = self.arguments()

        def emit() -> None:
            buffers = {a.name: tir.argument(a.name, a.shape, a.dtype) for a in arguments}
            _Emitter(self, buffers).emit()

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments, self.m * self.n * self.k)


MAX_SIDE_LOOKUPS = 32
"""Lookups per iteration of the innermost loop that cost less there than by themselves."""


class DelayedLookup:
    """Table lookups of one register tile, spread over the product of the next tile of the same panel.

    A lookup is two scalar loads and a store. Done in the epilogue, they take as long as a fifth of a product
    of depth 384; in the product's loop, which waits for the multipliers, they are free.
    """

    def __init__(self, emitter: _Emitter, column: Expr, columns: int) -> None:
        self.emitter, self.column, self.columns = emitter, column, columns
        self.tile: Expr = 0
        steps = emitter.isa.side_steps(columns, emitter.spec.depth)
        self.per_step = tir.ceildiv(emitter.rows.large * columns, steps)
        self.size = packing.padded(steps * self.per_step, GROUP)
        self.indices = tir.scratch(self.size, "uint16")
        self.entries = tir.scratch(self.size, emitter.spec.out_dtype)
        with TB.serial(
            0, self.size // GROUP
        ) as i:  # the first product and rows that a small tile lacks look up these
            tir.store(self.indices, tir.constant(0, "uint16"), i * GROUP)

    def step(self, iteration: Expr) -> None:
        """The lookups of one iteration of the product."""
        for i in range(self.per_step):
            self._look_up(iteration * self.per_step + i)

    def _look_up(self, at: Expr) -> None:
        index = tir.cast(tir.load(self.indices, at, 1), "int32", 1)
        tir.store(self.entries, tir.load(self.emitter.b["table"], index, 1), at, 1)

    def write_previous(self) -> None:
        """Stores the entries of the tile before the current one, if that was of this panel and block."""
        first = self.emitter.blocks.large
        with tir.when(self.tile % first != 0):
            self._write(self.tile - 1)

    def finish(self, end: Expr) -> None:
        """Lookups of the last tile, before tile `end`."""
        with TB.serial(0, self.emitter.rows.large * self.columns) as i:
            self._look_up(i)
        self._write(end - 1)

    def _write(self, tile: Expr) -> None:
        rows = self.emitter.rows
        small = tir.let(tir.maximum(tile - rows.number_large, 0))
        row = tir.let(tile * rows.large - small)
        height = tir.let(rows.large - tir.minimum(tir.maximum(tile - (rows.number_large - 1), 0), 1))
        with TB.serial(0, height) as r:
            for c in range(0, self.columns, GROUP):
                value = tir.let(tir.load(self.entries, r * self.columns + c))
                self.emitter._write(value, row + r, self.column + c, c + GROUP == self.columns)


class _Emitter:
    """The body of the kernel.

    Tasks are (block of rows) x (panel of columns), run in parallel: a panel of weights stays in the first or
    second level cache while the rows of the block pass by.
    """

    def __init__(self, spec: Linear, buffers: dict[str, Expr]) -> None:
        self.spec, self.b, self.isa = spec, buffers, spec.target
        self.rows = Split.of(spec.m, spec.tiles.rows)
        self.panels = Split.of(packing.padded(spec.n, GROUP) // GROUP, spec.tiles.columns // GROUP)
        self.blocks = Split.of(self.rows.count, max(1, spec.tiles.block_rows // spec.tiles.rows))
        self.groups = max(spec.groups, 1)
        self.left: Expr = buffers["x"]

    def emit(self) -> None:
        if self.spec.staged:
            self._stage()
        with TB.parallel(0, self.panels.count * self.blocks.count) as task:
            panel = tir.let(task // self.blocks.count)
            block = tir.let(task % self.blocks.count)
            self._split(
                self.panels, panel, lambda first, size: self._panel(block, first * GROUP, size * GROUP)
            )

    def _split(self, split: Split, index: Expr, body) -> None:  # type: ignore[no-untyped-def]
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
        lookup = DelayedLookup(self, column, columns) if self.delays_lookup else None
        with TB.serial(0, large) as i:
            tile = tir.let(block * large + i)
            with tir.when(tile < self.rows.count):
                if lookup is not None:
                    lookup.tile = tile
                self._split(self.rows, tile, lambda row, rows: self._tile(row, column, rows, columns, lookup))
        if lookup is not None:
            lookup.finish(tir.let(tir.minimum(block * large + large, self.rows.count)))

    @property
    def delays_lookup(self) -> bool:
        """Whether table lookups of a tile are done inside the product of the next one."""
        spec = self.spec
        elements = self.rows.large * spec.tiles.columns
        per_step = tir.ceildiv(elements, self.isa.side_steps(spec.tiles.columns, spec.depth))
        return bool(spec.lookup) and self.isa.has_side and not spec.groups and per_step <= MAX_SIDE_LOOKUPS

    def _tile(self, row: Expr, column: Expr, rows: int, columns: int, lookup: DelayedLookup | None) -> None:
        sums = tir.scratch(rows * columns, "int32")
        if self.spec.groups:
            self._partial(sums, row, column, rows, columns)
        else:
            self._product(sums, row, column, rows, columns, 0, lookup.step if lookup else None)
        if lookup is not None:
            lookup.write_previous()
        self._epilogue(sums, row, column, rows, columns, lookup)

    def _product(
        self, sums: Expr, row: Expr, column: Expr, rows: int, columns: int, group: Expr, side=None
    ) -> None:  # type: ignore[no-untyped-def]
        """sums = x[rows, group] @ weight[columns, group].T"""
        spec, depth = self.spec, self.spec.depth
        base = tir.let(column * (self.groups * depth) + group * (depth * columns))

        def left(r: int, k: Expr, n: int) -> Expr:
            if spec.staged:
                return tir.load(self.left, ((row + r) * self.groups + group) * depth + k, n)
            return tir.load(self.left, [row + r, group * depth + k], n)

        def right(offset: Expr, n: int) -> Expr:
            return tir.load(self.b["weight"], base + offset, n)

        def sink(r: int, c: int, value: Expr, lanes: int) -> None:
            tir.store(sums, value, r * columns + c, lanes)

        if side is None:
            self.isa.matmul(rows, columns, depth, left, right, sink, "int8", False)
        else:
            self.isa.matmul(rows, columns, depth, left, right, sink, "int8", False, side)

    def _partial(self, sums: Expr, row: Expr, column: Expr, rows: int, columns: int) -> None:
        """sums = sum over groups of the rounded, scaled products; bias comes with the epilogue."""
        dots = tir.scratch(rows * columns, "int32")
        for i in range(0, rows * columns, GROUP):
            tir.store(sums, tir.constant(0, "int32"), i)
        with TB.serial(0, self.groups) as group:
            self._product(dots, row, column, rows, columns, group)
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
                    old = tir.load(sums, r * columns + c)
                    tir.store(sums, old + tir.rint(scaled), r * columns + c)

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
                    self._write(tir.let(value), row + r, column + c, last=c + GROUP == columns)
        if indices is not None and lookup is None:
            valid = columns if spec.n % GROUP == 0 else tir.let(tir.minimum(columns, spec.n - column))
            for r in range(rows):
                with TB.serial(0, valid) as c:
                    entry = tir.load(
                        self.b["table"], tir.cast(tir.load(indices, r * columns + c, 1), "int32", 1), 1
                    )
                    tir.store(self.b["out"], entry, [row + r, column + c], 1)

    def _zero_point(self, column: Expr) -> Expr | None:
        if self.spec.zero_point == "none":
            return None
        if self.spec.zero_point == "scalar":
            return tir.let(tir.splat(tir.load(self.b["zero_point"], 0, 1)))
        return tir.let(tir.load(self.b["zero_point"], column))

    def _write(self, value: Expr, row: Expr, column: Expr, last: bool) -> None:
        """Stores one vector, adding the residual; the last one of a panel may reach beyond column n."""
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
