"""What the ALU does with a product's sums: operations on a tile, and the constants that they read.

A bias is a product where it can be, one cycle for 16 channels instead of two. Shifts that differ within a
block of channels are read from accumulators; blocks that have one shift are shifted by an immediate, in half
the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.machine.config import Memory, VtaConfig
from tvm_vitq.vta.machine.isa import AluOp
from tvm_vitq.vta.stream.assembler import Buffer
from tvm_vitq.vta.stream.blocks import bias_as_products, filled
from tvm_vitq.vta.stream.epilogue import Epilogue, Rows
from tvm_vitq.vta.stream.open_tile import OpenTile, Part

LARGEST_SHIFT = 15
"""Of one instruction, to the right."""


@dataclass(frozen=True)
class Table:
    """Constants that a product loads first: `count` accumulators of a buffer, from `first` on, to `base`."""

    buffer: Buffer
    first: int
    base: int
    count: int


class Requantization:
    """Of a product of `rows` by `columns` blocks with so many left operands.

    Attributes
    ----------
    bias : inputs and weights of a bias that is a product, else None: one input and weights of each channel,
        or inputs of each row and the same weights for all channels.
    tables : to load first;  base : accumulators of the first block's constants, by name.
    accumulators : how many constants keep from tiles.

    Raises
    ------
    VitqError : shifts that are too different.
    """

    def __init__(
        self, epilogue: Epilogue, rows: int, columns: int, lefts: int, config: VtaConfig, name: str
    ) -> None:
        self.epilogue, self.size, self.name = epilogue, config.block, name
        self.blocks = rows if epilogue.by_rows else columns
        self.bias: tuple[Buffer, Buffer] | None = None
        self.tables: list[Table] = []
        self.base: dict[str, int] = {}
        self._count = self.blocks * self._each
        self._top = config.depth(Memory.ACC)
        if isinstance(epilogue.bias, Rows):
            self._add_table("bias", epilogue.bias.buffer, slice(0, self._count), epilogue.bias.first)
        elif epilogue.bias is not None:
            self._prepare_bias(epilogue.bias, lefts)
        least, most = int(epilogue.shift.min()), int(epilogue.shift.max())
        # One register shift where it reaches; else a common part in front of it.
        self._common = 0 if least < most <= LARGEST_SHIFT else least
        if most - self._common > LARGEST_SHIFT:
            raise VitqError("VTA cannot shift by so different amounts", where=name, got=f"{least} to {most}")
        mixed = [block for block in range(self.blocks) if len(self._shifts(block, block + 1)) > 1]
        if mixed:
            needed = slice(mixed[0] * self._each, (mixed[-1] + 1) * self._each)
            self._add_table("shift", self._spread("shift", epilogue.shift - self._common), needed)
        self.accumulators = config.depth(Memory.ACC) - self._top

    @property
    def _each(self) -> int:
        """Constants of a block: accumulators of 16 channels or, of rows, of one value."""
        return self.size if self.epilogue.by_rows else 1

    def _prepare_bias(self, bias: Array, lefts: int) -> None:
        allowed = lefts == 1 and self.epilogue.bias_is_product
        products = bias_as_products(bias, self.size) if allowed else None
        if products is None:
            self._add_table("bias", self._spread("bias", bias), slice(0, self._count))
            return
        inputs, weights = products
        if self.epilogue.by_rows:
            inputs, weights = weights, np.tile(inputs, (self.size, 1))
        named = (("inputs", inputs), ("weights", weights))
        first, second = (
            Buffer(f"{self.name} bias {which}", data.size, data.view(np.uint8).ravel())
            for which, data in named
        )
        self.bias = first, second

    def _spread(self, which: str, values: Array) -> Buffer:
        """int32 values of channels or rows as accumulators."""
        lanes = self.size if self.epilogue.by_rows else 1
        full = np.repeat(filled(values, self.blocks * self.size), lanes)
        data = full.astype("<i4").view(np.uint8)
        return Buffer(f"{self.name} {which}", len(data), data)

    def _add_table(self, which: str, buffer: Buffer, needed: slice, first: int = 0) -> None:
        self._top -= self._count
        self.base[which] = self._top
        count = needed.stop - needed.start
        self.tables.append(Table(buffer, first + needed.start, self._top + needed.start, count))

    def left(self, tile: OpenTile, bits: int = 0) -> Iterator[tuple[int, Part]]:
        """Shifts to the left in front of what is added, or the rest of `bits`, and where."""
        assert self.epilogue.left is not None
        shifts = np.abs(bits - self.epilogue.left[:: self.size][tile.columns])
        ends = [0, *(np.flatnonzero(np.diff(shifts)) + 1), len(shifts)]
        for start, stop in itertools.pairwise(map(int, ends)):
            if shifts[start]:
                yield int(shifts[start]), (slice(0, tile.height), slice(start, stop))

    def operations(self, tile: OpenTile) -> Iterator[tuple[AluOp, int | str, Part]]:
        """ALU operations with an immediate or the constants of that name, and where."""
        whole = (slice(0, tile.height), slice(0, tile.width))
        if "bias" in self.base:
            yield AluOp.ADD, "bias", whole
        for part, shifts in self._shifted(tile):
            rest = self._common if len(shifts) > 1 else int(shifts[0])
            while rest > 0:
                yield AluOp.SHR, min(rest, LARGEST_SHIFT), part
                rest -= LARGEST_SHIFT
            if len(shifts) > 1:
                yield AluOp.SHR, "shift", part
        for op, limit in ((AluOp.MAX, self.epilogue.low), (AluOp.MIN, self.epilogue.high)):
            if limit is not None:
                yield op, limit, whole

    def _shifted(self, tile: OpenTile) -> Iterator[tuple[Part, Array]]:
        """Parts of a tile with their shifts."""
        by_rows = self.epilogue.by_rows
        chosen, other = (tile.rows, tile.width) if by_rows else (tile.columns, tile.height)
        cuts = [chosen.start]
        for block in range(chosen.start + 1, chosen.stop):
            before, here = self._shifts(block - 1, block), self._shifts(block, block + 1)
            if not np.array_equal(before, here) and min(len(before), len(here)) == 1:
                cuts.append(block)
        for start, stop in itertools.pairwise([*cuts, chosen.stop]):
            along, across = slice(start - chosen.start, stop - chosen.start), slice(0, other)
            yield (along, across) if by_rows else (across, along), self._shifts(start, stop)

    def _shifts(self, start: int, stop: int) -> Array:
        """The different shifts of some blocks of channels or rows."""
        return np.unique(self.epilogue.shift[start * self.size : stop * self.size])

    def cycles(self) -> float:
        """Of the ALU, for each accumulator."""
        found = [self._shifts(block, block + 1) for block in range(self.blocks)]
        common = -(-self._common // LARGEST_SHIFT)
        each = [common + 2 if len(s) > 1 else -(-int(s[0]) // LARGEST_SHIFT) for s in found if len(s)]
        limits = (self.epilogue.low is not None) + (self.epilogue.high is not None)
        left = self.epilogue.left
        shifted = 0.0 if left is None else 1 + float(np.mean(left > 0))
        return 2 * ("bias" in self.base) + float(np.mean(each)) + limits + shifted
