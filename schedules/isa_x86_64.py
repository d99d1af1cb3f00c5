"""Baseline x86-64 (SSE2): pmaddwd on int16 operands, for any 64-bit x86 CPU."""

from __future__ import annotations

from tvm_vitq.schedules.isa import Tile
from tvm_vitq.schedules.isa_avx2 import Avx2


class X86_64(Avx2):
    """AVX2's kernel on registers of four lanes."""

    name = "x86_64"
    lanes = 4
    instruction = "pmaddwd"
    tile = Tile(rows=2, columns=16)
    madd = "llvm.x86.sse2.pmadd.wd"


ISA = X86_64()
