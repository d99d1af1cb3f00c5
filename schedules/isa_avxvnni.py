"""AVX-VNNI: vpdpbusd on 256-bit registers (client cores since Alder Lake; also AVX512VL with VNNI)."""

from __future__ import annotations

from tvm_vitq.schedules.isa import Tile
from tvm_vitq.schedules.isa_avx512vnni import Avx512Vnni


class AvxVnni(Avx512Vnni):
    """The 512-bit kernel on half as wide registers, of which there are 16."""

    name = "avxvnni"
    lanes = 8
    permute = None
    registers = 16
    tile = Tile(rows=6, columns=16)
    group_tile = None
    dot_intrinsic = "llvm.x86.avx512.vpdpbusd.256"


ISA = AvxVnni()
