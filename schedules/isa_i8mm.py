"""ARMv8.6 matrix products: smmla, [2, 8] times [2, 8] transposed, 32 int8 products into four int32 lanes."""

from __future__ import annotations

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.isa import Isa, Left, Right, Sink, Tile
from tvm_vitq.schedules.tir import TB, Expr

_INTRINSIC = {
    "int8": "llvm.aarch64.neon.smmla.v4i32.v16i8",
    "uint8": "llvm.aarch64.neon.usmmla.v4i32.v16i8",
}


class I8mm(Isa):
    """Rows are taken in pairs; of an odd number the last one is paired with itself.

    uint8 left operands have an instruction of their own (usmmla), so nothing is ever converted.
    """

    name = "i8mm"
    lanes = 4
    step = 8
    unit = 16
    instruction = "smmla"
    tile = Tile(rows=6, columns=16)

    def matmul(
        self, rows: int, columns: int, depth: int, left: Left, right: Right, sink: Sink, source: str, full_range: bool
    ) -> None:
        pairs, vectors = tir.ceildiv(rows, 2), columns // 2
        acc = [[tir.scratch(4, "int32") for _ in range(vectors)] for _ in range(pairs)]
        for register in (b for line in acc for b in line):
            tir.store(register, tir.constant(0, "int32", 4), 0, 4)
        with TB.serial(0, depth // self.unit) as block:
            x = [tir.let(left(r, block * self.unit, 16)) for r in range(rows)]
            for half in (0, 1):
                for v in range(vectors):
                    w = tir.let(right(block * (self.unit * columns) + half * (8 * columns) + v * 16, 16))
                    for p in range(pairs):
                        both = _halves(x[2 * p], x[min(2 * p + 1, rows - 1)], half, 8)
                        old = tir.load(acc[p][v], 0, 4)
                        tir.store(acc[p][v], tir.intrinsic(_INTRINSIC[source], "int32x4", old, both, w), 0, 4)
        for r in range(rows):
            for v in range(0, vectors, 2):
                a, b = (tir.load(acc[r // 2][v + i], 0, 4) for i in (0, 1))
                sink(r, 2 * v, _halves(a, b, r % 2, 2), 4)


def _halves(a: Expr, b: Expr, half: int, lanes: int) -> Expr:
    """zip1 or zip2 of 64-bit lanes: the lower or upper half of a and of b; a half has `lanes` elements."""
    first = lanes * half
    indices = [*range(first, first + lanes), *range(first + 2 * lanes, first + 3 * lanes)]
    return tir.shuffle_two(a, b, indices)


ISA = I8mm()
