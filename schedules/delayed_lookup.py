"""Table lookups of the linear kernel that hide behind the next product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.tir import TB, Expr

if TYPE_CHECKING:
    from tvm_vitq.schedules.linear_body import LinearBody

MAX_SIDE_LOOKUPS = 32
"""Lookups per iteration of the innermost loop that cost less there than by themselves."""


class DelayedLookup:
    """Table lookups of one register tile, spread over the product of the next tile of the same panel.

    A lookup is two scalar loads and a store. Done in the epilogue, they take as long as a fifth of a product
    of depth 384; in the product's loop, which waits for the multipliers, they are free.
    """

    def __init__(self, body: LinearBody, column: Expr, columns: int) -> None:
        self.body, self.column, self.columns = body, column, columns
        self.tile: Expr = 0
        steps = body.isa.side_steps(columns, body.spec.whole_depth)
        self.per_step = tir.ceildiv(body.rows.large * columns, steps)
        most = body.isa.side_steps(columns, body.spec.most_depth)
        self.size = packing.padded(most * self.per_step, GROUP)
        self.indices = tir.scratch(self.size, "uint16")
        self.entries = tir.scratch(self.size, body.spec.lookup)
        # What the first product looks up, and rows that a small tile lacks.
        with TB.serial(0, self.size // GROUP) as i:
            tir.store(self.indices, tir.constant(0, "uint16"), i * GROUP)

    def step(self, iteration: Expr) -> None:
        """The lookups of one iteration of the product."""
        for i in range(self.per_step):
            self._look_up(iteration * self.per_step + i)

    def _look_up(self, at: Expr) -> None:
        index = tir.cast(tir.load(self.indices, at, 1), "int32", 1)
        tir.store(self.entries, tir.load(self.body.b["table"], index, 1), at, 1)

    def write_previous(self) -> None:
        """Stores the entries of the tile before the current one, if that was of this panel and block."""
        first = self.body.blocks.large
        with tir.when(self.tile % first != 0):
            self._write(self.tile - 1)

    def finish(self, end: Expr) -> None:
        """Lookups of the last tile, before tile `end`."""
        with TB.serial(0, self.body.rows.large * self.columns) as i:
            self._look_up(i)
        self._write(end - 1)

    def _write(self, tile: Expr) -> None:
        rows = self.body.rows
        small = tir.let(tir.maximum(tile - rows.number_large, 0))
        row = tir.let(tile * rows.large - small)
        height = tir.let(rows.large - tir.minimum(tir.maximum(tile - (rows.number_large - 1), 0), 1))
        with TB.serial(0, height) as r:
            for c in range(0, self.columns, GROUP):
                entries = tir.load(self.entries, r * self.columns + c)
                value = tir.let(self.body.converted(entries, self.column + c))
                self.body.write(value, row + r, self.column + c, c + GROUP == self.columns)
