"""Which tile a product gets: all that fit, and an estimate of their cycles from the formulas of `cycles`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.config import PORTABLE_UOPS, Memory, VtaConfig
from tvm_vitq.vta.machine.cycles import (
    FIRST_BURST,
    LOAD_START,
    LOOP_START,
    NEXT_BURST,
    STORE_BURST,
    STORE_START,
)
from tvm_vitq.vta.stream.contexts import Contexts

CONTEXTS = (2, 3, 4)

EVEN = 8
"""Of the norm that stands for the busiest stage: where others come close, it waits for them now and then."""


@dataclass(frozen=True)
class Tile:
    """What is in the scratchpads at a time, in blocks.

    rows, columns : of the result;  depth : of the sum.
    contexts : one of CONTEXTS, or 1 to see what overlapping is worth.
    rows_last : whether the next tile is the one below, for which weights stay, instead of the one beside,
        for which inputs do.
    """

    rows: int
    columns: int
    depth: int
    contexts: int = 2
    rows_last: bool = False


@dataclass(frozen=True)
class Size:
    """A product, in blocks.

    rows, columns : of the result;  depth : of the sum;  passes : left operands.
    operations : cycles of the ALU and of resets for each accumulator, stores' shifts left out.
    planes : bytes of the result;  constants : accumulators that hold some.
    digits : of values that are added (`digits`);  row_bias : whether a bias of rows is a product.
    """

    rows: int
    columns: int
    depth: int
    operations: float
    passes: int = 1
    planes: int = 1
    constants: int = 0
    digits: int = 0
    row_bias: bool = False

    @property
    def weights(self) -> int:
        """Those of digits or of a bias of rows, which stay."""
        return 2 if self.digits else int(self.row_bias)

    @property
    def each(self) -> float:
        """Cycles of the compute stage for each accumulator."""
        further = self.planes - 1 + self.passes - 1 + self.digits
        return self.depth * self.passes + self.operations + further


def fits(tile: Tile, contexts: Contexts, config: VtaConfig, product: Size) -> bool:
    """Whether a tile fits into each of these contexts, with its bias beside its weights or inputs, and any of
    the digits that are added; its rows are micro-ops.
    """
    size, room = config.block, contexts.room
    deep = max(tile.depth + product.row_bias, tile.columns if product.digits else 0)
    return (
        tile.contexts == contexts.count
        and tile.rows * size <= min(PORTABLE_UOPS, config.depth(Memory.UOP))
        and tile.rows * deep * size <= room[Memory.INP]
        and tile.columns * (tile.depth + 1) <= room[Memory.WGT]
        and tile.rows * tile.columns * size <= room[Memory.ACC]
    )


def tiles(size: Size, config: VtaConfig, contexts: Contexts | None = None) -> Iterator[Tile]:
    """Every tile that fits, with pieces as equal as can be: of two that cut a product into as many pieces the
    larger one is left out. Without `contexts` those that fit some in all of the scratchpads.
    """
    given = (
        [contexts]
        if contexts
        else [Contexts(config, count, size.constants, weights=size.weights) for count in CONTEXTS]
    )
    rows, columns, depths = (_pieces(count) for count in (size.rows, size.columns, size.depth))
    for row, column, depth, where, rows_last in itertools.product(
        rows, columns, depths, given, (False, True)
    ):
        tile = Tile(row, column, depth, where.count, rows_last)
        matters = row < size.rows and column < size.columns
        if (matters or not rows_last) and fits(tile, where, config, size):
            yield tile


def _pieces(count: int) -> list[int]:
    """Sizes of the largest piece when `count` is cut into 1, 2, ... equal ones."""
    return list(dict.fromkeys(-(-count // pieces) for pieces in range(1, count + 1)))


def estimate(size: Size, tile: Tile, config: VtaConfig, alone: bool = True) -> float:
    """Cycles of a product that is `alone`: of the busiest stage, and of the others before it begins and after
    it ends. Of one that shares the machine: of all stages, for any of them may be the one that others wait
    for.
    """
    block, bus = config.block, config.board.bus_bits // 8
    row_tiles, column_tiles = -(-size.rows // tile.rows), -(-size.columns // tile.columns)
    deep = -(-size.depth // tile.depth)
    parts = deep * size.passes
    count = row_tiles * column_tiles
    entries = size.rows * size.columns * block
    inp, wgt, out = (config.element_bytes(m) / bus for m in (Memory.INP, Memory.WGT, Memory.OUT))
    # Operands stay for the next tile where the loops allow it, weights also for all left operands.
    lefts = rights = count * parts
    if parts == 1:
        lefts = row_tiles if not tile.rows_last or row_tiles == 1 else count
    if deep == 1:
        rights = column_tiles if tile.rows_last or column_tiles == 1 else count
    start = LOAD_START + FIRST_BURST
    each_left = size.rows / row_tiles * size.depth / deep * block * inp + start + tile.rows * NEXT_BURST
    each_right = size.columns / column_tiles * size.depth / deep * wgt + start + tile.columns * NEXT_BURST
    load = lefts * each_left + rights * each_right
    load += size.digits * (entries * inp + count * (start + tile.rows * NEXT_BURST))
    loops = count * (parts + size.operations + size.planes - 1 + size.passes - 1 + size.digits)
    compute = entries * size.each + loops * LOOP_START
    store = size.planes * (entries * (out + 1) + count * (STORE_START + tile.rows * STORE_BURST))
    if not alone:
        return load + compute + store
    first = load / (count * parts)
    last = store / count
    # Bytes of a result take turns in one accumulator, while others work on as many tiles; where contexts are
    # too few for that, the next tile in it waits for stores.
    waits = store / size.planes * max(size.planes + 1 - tile.contexts, 0) if size.planes > 1 else 0.0
    busy = (load, compute + waits, store)
    return sum(cycles**EVEN for cycles in busy) ** (1 / EVEN) + first + last


def choose_tile(size: Size, config: VtaConfig, where: str, contexts: Contexts | None = None) -> Tile:
    """The tile with the best estimate of those that fit, see `tiles`.

    Raises
    ------
    VitqError : none fits.
    """
    alone = contexts is None or not contexts.shared
    possible = tiles(size, config, contexts)
    found = min(possible, key=lambda tile: estimate(size, tile, config, alone), default=None)
    if found is None:
        raise VitqError("no tile of the product fits VTA", where=where, got=size, expected=config.text)
    return found
