"""AVX2: vpmaddwd on int16 operands. Exact, unlike vpmaddubsw, whose int16 sums saturate."""

from __future__ import annotations

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.isa import Isa, Right, Tile
from tvm_vitq.schedules.tir import Expr


class Avx2(Isa):
    """Left operands are staged as int16; packed int8 right operands are widened on the way from memory."""

    name = "avx2"
    lanes = 8
    step = 2
    unit = 2
    instruction = "vpmaddwd"
    unrolls = (1, 2, 4)
    wide_left = True
    has_start = True
    tile = Tile(rows=4, columns=16)
    madd = "llvm.x86.avx2.pmadd.wd"

    def left_dtype(self, source: str) -> str:
        return "int16"

    def offset(self, source: str) -> int:
        return -(2**15) if source == "uint16" else 0

    def convert_left(self, value: Expr, source: str, lanes: int) -> Expr:
        if source == "uint16":
            return tir.reinterpret(value + tir.constant(2**15, "uint16", lanes), f"int16x{lanes}")
        return tir.cast(value, "int16", lanes)

    def broadcast_left(self, word: Expr, source: str) -> Expr:
        return tir.reinterpret(
            tir.splat(tir.reinterpret(word, "int32"), self.lanes), f"int16x{2 * self.lanes}"
        )

    def load_right(self, right: Right, offset: Expr) -> Expr:
        return tir.cast(right(offset, 2 * self.lanes), "int16", 2 * self.lanes)

    def dot(self, acc: Expr, left: Expr, right: Expr, source: str, full_range: bool) -> Expr:
        return acc + tir.intrinsic(self.madd, f"int32x{self.lanes}", left, right)


ISA = Avx2()
