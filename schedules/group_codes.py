"""Codes of a wide tensor, each channel by the quantizer of its group, in the order of groups."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_vitq.numerics import Output
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.group_table import GroupLayout
from tvm_vitq.schedules.isa import isa
from tvm_vitq.schedules.kernel import Argument, Kernel, Split, kernel_name
from tvm_vitq.schedules.requantize import requantize, zero_lanes
from tvm_vitq.schedules.tir import TB, Expr

ROWS = 4
"""Rows whose codes move to their places together: a place is read once for all of them."""


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
        """Codes in the order of channels first: vectors; then one by one to their places."""
        target, layout = isa(self.isa), self.layout
        codes = [tir.scratch(self.k, target.left_dtype("int8")) for _ in range(rows)]
        for start, count, lanes in tir.pieces(self.k):
            with TB.serial(0, count) as i:
                at = tir.let(start + i * lanes)
                bits = tir.load(b["table"], [image, layout.multiplier + at], lanes)
                multiplier = tir.let(tir.reinterpret(bits, "float32" if lanes == 1 else f"float32x{lanes}"))
                point = tir.let(tir.load(b["table"], [image, layout.zero + at], lanes))
                zero = zero_lanes(point, self.out, lanes, target.saturating_rint)
                for r in range(rows):
                    value = requantize(
                        tir.load(b["x"], [row + r, at], lanes), multiplier, zero, self.out, lanes
                    )
                    code = target.convert_left(tir.cast(value, "int8", lanes), "int8", lanes)
                    tir.store(codes[r], code, at, lanes)
        with TB.serial(0, self.k) as c:
            place = tir.let(tir.load(b["table"], [image, layout.place + c], 1))
            for r in range(rows):
                tir.store(b["out"], tir.load(codes[r], c, 1), [row + r, place], 1)
