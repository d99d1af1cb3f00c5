"""ARMv8.2 dot products: sdot, four int8 products and their sum in each of four int32 lanes."""

from __future__ import annotations

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.aarch64 import SignedLeft
from tvm_vitq.schedules.isa import Left, Right, Side, Sink, Tile
from tvm_vitq.schedules.tir import TB

_SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"


class Dotprod(SignedLeft):
    """Four depths of a row are taken straight out of a register of 16, by element: nothing is broadcast."""

    name = "dotprod"
    step = 4
    unit = 16
    instruction = "sdot"
    has_side = True
    tile = Tile(rows=7, columns=48)
    attention_tile = Tile(rows=5, columns=64)

    def block(self, rows: int) -> int:
        """12 for 7 rows: 21 sums, 7 registers of x, and 4 for the weights passing by. 6 rows by 16 columns
        would need all 32 registers, and scheduling for some cores (Neoverse N1) then spills.
        """
        return 4 * max(21 // rows, 1)

    def matmul(
        self, rows: int, columns: int, depth: int, left: Left, right: Right, sink: Sink, source: str,
        full_range: bool, side: Side | None = None,
    ) -> None:  # fmt: skip
        width = self.width(rows, columns, side)
        vectors = width // self.lanes
        with TB.serial(0, columns // width) as i:
            acc = [[self.accumulator() for _ in range(vectors)] for _ in range(rows)]
            first, size = i * (width * self.step), self.unit * columns
            with self.loop(depth // self.unit, first, size) as (block, offset):
                words = [
                    tir.let(tir.reinterpret(left(r, block * self.unit, 16), "int32x4")) for r in range(rows)
                ]
                for k in range(0, self.unit, self.step):
                    for v in range(vectors):
                        loaded = tir.let(right(offset + (k * columns + v * 16), 16))
                        for r in range(rows):
                            word = tir.reinterpret(tir.shuffle(words[r], [k // self.step] * 4), "int8x16")
                            total = tir.intrinsic(_SDOT, "int32x4", tir.load(acc[r][v], 0, 4), loaded, word)
                            tir.store(acc[r][v], total, 0, 4)
                if side is not None:
                    side(i * (depth // self.unit) + block)
            for r in range(rows):
                for v in range(vectors):
                    sink(r, i * width + v * self.lanes, tir.load(acc[r][v], 0, 4), 4)


ISA = Dotprod()
