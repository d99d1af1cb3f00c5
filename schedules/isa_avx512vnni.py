"""AVX-512 VNNI: vpdpbusd on 512-bit registers, 64 products of u8 and s8 and their sums in one instruction."""

from __future__ import annotations

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.isa import Isa, Tile
from tvm_vitq.schedules.tir import Expr


class Avx512Vnni(Isa):
    """The left operand is unsigned: int8 codes are staged as ``code ^ 0x80`` = code + 128.

    Flipping the bit in the inner loop instead, by an exclusive-or with a broadcast memory operand, would be
    free, but LLVM 22's instruction selection does not terminate on it.
    """

    name = "avx512vnni"
    lanes = 16
    step = 4
    unit = 4
    instruction = "vpdpbusd"
    registers = 32
    unrolls = (1, 2, 4)
    has_side = True
    has_start = True
    tile = Tile(rows=6, columns=64)
    group_tile: Tile | None = Tile(rows=3, columns=64)  # both sets of sums fit the registers
    dot_intrinsic = "llvm.x86.avx512.vpdpbusd.512"

    def left_dtype(self, source: str) -> str:
        return "uint8"

    def offset(self, source: str) -> int:
        return 128 if source == "int8" else 0

    def convert_left(self, value: Expr, source: str, lanes: int) -> Expr:
        if source == "uint8":
            return value
        flipped = value ^ tir.constant(-128, "int8", lanes)
        return tir.reinterpret(flipped, "uint8" if lanes == 1 else f"uint8x{lanes}")

    def broadcast_left(self, word: Expr, source: str) -> Expr:
        lanes = tir.splat(tir.reinterpret(word, "int32"), self.lanes)
        return tir.reinterpret(lanes, f"uint8x{4 * self.lanes}")

    def permute(self, dtype: str, tables: list[Expr], index: Expr) -> Expr:
        if len(tables) == 1:
            return tir.intrinsic("llvm.x86.avx512.permvar.hi.512", dtype, tables[0], index)
        first, second = tables
        return tir.intrinsic("llvm.x86.avx512.vpermi2var.hi.512", dtype, first, index, second)

    def dot(self, acc: Expr, left: Expr, right: Expr, source: str, full_range: bool) -> Expr:
        return tir.intrinsic(self.dot_intrinsic, f"int32x{self.lanes}", acc, left, right)


ISA = Avx512Vnni()
