"""Unpacks the weights of a linear layer once, when a library is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.kernel import Argument, Kernel, kernel_name
from tvm_vitq.schedules.linear import Linear
from tvm_vitq.schedules.tir import LANES, TB, Expr


@dataclass(frozen=True)
class Unpack:
    """Packed weights as the bytes that the same layer reads where weights are not packed.

    layer : the layer, with `planes`.

    Arguments of the kernel: weight, weight_base, out, the first two as `layer.pack` gives them.
    """

    layer: Linear

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        layer, planes = self.layer, self.layer.planes
        assert planes is not None  # by construction
        shape = packing.padded(layer.n, packing.GROUP), layer.whole_depth
        width = f"{layer.isa}p{layer.tiles.columns}"
        return kernel_name("unpack", "int8", [f"w{planes.bits}s{planes.shift}"], [], shape, width)

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        packed = [a for a in self.layer.arguments() if a.name in ("weight", "weight_base")]
        size = packing.padded(self.layer.n, packing.GROUP) * self.layer.whole_depth
        return (*packed, Argument("out", (size,), "int8", "output"))

    def kernel(self) -> Kernel:
        """Generates the function."""
        arguments = self.arguments()

        def emit() -> None:
            weight, base, out = (tir.argument(a.name, a.shape, a.dtype) for a in arguments)
            start = column = 0
            for columns, count in _runs(self.layer):
                with TB.parallel(0, count) as panel:
                    self._panel(weight, base, out, start, column, columns, panel)
                start += count * self.layer.panel_bytes(columns)
                column += count * columns

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments)

    def _panel(
        self, weight: Expr, base: Expr, out: Expr, start: int, column: int, columns: int, panel: Expr
    ) -> None:
        layer, planes, step = self.layer, self.layer.planes, self.layer.target.step
        assert planes is not None  # by construction
        width, depths = columns * step, layer.whole_depth // step
        bytes_ = tir.scratch(packing.padded(depths, planes.rows) * width, "int8")  # whole chunks
        first = tir.let(column + panel * columns)
        at = tir.let(start + panel * layer.panel_bytes(columns))
        planes.unpack(weight, at, base, first * step, bytes_, depths, width)
        with TB.serial(0, depths * width // LANES) as i:
            place = first * layer.whole_depth + i * LANES
            tir.store(out, tir.load(bytes_, i * LANES), place)


def _runs(layer: Linear) -> list[tuple[int, int]]:
    """(columns, number) of panels of equal width, in order."""
    widths = packing.panel_widths(layer.n, layer.tiles.columns)
    return [(columns, widths.count(columns)) for columns in sorted(set(widths), reverse=True)]
