"""What the AArch64 instruction sets have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.isa import Isa, Side
from tvm_vitq.schedules.tir import TB, Expr


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
    """32 registers of four int32 lanes.

    A register tile is computed in blocks of columns, one after the other.
    """

    lanes = 4
    registers = 32
    fetches_ahead = False  # the Neoverse N1 would do a twentieth fewer products per cycle (llvm-mca)
    saturating_rint = staticmethod(fcvtns)

    def block(self, rows: int) -> int:
        """The most columns of a block, whose sums stay in registers."""
        raise NotImplementedError

    def width(self, rows: int, columns: int, side: Side | None = None) -> int:
        """Columns of a block of a tile. With `side`, tiles of all heights have as many iterations as the
        default's.
        """
        most = self.block(self.tile.rows if side else rows)
        return max(w for w in range(4, most + 1, 4) if columns % w == 0)

    def depths(self, depth: int | Expr) -> int:
        """Depths of one iteration of the innermost loop; an unknown `depth` is an expression."""
        return self.unit

    def side_steps(self, columns: int, depth: int) -> int:
        return columns // self.width(self.tile.rows, columns) * (depth // self.depths(depth))

    def register_tiles(self) -> list[tuple[int, int]]:
        """Up to twice the default's columns, in blocks of full width, and down to half of its rows."""
        most = self.tile.rows, 2 * self.tile.columns
        widths = [c for c in range(16, most[1] + 1, 16) if self.width(most[0], c) == self.block(most[0])]
        return [(rows, columns) for columns in widths for rows in range(most[0] // 2, most[0] + 1)]

    @staticmethod
    @contextmanager
    def loop(count: int | Expr, first: Expr, size: int) -> Iterator[tuple[Expr, Expr]]:
        """Iterations, and the offset of each in the packed operand: ``first + size * iteration``.

        The offset is carried from one to the next. Of a sum LLVM forgets that it does not overflow, and then
        extends it to 64 bits in every iteration.
        """
        offset = tir.scratch(1, "int32")
        tir.store(offset, first, 0, 1)
        with TB.serial(0, count) as iteration:
            current = tir.let(tir.load(offset, 0, 1))
            tir.store(offset, current + size, 0, 1)
            yield iteration, current

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
