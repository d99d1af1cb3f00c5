"""ARMv8.6 matrix products: smmla, [2, 8] times [2, 8] transposed, 32 int8 products into four int32 lanes."""

from __future__ import annotations

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.aarch64 import Aarch64
from tvm_vitq.schedules.isa import Left, Right, Side, Sink, Tile
from tvm_vitq.schedules.tir import TB, Expr

_INTRINSIC = {
    "int8": "llvm.aarch64.neon.smmla.v4i32.v16i8",
    "uint8": "llvm.aarch64.neon.usmmla.v4i32.v16i8",
}


class I8mm(Aarch64):
    """Rows are taken in pairs; of an odd number the last one is paired with the one before it.

    uint8 left operands have an instruction of their own (usmmla), so nothing is ever converted.
    """

    name = "i8mm"
    step = 8
    unit = 8
    instruction = "smmla"
    has_side = True
    tile = Tile(rows=4, columns=48)
    attention_tile = Tile(rows=4, columns=64)

    def block(self, rows: int) -> int:
        """24 for two pairs of rows: 24 sums. Joining two rows of x in one register keeps a unit busy that
        could do an smmla, so blocks are wide and low. A pair takes three more: its rows and both joined.
        """
        pairs = tir.ceildiv(rows, 2)
        return 4 * max((30 - 3 * pairs) // (2 * pairs), 1)

    def depths(self, depth: int | Expr) -> int:
        """A whole register of each row, where that divides the depth: half as many loads."""
        return 16 if isinstance(depth, int) and depth % 16 == 0 else self.unit

    def matmul(
        self, rows: int, columns: int, depth: int, left: Left, right: Right, sink: Sink, source: str,
        full_range: bool, side: Side | None = None,
    ) -> None:  # fmt: skip
        pairs = [(r, r + 1) for r in range(0, rows - 1, 2)] + [(max(rows - 2, 0), rows - 1)] * (rows % 2)
        width = self.width(rows, columns, side)
        vectors = width // 2
        unit = self.depths(depth)
        with TB.serial(0, columns // width) as i:
            acc = [[self.accumulator() for _ in range(vectors)] for _ in pairs]
            first, size = i * (width * self.step), unit * columns
            with self.loop(depth // unit, first, size) as (block, offset):
                x = [tir.let(left(r, block * unit, unit)) for r in range(rows)]
                for k in reversed(range(0, unit, 8)):  # last, the low halves are joined in place
                    lanes = [*range(k, k + 8), *range(unit + k, unit + k + 8)]
                    joined = [tir.let(tir.pick([x[a], x[b]], lanes)) for a, b in pairs]
                    for v in range(vectors):
                        w = tir.let(right(offset + (k * columns + v * 16), 16))
                        for p in range(len(pairs)):
                            old = tir.load(acc[p][v], 0, 4)
                            total = tir.intrinsic(_INTRINSIC[source], "int32x4", old, joined[p], w)
                            tir.store(acc[p][v], total, 0, 4)
                if side is not None:
                    side(i * (depth // unit) + block)
            for r in range(rows):
                second = r == pairs[r // 2][1]
                for v in range(0, vectors, 2):
                    both = [tir.load(acc[r // 2][v + j], 0, 4) for j in (0, 1)]
                    sink(r, i * width + 2 * v, tir.pick(both, (2, 3, 6, 7) if second else (0, 1, 4, 5)), 4)


ISA = I8mm()
