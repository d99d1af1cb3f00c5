"""LayerNorm of wide tensors with affine and output conversion: integer statistics, one rsqrt per row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq import numerics
from tvm_vitq.numerics import Output
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.kernel import Argument, Kernel, kernel_name
from tvm_vitq.schedules.tir import LANES, TB, Expr

Array = npt.NDArray

INT32_TERMS = (2**31 - 1) // numerics.WIDE_MAX
"""Wide values that an int32 lane can sum."""


@dataclass(frozen=True)
class LayerNorm:
    """numerics.int_layer_norm of x [M, C], the same code on every instruction set.

    block_rows : rows that one task computes.

    Arguments of the kernel: x, gain, offset, epsilon, shift, out; `pack` returns gain to shift.
    """

    m: int
    c: int
    out: Output
    block_rows: int = 1

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        clip = f"{self.out.qmin}to{self.out.qmax}".replace("-", "m")
        block = "" if self.block_rows == 1 else f"b{self.block_rows}"
        return kernel_name("layer_norm", self.out.dtype, ["int32"], [], (self.m, self.c), clip, block)

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        return (
            Argument("x", (self.m, self.c), "int32", "input"),
            Argument("gain", (self.c,), "int32", "constant"),
            Argument("offset", (self.c,), "int32", "constant"),
            Argument("epsilon", (1,), "int64", "constant"),
            Argument("shift", (1,), "int32", "constant"),
            Argument("out", (self.m, self.c), self.out.dtype, "output"),
        )

    def pack(self, gain: Array, offset: Array, shift: int, epsilon: int) -> list[Array]:
        """The constants of numerics.int_layer_norm."""
        arrays = [(gain, "int32"), (offset, "int32"), ([epsilon], "int64"), ([shift], "int32")]
        return [np.asarray(value, dtype) for value, dtype in arrays]

    def kernel(self) -> Kernel:
        """Generates the function."""
        arguments = self.arguments()

        def emit() -> None:
            buffers = [tir.argument(a.name, a.shape, a.dtype) for a in arguments]
            rows = self.block_rows
            if rows == 1:
                with TB.parallel(0, self.m) as row:
                    self._row(row, *buffers)
            elif rows >= self.m:  # no other thread is woken
                with TB.serial(0, self.m) as row:
                    self._row(row, *buffers)
            else:
                with TB.parallel(0, tir.ceildiv(self.m, rows)) as task, TB.serial(0, rows) as i:
                    row = tir.let(task * rows + i)
                    with tir.when(row < self.m):
                        self._row(row, *buffers)

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments)

    def _row(
        self, row: Expr, x: Expr, gain: Expr, offset: Expr, epsilon: Expr, shift: Expr, out: Expr
    ) -> None:
        mean, scale = self._statistics(x, row, epsilon)
        spread = tir.let(tir.load(shift, 0, 1))
        for start, count, lanes in self._pieces():
            with TB.serial(0, count) as i:
                at = tir.let(start + i * lanes)
                value = _normalize(tir.load(x, [row, at], lanes), mean, scale, lanes)
                value = value * tir.load(gain, at, lanes) + tir.load(offset, at, lanes)
                value = value >> (spread if lanes == 1 else tir.splat(spread, lanes))
                value = tir.clip(value, self.out.qmin, self.out.qmax, "int32", lanes)
                if self.out.dtype != "int32":
                    value = tir.cast(value, self.out.dtype, lanes)
                tir.store(out, value, [row, at], lanes)

    def _pieces(self) -> list[tuple[int, int, int]]:
        """(first channel, count, lanes): whole vectors, then single channels."""
        whole, rest = divmod(self.c, LANES)
        pieces = [(0, whole, LANES), (whole * LANES, rest, 1)]
        return [piece for piece in pieces if piece[1]]

    def _statistics(self, x: Expr, row: Expr, epsilon: Expr) -> tuple[Expr, Expr]:
        """The mean (int32) and r (float32) of a row.

        One pass: ``sum (x - mean)**2 = sum x**2 - 2 mean sum x + C mean**2``, exact in int64.
        """
        total, squares = tir.scratch(1, "int64"), tir.scratch(1, "int64")
        for buffer in (total, squares):
            tir.store(buffer, tir.constant(0, "int64", 1), 0, 1)
        for start, count, lanes in self._pieces():
            if lanes == 1:
                with TB.serial(0, count) as i:
                    value = tir.let(tir.cast(tir.load(x, [row, start + i], 1), "int64", 1))
                    tir.store(total, tir.load(total, 0, 1) + value, 0, 1)
                    tir.store(squares, tir.load(squares, 0, 1) + value * value, 0, 1)
                continue
            for first in range(0, count, INT32_TERMS):
                _sums(x, row, first * lanes, min(INT32_TERMS, count - first), total, squares)
        s = tir.let(tir.load(total, 0, 1))
        mean = tir.let((s * 2 + self.c) // tir.constant(2 * self.c, "int64", 1))
        variance = tir.load(squares, 0, 1) - mean * (s * 2 - mean * self.c) + tir.load(epsilon, 0, 1)
        y, power = _rsqrt(tir.let(variance))
        factor = tir.constant(float(numerics.norm_factor(self.c)), "float32", 1)
        scale = tir.let(tir.cast(tir.cast(y, "int32", 1), "float32", 1) * factor * power)
        return tir.let(tir.cast(mean, "int32", 1)), scale


def _sums(x: Expr, row: Expr, start: int, vectors: int, total: Expr, squares: Expr) -> None:
    """Adds the sum and the sum of squares of some vectors of a row."""
    sums, low, high = tir.scratch(LANES, "int32"), tir.scratch(8, "int64"), tir.scratch(8, "int64")
    tir.store(sums, tir.constant(0, "int32"), 0)
    for half in (low, high):
        tir.store(half, tir.constant(0, "int64", 8), 0, 8)
    with TB.serial(0, vectors) as i:
        at = start + i * LANES
        tir.store(sums, tir.load(sums, 0) + tir.load(x, [row, at]), 0)
        for j, half in enumerate((low, high)):
            value = tir.let(tir.cast(tir.load(x, [row, at + 8 * j], 8), "int64", 8))
            tir.store(half, tir.load(half, 0, 8) + value * value, 0, 8)
    wide = tir.cast(tir.load(sums, 0), "int64")
    tir.store(total, tir.load(total, 0, 1) + tir.intrinsic("llvm.vector.reduce.add", "int64", wide), 0, 1)
    both = tir.load(low, 0, 8) + tir.load(high, 0, 8)
    tir.store(squares, tir.load(squares, 0, 1) + tir.intrinsic("llvm.vector.reduce.add", "int64", both), 0, 1)


def _rsqrt(v: Expr) -> tuple[Expr, Expr]:
    """numerics.int_rsqrt of an int64: y, and 2**-s as float32."""

    def wide(value: int) -> Expr:
        return tir.constant(value, "int64", 1)

    s = tir.let((wide(63) - tir.cast(TB.clz(v), "int64", 1)) >> wide(1))
    shift = tir.let(s * 2 - 28)
    down = v >> tir.maximum(shift, wide(0))
    n = tir.let(down << tir.maximum(wide(0) - shift, wide(0)))  # one of the two shifts is 0
    a, b = numerics.RSQRT_SEED
    y = tir.let(wide(a) - ((n * b) >> wide(28)))
    for _ in range(numerics.RSQRT_STEPS):
        square = tir.let((y * y) >> wide(30))
        y = tir.let((y * (wide(3 * 2**30) - ((n * square) >> wide(28)))) >> wide(31))
    bits = tir.cast(wide(127) - s, "int32", 1) << tir.constant(23, "int32", 1)
    return y, tir.reinterpret(bits, "float32")


def _normalize(x: Expr, mean: Expr, scale: Expr, lanes: int) -> Expr:
    """The normalized value in 2**-NORM_BITS."""
    limit = float(numerics.NORM_MAX)
    center, factor = (v if lanes == 1 else tir.splat(v, lanes) for v in (mean, scale))
    scaled = tir.cast(x - center, "float32", lanes) * factor
    return tir.rint(tir.clip(scaled, -limit, limit, "float32", lanes), lanes)
