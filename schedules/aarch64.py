"""What the AArch64 instruction sets have in common."""

from __future__ import annotations

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.isa import Isa
from tvm_vitq.schedules.tir import Expr


def fcvtns(value: Expr, lanes: int) -> Expr:
    """float32 to int32, ties to even, saturating; LLVM does not split wider vectors than a register."""
    name = "llvm.aarch64.neon.fcvtns"
    if lanes < 4:
        type_ = "int32" if lanes == 1 else f"int32x{lanes}"
        return tir.intrinsic(name, type_, value)
    value = tir.let(value)
    parts = (tir.pick([value], range(i, i + 4)) for i in range(0, lanes, 4))
    return tir.pick([tir.intrinsic(name, "int32x4", part) for part in parts], range(lanes))


class Aarch64(Isa):
    """Registers of four int32 lanes."""

    lanes = 4
    saturating_rint = staticmethod(fcvtns)

    @staticmethod
    def accumulator() -> Expr:
        """One register of sums, cleared."""
        register = tir.scratch(4, "int32")
        tir.store(register, tir.constant(0, "int32", 4), 0, 4)
        return register


class SignedLeft(Aarch64):
    """Without products of mixed signs: uint8 left operands are read as ``value - 128``."""

    def left_dtype(self, source: str) -> str:
        return "int8"

    def offset(self, source: str) -> int:
        return -128 if source == "uint8" else 0

    def convert_left(self, value: Expr, source: str, lanes: int) -> Expr:
        if source == "int8":
            return value
        flipped = value ^ tir.constant(128, "uint8", lanes)
        return tir.reinterpret(flipped, "int8" if lanes == 1 else f"int8x{lanes}")
