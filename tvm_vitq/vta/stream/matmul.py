"""A matrix product on VTA: tiles, two contexts, requantization on the ALU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.config import Memory
from tvm_vitq.vta.machine.isa import Alu, AluOp, Gemm
from tvm_vitq.vta.stream.assembler import Assembler, Buffer
from tvm_vitq.vta.stream.blocks import Matrix
from tvm_vitq.vta.stream.choice import Choose, Schedule
from tvm_vitq.vta.stream.contexts import Contexts
from tvm_vitq.vta.stream.digits import LOW_BITS, digit_weights
from tvm_vitq.vta.stream.epilogue import Epilogue
from tvm_vitq.vta.stream.open_tile import FEWEST_ROWS, OpenTile, Part
from tvm_vitq.vta.stream.requantization import Requantization
from tvm_vitq.vta.stream.tiles import Size, Tile, choose_tile, estimate, fits, tiles


class Product:
    """Emits ``out = epilogue(sum of 256**n lefts[-1 - n] @ right.T)``.

    Parameters
    ----------
    assembler : where to.
    lefts : [rows, depth] blocks each, the bytes of wider operands, the highest first.
    right : [columns, depth] blocks;  outs : a matrix for each plane.
    tile : what is in the scratchpads at a time; None: the one that `choose` gives, else that with the best
        estimate.
    rows : rows of `left` that mean something; those behind them in their block become what zeros would.
    name : for messages.
    contexts : where tiles may be; None: in all of the scratchpads.
    added : with ``epilogue.left``, [rows, columns] blocks of each digit of what is added (`digits`).

    Raises
    ------
    VitqError : a tile that does not fit, or none that does.
    """

    def __init__(
        self,
        assembler: Assembler,
        lefts: Sequence[Matrix],
        right: Matrix,
        outs: Sequence[Matrix],
        epilogue: Epilogue,
        tile: Tile | None,
        rows: int,
        name: str,
        contexts: Contexts | None = None,
        choose: Choose | None = None,
        added: Sequence[Matrix] = (),
    ) -> None:
        self.asm, self.config = assembler, assembler.config
        self.added = added
        self.lefts, self.right, self.outs, self.epilogue = lefts, right, outs, epilogue
        self.left, self.rows = lefts[0], rows
        self.size = self.config.block
        self.name = name
        self._alu = Requantization(epilogue, self.left.rows, right.rows, len(lefts), self.config, name)
        used = self._alu.accumulators
        self.sizes = self._sizes(used)
        schedule = choose(self) if choose else None
        if tile is None and schedule is not None:
            tile = Tile(**schedule)
        self.tile = tile or choose_tile(self.sizes, self.config, name, contexts)
        self._contexts = contexts or Contexts(
            self.config, self.tile.contexts, used, weights=self.sizes.weights
        )
        if not fits(self.tile, self._contexts, self.config, self.sizes) or used > self._contexts.constants:
            raise VitqError("VTA tile does not fit", where=name, got=self.tile, expected=self.config.text)
        self._inputs: tuple[Matrix, slice, slice, int] | None = None
        self._weights: tuple[slice, slice, int] | None = None
        """What was loaded last, by rows and columns of blocks, and where it is."""
        bus = self.config.board.bus_bits // 8
        loaded = self.tile.columns * self.tile.depth * self.config.element_bytes(Memory.WGT) // bus
        self._begin = max(assembler.written(matrix.buffer) for matrix in (*lefts, right)) + loaded
        """When operands can be there, where this launch makes them."""

    def _sizes(self, constants: int) -> Size:
        sizes = (self.left.rows, self.right.rows, self.left.columns)
        cycles = 1 + bool(self._alu.bias) + self._alu.cycles()
        row_bias = self.epilogue.by_rows and bool(self._alu.bias)
        return Size(*sizes, cycles, len(self.lefts), len(self.outs), constants, len(self.added), row_bias)

    @property
    def signature(self) -> str:
        """What products have in common for which the same tile is the best."""
        size = self.sizes
        return (
            f"{size.rows}x{size.columns}x{size.depth}_rows{self.rows}_alu{size.operations:.0f}"
            f"_passes{size.passes}_planes{size.planes}_constants{size.constants}"
            f"{f'_digits{size.digits}' if size.digits else ''}"
        )

    @property
    def schedule(self) -> Schedule:
        """Its tile."""
        return asdict(self.tile)

    def cycles(self, schedule: Schedule) -> int:
        """Of the product alone under another tile, by the cycle model."""
        asm, tile = Assembler(self.config), Tile(**schedule)
        operands = (self.lefts, self.right, self.outs, self.epilogue)
        Product(asm, *operands, tile, self.rows, self.name, added=self.added).emit()
        return asm.finish().cycles(self.config)

    def accepts(self, schedule: Schedule) -> bool:
        """Whether there is such a tile."""
        return any(schedule == asdict(tile) for tile in tiles(self.sizes, self.config))

    def options(self, best: Schedule) -> Iterator[Schedule]:
        """All tiles."""
        found = tiles(self.sizes, self.config)
        return map(asdict, sorted(found, key=lambda tile: estimate(self.sizes, tile, self.config)))

    @property
    def tile_count(self) -> int:
        """Tiles of the result."""
        return len(list(self._order()))

    @property
    def waits(self) -> bool:
        """Whether the next tile would wait for operands or for its accumulators' stores."""
        context = self._contexts.next(Memory.ACC, turn=False)
        return max(self._begin, self.asm.stored(context)) > self.asm.now

    def emit(self) -> None:
        """The whole product."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """The product, tile by tile, in them parts of the sum; a pause behind the first loads, and behind
        each tile and the first loads of the next one.
        """
        for table in self._alu.tables:
            self.asm.settle(range(table.base, table.base + table.count))
            self.asm.load(Memory.ACC, table.base, table.buffer, table.first, 1, table.count, table.count)
        if self._alu.bias and self.epilogue.by_rows:
            self.asm.load(Memory.WGT, self._staying, self._alu.bias[1], 0, 1, 1, 1)
        elif self._alu.bias:
            self.asm.load(Memory.INP, self.config.depth(Memory.INP) - 1, self._alu.bias[0], 0, 1, 1, 1)
        if self.added:
            weights = digit_weights(self.size)
            contents = Buffer(f"{self.name} digits", weights.size, weights.view(np.uint8).ravel())
            self.asm.load(Memory.WGT, self._staying, contents, 0, 1, len(weights), len(weights))
        order = list(self._order())
        self._begin_loading(*order[0])
        yield
        for (rows, columns), following in itertools.zip_longest(order, order[1:]):
            tile = self._open(rows, columns)
            self.asm.loop(Gemm(reset=True, **tile.over(self.asm, src=self._unread)))
            self._add(tile, 3, 2)
            for number, left in enumerate(self.lefts):
                if number:
                    self.asm.loop(Alu(op=AluOp.SHR, immediate=-8, **tile.over(self.asm)))
                for depth in _cut(left.columns, self.tile.depth):
                    self.asm.advance()
                    self._multiply(tile, self._load_left(left, rows, depth), depth)
            self._add(tile, 1, 0)
            self._finish(tile)
            stores = self._store(tile)
            next(stores)
            self.asm.defer(tile.accumulators, stores)
            if following:
                self._begin_loading(*following)
            yield

    def _begin_loading(self, rows: slice, columns: slice) -> None:
        """What a tile needs first."""
        depth = next(_cut(self.left.columns, self.tile.depth))
        first = (self.added[-1], rows, columns) if self.added else (self.lefts[0], rows, depth)
        self._load_left(*first)
        self._load_right(columns, depth)

    @property
    def _unread(self) -> int | None:
        """The source of resets, which do not read it: the accumulators, whose loops are known then, or the
        first input where there are fewer inputs.
        """
        return None if self.config.depth(Memory.INP) >= self.config.depth(Memory.ACC) else 0

    @property
    def _staying(self) -> int:
        """Where weights are that stay."""
        return self.config.depth(Memory.WGT) - self.sizes.weights

    def _add(self, tile: OpenTile, *numbers: int) -> None:
        """Two digits, the higher ones in front of all products, which are then shifted as those want it."""
        if not self.added:
            return
        if numbers[0] < 2:
            self._shift_left(tile, 0)
        for number in numbers:
            self.asm.advance()
            inp = self._load_left(self.added[number], tile.rows, tile.columns)
            loops = tile.over(self.asm, moved=inp - tile.acc, wgt=self._staying + number % 2)
            self.asm.loop(Gemm(**loops))
        if numbers[0] > 1:
            self._shift_left(tile, LOW_BITS)

    def _shift_left(self, tile: OpenTile, bits: int) -> None:
        for shift, part in self._alu.left(tile, bits):
            self.asm.loop(Alu(op=AluOp.SHR, immediate=-shift, **tile.over(self.asm, part=part)))

    def _order(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each tile."""
        rows, columns = (
            list(_cut(count, step))
            for count, step in ((self.left.rows, self.tile.rows), (self.right.rows, self.tile.columns))
        )
        if self.tile.rows_last:
            return ((row, column) for column in columns for row in rows)
        return itertools.product(rows, columns)

    def _open(self, rows: slice, columns: slice) -> OpenTile:
        """A tile in the context whose turn it is, once everything in it is stored."""
        context = self._contexts.next(Memory.ACC)
        self.asm.settle(context)
        return OpenTile(self.asm, context.start, rows, columns, self.rows)

    def _load_left(self, left: Matrix, rows: slice, depth: slice) -> int:
        """Where inputs are; those that the tile before has used are still there."""
        if self._inputs is None or self._inputs[:3] != (left, rows, depth):
            base, width = self._contexts.next(Memory.INP).start, depth.stop - depth.start
            first = left.block(rows.start, depth.start) * self.size
            height, stride = rows.stop - rows.start, left.stride * self.size
            self.asm.load(Memory.INP, base, left.buffer, first, height, width * self.size, stride)
            if self._alu.bias and self.epilogue.by_rows and not depth.start:
                count = height * self.size
                behind = base + self.tile.rows * self.tile.depth * self.size
                self.asm.load(Memory.INP, behind, self._alu.bias[0], rows.start * self.size, 1, count, count)
            self._inputs = (left, rows, depth, base)
        return self._inputs[3]

    def _add_bias(self, tile: OpenTile, inputs: int | None, wgt: int) -> None:
        """The bias as one more product: of inputs of each row, or of one that is the same in all rows."""
        if inputs is None:
            last = self.config.depth(Memory.INP) - 1
            self.asm.loop(Gemm(wgt_outer=1, **tile.over(self.asm, src=last, wgt=wgt)))
        else:
            self.asm.loop(Gemm(**tile.over(self.asm, src=inputs, src_row=1, wgt=wgt)))

    def _multiply(self, tile: OpenTile, inp: int, depth: slice) -> None:
        deep = depth.stop - depth.start
        wgt = self._load_right(tile.columns, depth)
        if self._alu.bias and not depth.start:
            if self.epilogue.by_rows:
                self._add_bias(tile, inp + self.tile.rows * self.tile.depth * self.size, self._staying)
            else:
                self._add_bias(tile, None, wgt + self.tile.columns * self.tile.depth)
        row = np.arange(max(tile.useful, FEWEST_ROWS))
        src = inp + row // self.size * deep * self.size + row % self.size
        begin, end = self.asm.uops(np.stack([tile.elements(row), src, np.full_like(src, wgt)], 1))
        self.asm.loop(
            Gemm(
                uop_begin=begin,
                uop_end=end,
                outer=tile.width,
                dst_outer=self.size,
                wgt_outer=deep,
                inner=deep,
                src_inner=self.size,
                wgt_inner=1,
            )
        )

    def _load_right(self, columns: slice, depth: slice) -> int:
        """Where the weights of a tile are, the bias behind the first; those that the tile before has used are
        still there.
        """
        if self._weights is None or self._weights[:2] != (columns, depth):
            wgt = self._contexts.next(Memory.WGT).start
            first = self.right.block(columns.start, depth.start)
            width, deep = columns.stop - columns.start, depth.stop - depth.start
            self.asm.load(Memory.WGT, wgt, self.right.buffer, first, width, deep, self.right.stride)
            if self._alu.bias and not self.epilogue.by_rows and not depth.start:
                behind = wgt + self.tile.columns * self.tile.depth
                self.asm.load(Memory.WGT, behind, self._alu.bias[1], columns.start, 1, width, width)
            self._weights = (columns, depth, wgt)
        return self._weights[2]

    def _finish(self, tile: OpenTile) -> None:
        """Bias, shift, limits. Without any, sums of products can be stored, but not rows that have none."""
        self.asm.advance()
        operations = list(self._alu.operations(tile))
        if not operations and tile.operated > tile.useful:
            self.asm.loop(Alu(op=AluOp.SHR, immediate=0, **tile.fill(self.asm)))
        for op, operand, part in operations:
            self.asm.advance()
            if isinstance(operand, str):
                self.asm.loop(Alu(op=op, **self._with_constants(tile, self._alu.base[operand], part)))
            else:
                self.asm.loop(Alu(op=op, immediate=operand, **tile.over(self.asm, part=part)))

    def _with_constants(self, tile: OpenTile, base: int, part: Part) -> dict[str, Any]:
        if self.epilogue.by_rows:
            return tile.over(self.asm, src=base + tile.rows.start * self.size, src_row=1, part=part)
        return tile.over(self.asm, src=base + tile.columns.start, src_column=1, part=part)

    def _store(self, tile: OpenTile) -> Iterator[None]:
        """A store for each byte, with a pause behind it: the next byte overwrites what is being stored, so
        other tiles are to work in between.
        """
        height, width = tile.rows.stop - tile.rows.start, tile.width * self.size
        for plane, out in enumerate(self.outs):
            if plane:
                self.asm.loop(Alu(op=AluOp.SHR, immediate=8, **tile.over(self.asm)))
            first = out.block(tile.rows.start, tile.columns.start) * self.size
            self.asm.store(tile.acc, out.buffer, first, height, width, out.stride * self.size)
            yield


def _cut(count: int, step: int) -> Iterator[slice]:
    """Pieces of at most `step`, as equal as can be."""
    pieces = -(-count // step)
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return (slice(start, stop) for start, stop in itertools.pairwise(edges))
