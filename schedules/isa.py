"""What the kernels ask of an instruction set, and the table of those that are implemented.

A new instruction set is one new file with a subclass of `Isa` and one line in `_MODULES`.

Packed right operands (weights at build; K and V of attention in the kernel) have the same form everywhere:
panels of `columns` output columns, each ``[depth / step][columns][step]`` int8, where `step` consecutive
depths of one column lie side by side because one instruction multiplies and sums them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.requantize import SaturatingRint
from tvm_vitq.schedules.tir import Expr

Left = Callable[[int, Expr, int], Expr]
"""``left(row, k, n)``: elements k .. k+n-1 of a row of the tile, in `Isa.left_dtype`."""

Right = Callable[[Expr, int], Expr]
"""``right(offset, n)``: n int8 elements of the packed panel."""

Sink = Callable[[int, Expr, Expr, int], None]
"""``sink(row, column, value, lanes)`` receives int32 sums."""

Start = Callable[[Expr, int], Expr]
"""``start(column, lanes)``: what the sums of some columns start from, in every row."""

Side = Callable[[Expr], None]
"""``side(i)`` emits statements into iteration i of the innermost loop, out of `Isa.side_steps`."""

Permute = Callable[[str, list[Expr], Expr], Expr]
"""See `Isa.permute`."""


@dataclass(frozen=True)
class Tile:
    """Tile sizes of a matrix product: plain data, so that tuning can sample them.

    rows, columns : the register tile; columns is a multiple of 16.
    block_rows : rows that one task computes, or fewer for the sake of more tasks; None: as many as the kernel
        takes by default.
    unroll : iterations of the innermost loop that are written out.
    order : which tasks follow each other, one of `ORDERS`: those of a panel of columns, which read the same
        weights, or those of a block of rows, which read the same rows.
    """

    rows: int
    columns: int
    block_rows: int | None = None
    unroll: int = 1
    order: str = "panels"

    @property
    def name(self) -> str:
        """For names of kernels."""
        block = "" if self.block_rows is None else f"b{self.block_rows}"
        unroll = "" if self.unroll == 1 else f"u{self.unroll}"
        return f"t{self.rows}x{self.columns}{block}{unroll}" + ("" if self.order == ORDERS[0] else self.order)


ORDERS = ("panels", "rows")
"""What the outer one of the two loops over tasks runs through."""


class Isa:
    """An instruction set with a dot product of int8 operands into int32 lanes.

    Attributes
    ----------
    name : str
        Also the name in kernel reports.
    lanes : int
        int32 lanes of a register.
    step : int
        Depths that one instruction sums into one lane.
    unit : int
        Depths of one iteration of the innermost loop; packed operands are zero padded to a multiple.
    instruction : str
        Mnemonic of the dot product, as it appears in generated assembly.
    registers : int
        Vector registers.
    unrolls : tuple of int
        Values of `Tile.unroll` worth trying; other than 1 only where `matmul` takes `unroll`.
    tile : Tile
        The default register tile.
    group_tile : Tile or None
        The one of products in groups, which keep a second set of sums; None: as `tile`.
    attention_tile : Tile or None
        The one of attention, whose heads have 32 or 64 channels; None: as `tile`.
    has_side : bool
        `matmul` takes `side`: its inner loop leaves issue slots for scalar work.
    fetches_ahead : bool
        With `has_side`: the loop has slots left to ask for the weights of the next panel.
    has_start : bool
        `matmul` takes `start`: its sums are whole lanes, which need not start from 0.
    wide_left : bool
        Left operands are staged as int16, so that those of source "uint16" exist, less 2**15.
    permute : function or None
        ``permute(dtype, tables, index)``: entries of one or two tables of 32 16-bit elements each, by the low
        bits of 32 uint16 or int16 indices.
    saturating_rint : function or None
        float32 to int32 as one instruction that saturates, if there is one; outputs are then clipped as
        integers.
    """

    name: str
    lanes: int
    step: int
    unit: int
    instruction: str
    registers: int = 16
    unrolls: tuple[int, ...] = (1,)
    tile: Tile
    group_tile: Tile | None = None
    attention_tile: Tile | None = None
    has_side: bool = False
    fetches_ahead: bool = True
    has_start: bool = False
    wide_left: bool = False
    permute: Permute | None = None
    saturating_rint: SaturatingRint | None = None

    def left_dtype(self, source: str) -> str:
        """The type in which left operands of type `source` are read; another one means staging."""
        return source

    def offset(self, source: str) -> int:
        """What the instruction adds to every left element: a product is too large by offset * colsum."""
        return 0

    def convert_left(self, value: Expr, source: str, lanes: int) -> Expr:
        """A vector of `source` elements in `left_dtype`, as `matmul` reads it."""
        return value

    def dot(self, acc: Expr, left: Expr, right: Expr, source: str, full_range: bool) -> Expr:
        """``acc[j] + sum_i left[i] * right[j, i]`` over `step` depths."""
        raise NotImplementedError

    def broadcast_left(self, word: Expr, source: str) -> Expr:
        """`step` consecutive left elements repeated in all lanes."""
        raise NotImplementedError

    def load_right(self, right: Right, offset: Expr) -> Expr:
        """One vector of `lanes * step` packed elements as the instruction takes them."""
        return right(offset, self.lanes * self.step)

    def side_steps(self, columns: int, depth: int) -> int:
        """Iterations of the innermost loop in one `matmul`."""
        return depth // self.unit

    def register_tiles(self) -> list[tuple[int, int]]:
        """(rows, columns) of tiles worth trying: the sums, one row of right operands and a left one fit the
        registers, and are not too few to keep the multipliers busy.
        """
        tiles = []
        for columns in range(16, 8 * self.lanes + 1, 16):
            vectors = columns // self.lanes
            for rows in range(1, self.registers):
                used = (rows + 1) * vectors + 1
                if self.registers // 2 <= used <= self.registers:
                    tiles.append((rows, columns))
        return tiles

    def matmul(
        self, rows: int, columns: int, depth: int, left: Left, right: Right, sink: Sink, source: str,
        full_range: bool, side: Side | None = None, unroll: int = 1, start: Start | None = None,
    ) -> None:  # fmt: skip
        """Emits the register tile ``rows x columns`` of a product over `depth` (a multiple of `unit`).

        full_range : right elements may be -128 (attention); weights never are.
        unroll : see `Tile`.
        """
        vectors = columns // self.lanes
        acc = [[tir.scratch(self.lanes, "int32") for _ in range(vectors)] for _ in range(rows)]
        for v in range(vectors):
            value = tir.constant(0, "int32", self.lanes)
            if start is not None:
                value = tir.let(start(v * self.lanes, self.lanes))
            for line in acc:
                tir.store(line[v], value, 0, self.lanes)
        with tir.loop(depth // self.unit, unroll) as block:
            for k in range(0, self.unit, self.step):
                base = block * (self.unit * columns) + k * columns
                loaded = [
                    tir.let(self.load_right(right, base + v * self.lanes * self.step)) for v in range(vectors)
                ]
                for r in range(rows):
                    word = tir.let(self.broadcast_left(left(r, block * self.unit + k, self.step), source))
                    for v in range(vectors):
                        old = tir.load(acc[r][v], 0, self.lanes)
                        tir.store(
                            acc[r][v], self.dot(old, word, loaded[v], source, full_range), 0, self.lanes
                        )
            if side is not None:
                side(block)
        for r in range(rows):
            for v in range(vectors):
                sink(r, v * self.lanes, tir.load(acc[r][v], 0, self.lanes), self.lanes)


_MODULES = {
    "avx512vnni": "isa_avx512vnni",
    "avxvnni": "isa_avxvnni",
    "avx2": "isa_avx2",
    "x86_64": "isa_x86_64",
    "neon": "isa_neon",
    "dotprod": "isa_dotprod",
    "i8mm": "isa_i8mm",
}


def isa(name: str) -> Isa:
    """The instruction set called `name`; raises VitqError for an unknown one."""
    if name not in _MODULES:
        raise VitqError(
            "unknown instruction set",
            got=name,
            expected=", ".join(_MODULES),
            fix=nearest(name, _MODULES) or None,
        )
    return importlib.import_module(f"tvm_vitq.schedules.{_MODULES[name]}").ISA


def isa_names() -> tuple[str, ...]:
    """All instruction sets, the fastest of each architecture first."""
    return tuple(_MODULES)
