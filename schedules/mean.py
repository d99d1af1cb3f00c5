"""Mean of a wide tensor over one axis."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.kernel import Argument, Kernel, kernel_name
from tvm_vitq.schedules.tir import TB


@dataclass(frozen=True)
class Mean:
    """numerics.int_mean of x [outer, count, inner] over the middle axis. Arguments: x, out [outer, inner]."""

    outer: int
    count: int
    inner: int

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        return kernel_name("mean", "int32", ["int32"], [], (self.outer, self.count, self.inner))

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        x = Argument("x", (self.outer, self.count, self.inner), "int32", "input")
        return x, Argument("out", (self.outer, self.inner), "int32", "output")

    def kernel(self) -> Kernel:
        """Generates the function: int64 sums of some columns at a time."""
        arguments = self.arguments()

        def emit() -> None:
            x, out = (tir.argument(a.name, a.shape, a.dtype) for a in arguments)
            for start, count, lanes in tir.pieces(self.inner):
                with TB.parallel(0, self.outer * count) as task:
                    row, column = tir.let(task // count), tir.let(start + task % count * lanes)
                    total = tir.scratch(lanes, "int64")
                    tir.store(total, tir.constant(0, "int64", lanes), 0, lanes)
                    with TB.serial(0, self.count) as i:
                        value = tir.cast(tir.load(x, [row, i, column], lanes), "int64", lanes)
                        tir.store(total, tir.load(total, 0, lanes) + value, 0, lanes)
                    rounded = tir.scratch(lanes, "int32")
                    with TB.serial(0, lanes) as i:  # no target divides vectors of int64
                        twice = tir.load(total, i, 1) * 2 + self.count
                        mean = twice // tir.constant(2 * self.count, "int64", 1)
                        tir.store(rounded, tir.cast(mean, "int32", 1), i, 1)
                    tir.store(out, tir.load(rounded, 0, lanes), [row, column], lanes)

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments)
