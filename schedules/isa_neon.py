"""Baseline ARMv8 NEON: smull and smlal2 into int16, sadalp from there into int32."""

from __future__ import annotations

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.aarch64 import SignedLeft
from tvm_vitq.schedules.isa import Left, Right, Side, Sink, Tile
from tvm_vitq.schedules.tir import TB, Expr


class Neon(SignedLeft):
    """Lanes are depths: both operands are plain loads, and each sum is added up across its lanes at the end.

    Two products fit int16, ``2 * 128 * 127 < 2**15``, unless all four factors are -128, so that 16 products
    take three instructions, or four where right operands may be -128. Widening to int16 and smlal would take
    four and, on cores with one multiplier, twice the time.
    """

    name = "neon"
    step = 16
    unit = 16
    instruction = "smlal2"
    has_side = False  # the loop needs all registers: with lookups in it LLVM spills, which costs more
    tile = Tile(rows=4, columns=16)

    def block(self, rows: int) -> int:
        """4 x 4 sums, 8 operands and 8 products in flight fill the registers."""
        return 4

    def matmul(
        self, rows: int, columns: int, depth: int, left: Left, right: Right, sink: Sink, source: str,
        full_range: bool, side: Side | None = None,
    ) -> None:  # fmt: skip
        width = self.width(rows, columns, side)
        with TB.serial(0, columns // width) as i:
            acc = [[self.accumulator() for _ in range(width)] for _ in range(rows)]
            first, size = i * (width * self.step), self.unit * columns
            with self.loop(depth // self.unit, first, size) as (block, offset):
                x = [tir.let(left(r, block * self.unit, 16)) for r in range(rows)]
                for c in range(width):
                    w = tir.let(right(offset + c * self.step, 16))
                    for r in range(rows):
                        old = tir.load(acc[r][c], 0, 4)
                        tir.store(acc[r][c], self._dot(old, x[r], w, full_range), 0, 4)
                if side is not None:
                    side(i * (depth // self.unit) + block)
            for r in range(rows):
                sums = [tir.load(acc[r][c], 0, 4) for c in range(width)]
                while len(sums) > 1:
                    sums = [_pairwise(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
                sink(r, i * width, sums[0], 4)

    def _dot(self, acc: Expr, x: Expr, w: Expr, full_range: bool) -> Expr:
        low, high = (_products(x, w, half) for half in (0, 1))
        if full_range:
            return _add_pairs(_add_pairs(acc, low), high)
        return _add_pairs(acc, low + high)


def _products(x: Expr, w: Expr, half: int) -> Expr:
    """smull or smull2: int16x8."""
    x, w = (tir.shuffle(v, list(range(8 * half, 8 * half + 8))) for v in (x, w))
    return tir.intrinsic("llvm.aarch64.neon.smull.v8i16", "int16x8", x, w)


def _add_pairs(acc: Expr, products: Expr) -> Expr:
    """sadalp."""
    return acc + tir.intrinsic("llvm.aarch64.neon.saddlp.v4i32.v8i16", "int32x4", products)


def _pairwise(a: Expr, b: Expr) -> Expr:
    """addp: sums of neighbours, those of a first."""
    return tir.intrinsic("llvm.aarch64.neon.addp.v4i32", "int32x4", a, b)


ISA = Neon()
