"""A tile in its accumulators, and the loops over them.

Rows are micro-ops, innermost: none is near another one of the same accumulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_vitq.numerics import Array
from tvm_vitq.vta.stream.assembler import Assembler

FEWEST_ROWS = 3
"""Micro-ops of a tile, so that none meets its own accumulator again within the pipeline."""

Part = tuple[slice, slice]
"""Rows and columns of blocks in a tile."""


class OpenTile:
    """A tile in its accumulators from `acc` on: ``[rows][columns][16]`` elements.

    Rows that only fill up the last block may hold anything, but something that was operated on, or they could
    not be stored: only the first tile in such accumulators includes them.
    """

    def __init__(self, asm: Assembler, acc: int, rows: slice, columns: slice, count: int) -> None:
        self.acc, self.rows, self.columns = acc, rows, columns
        self.height, self.width = rows.stop - rows.start, columns.stop - columns.start
        self.size = asm.config.block
        held = self.height * self.size
        self.accumulators = range(acc, acc + held * self.width)
        self.useful = min(held, max(count - rows.start * self.size, 0))
        fill = self.elements(np.arange(self.useful, held))[:, None] + self.size * np.arange(self.width)
        self.operated = self.useful if asm.settled(fill.ravel()) else held

    def elements(self, row: Array) -> Array:
        """Accumulators of rows, in the first block of columns."""
        return self.acc + row // self.size * self.width * self.size + row % self.size

    def over(
        self,
        asm: Assembler,
        src: int | None = None,
        src_column: int = 0,
        src_row: int = 0,
        wgt: int = 0,
        moved: int = 0,
        part: Part | None = None,
    ) -> dict[str, Any]:
        """Loops over all accumulators, or those of a part, rows and columns of blocks. Their source is as far
        from them as `moved` says, or it is element `src` and `src_column` further for each block of columns,
        `src_row` for each row.
        """
        rows, columns = part or (slice(0, self.height), slice(0, self.width))
        step, first = self.width * self.size, rows.start * self.size
        count = min(rows.stop * self.size, self.operated) - first
        whole = count % self.size == 0  # then rows of blocks are a loop, which saves micro-ops
        row = first + np.arange(self.size if whole else max(count, FEWEST_ROWS))
        dst = self.elements(row) + self.size * columns.start
        source = dst + moved if src is None else src + src_row * row + src_column * columns.start
        inner = count // self.size if whole else 1
        begin, end = asm.uops(np.stack([dst, source, np.full_like(dst, wgt)], 1))
        return {
            "uop_begin": begin,
            "uop_end": end,
            "outer": columns.stop - columns.start,
            "dst_outer": self.size,
            "src_outer": self.size if src is None else src_column,
            "inner": inner,
            "dst_inner": step if inner > 1 else 0,
            "src_inner": (step if src is None else src_row * self.size) if inner > 1 else 0,
        }

    def fill(self, asm: Assembler) -> dict[str, Any]:
        """Loops over the rows that only fill up the last block."""
        row = self.elements(np.arange(self.useful, self.operated))
        begin, end = asm.uops(np.stack([row, row, np.zeros_like(row)], 1))
        return {
            "uop_begin": begin,
            "uop_end": end,
            "outer": self.width,
            "dst_outer": self.size,
            "src_outer": self.size,
        }
