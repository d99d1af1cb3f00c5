"""ARMv8.6 matrix products: smmla, [2, 8] times [2, 8] transposed, 32 int8 products into four int32 lanes."""

from __future__ import annotations

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.aarch64 import Aarch64
from tvm_vitq.schedules.isa import Left, Right, Side, Sink, Tile
from tvm_vitq.schedules.tir import TB

_INTRINSIC = {
    "int8": "llvm.aarch64.neon.smmla.v4i32.v16i8",
    "uint8": "llvm.aarch64.neon.usmmla.v4i32.v16i8",
}


class I8mm(Aarch64):
    """Rows are taken in pairs; of an odd number the last one is paired with itself.

    uint8 left operands have an instruction of their own (usmmla), so nothing is ever converted.
    """

    name = "i8mm"
    step = 8
    unit = 8
    instruction = "smmla"
    has_side = True
    tile = Tile(rows=4, columns=48)
    block = 24
    """Most columns computed together: with two pairs of rows 24 sums. Joining two rows of x in one register
    keeps a unit busy that could do an smmla, so blocks are wide and low."""

    def side_steps(self, columns: int, depth: int) -> int:
        return columns // self._width(columns) * (depth // self.unit)

    def _width(self, columns: int) -> int:
        return max(w for w in range(4, self.block + 1, 4) if columns % w == 0)

    def matmul(
        self, rows: int, columns: int, depth: int, left: Left, right: Right, sink: Sink, source: str,
        full_range: bool, side: Side | None = None,
    ) -> None:  # fmt: skip
        pairs = tir.ceildiv(rows, 2)
        width = self._width(columns)
        vectors = width // 2
        with TB.serial(0, columns // width) as i:
            acc = [[self.accumulator() for _ in range(vectors)] for _ in range(pairs)]
            with TB.serial(0, depth // self.unit) as block:
                x = [left(r, block * self.unit, 8) for r in range(rows)]
                x = [
                    tir.let(tir.pick([x[2 * p], x[min(2 * p + 1, rows - 1)]], range(16)))
                    for p in range(pairs)
                ]
                for v in range(vectors):
                    w = tir.let(right(block * (self.unit * columns) + i * (width * 8) + v * 16, 16))
                    for p in range(pairs):
                        old = tir.load(acc[p][v], 0, 4)
                        tir.store(acc[p][v], tir.intrinsic(_INTRINSIC[source], "int32x4", old, x[p], w), 0, 4)
                if side is not None:
                    side(i * (depth // self.unit) + block)
            for r in range(rows):
                for v in range(0, vectors, 2):
                    both = [tir.load(acc[r // 2][v + j], 0, 4) for j in (0, 1)]
                    sink(r, i * width + 2 * v, tir.pick(both, (2, 3, 6, 7) if r % 2 else (0, 1, 4, 5)), 4)


ISA = I8mm()
