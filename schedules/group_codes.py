"""Codes of a wide tensor, each channel by the quantizer of its group, in the order of groups."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_vitq.numerics import Output
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.group_table import GroupLayout
from tvm_vitq.schedules.isa import isa
from tvm_vitq.schedules.kernel import Argument, Kernel, Split, kernel_name
from tvm_vitq.schedules.requantize import requantize, zero_lanes
from tvm_vitq.schedules.tir import LANES, TB, Expr

ROWS = 16
"""Rows whose codes move to their places together: as bytes of one register."""

WORDS = ROWS // 4
"""The same in int32."""


@dataclass(frozen=True)
class GroupCodes:
    """numerics_groups.int_group_codes of x [M, K] in the order of the image's table, in the form that the
    instruction set multiplies. Positions of padding stay undefined: they meet weights that are 0.

    out : the codes' Output.

    Arguments of the kernel: x, table, out.
    """

    isa: str
    m: int
    k: int
    tokens: int
    groups: int
    out: Output

    @property
    def layout(self) -> GroupLayout:
        return GroupLayout(self.k, self.groups, isa(self.isa).unit)

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        shape = (self.m, self.k, self.groups)
        clip = f"{self.out.qmin}to{self.out.qmax}".replace("-", "m")
        return kernel_name("group_codes", "int8", ["int32"], [], shape, f"t{self.tokens}", clip, self.isa)

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        dtype = isa(self.isa).left_dtype("int8")
        return (
            Argument("x", (self.m, self.k), "int32", "input"),
            Argument("table", (self.m // self.tokens, self.layout.size), "int32", "input"),
            Argument("out", (self.m, self.layout.positions), dtype, "output"),
        )

    def kernel(self) -> Kernel:
        """Generates the function."""
        arguments, split = self.arguments(), Split.of(self.tokens, ROWS)

        def emit() -> None:
            buffers = {a.name: tir.argument(a.name, a.shape, a.dtype) for a in arguments}
            with TB.parallel(0, self.m // self.tokens * split.count) as task:
                image = tir.let(task // split.count)
                piece = tir.let(task % split.count)
                first = tir.let(image * self.tokens)
                large = tir.let(tir.minimum(piece, split.number_large))
                row = tir.let(first + large * split.large + (piece - large) * split.small)
                if split.number_large == split.count:
                    self._rows(buffers, image, row, split.large)
                else:
                    tir.choose(
                        piece < split.number_large,
                        lambda: self._rows(buffers, image, row, split.large),
                        lambda: self._rows(buffers, image, row, split.small),
                    )

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments)

    def _rows(self, b: dict[str, Expr], image: Expr, row: Expr, rows: int) -> None:
        """Codes in the order of channels first, those of a channel side by side: so each channel moves to its
        place in one piece.
        """
        codes = tir.scratch((self.k + 1) * ROWS, "int8")  # padding moves the last piece, whatever it is
        for start, count, lanes in tir.pieces(self.k):
            with TB.serial(0, count) as i:
                at = tir.let(start + i * lanes)
                words = self._words(b, image, at, row, rows, lanes)
                pieces = tir.reinterpret(tir.interleave(words, lanes), f"int8x{lanes * ROWS}")
                tir.store(codes, pieces, at * ROWS, lanes * ROWS)
        target = isa(self.isa)
        with TB.serial(0, self.layout.positions // LANES) as i:
            first = tir.let(i * LANES)
            channels = [tir.load(b["table"], [image, self.layout.order + first + j], 1) for j in range(LANES)]
            pieces = [tir.let(tir.load(codes, channel * ROWS, ROWS)) for channel in channels]
            for r, line in enumerate(tir.transpose(pieces, ROWS)[:rows]):
                tir.store(b["out"], target.convert_left(line, "int8", LANES), [row + r, first])

    def _words(
        self, b: dict[str, Expr], image: Expr, at: Expr, row: Expr, rows: int, lanes: int
    ) -> list[Expr]:
        """Codes of some channels, those of four rows in each int32 lane; 0 for rows that are missing."""
        bits = tir.load(b["table"], [image, self.layout.multiplier + at], lanes)
        multiplier = tir.let(tir.reinterpret(bits, "float32" if lanes == 1 else f"float32x{lanes}"))
        point = tir.let(tir.load(b["table"], [image, self.layout.zero + at], lanes))
        zero = zero_lanes(point, self.out, lanes, isa(self.isa).saturating_rint)
        words: list[Expr] = [tir.constant(0, "int32", lanes)] * WORDS
        for r in range(rows):
            value = tir.load(b["x"], [row + r, at], lanes)
            code = requantize(value, multiplier, zero, self.out, lanes)
            byte = (code & tir.constant(255, "int32", lanes)) << tir.constant(r % 4 * 8, "int32", lanes)
            words[r // 4] = tir.let(words[r // 4] | byte)
        return words
