"""Weights of fewer than 8 bits, packed: bit planes of 4, 2 and 1 bits, unpacked by shifts and masks.

A weight of column n is ``(q << shift) + base[n]`` with q of `bits` bits. q is cut into planes, 3 = 2 + 1, 5 =
4 + 1 and so on. A panel ``[depths][width]`` (`width` = columns times the depths that one instruction sums)
is packed by chunks of `rows` depths: a plane of p bits keeps 8 / p of them in the same bytes, the first one
in the lowest bits. So unpacking is a shift and a mask for each plane, whatever the width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.tir import TB, Expr

Array = npt.NDArray

WIDEST = 64
"""Bytes of the vectors that are unpacked at once."""


@dataclass(frozen=True)
class WeightPlanes:
    """How the weights of a layer are packed.

    bits : of a packed weight, 1 to 7.
    shift : see above.
    """

    bits: int
    shift: int

    @staticmethod
    def of(weight: Array) -> WeightPlanes | None:
        """The narrowest form of int8 weights [N, K]; None if that is no narrower than a byte."""
        steps = weight.astype(np.int32) - weight.min(1, keepdims=True)
        most = int(steps.max(initial=0))
        if most == 0:
            return WeightPlanes(1, 0)
        low = int(np.bitwise_or.reduce(steps, axis=None))
        shift = (low & -low).bit_length() - 1
        bits = (most >> shift).bit_length()
        return WeightPlanes(bits, shift) if bits < 8 else None

    @property
    def planes(self) -> list[tuple[int, int]]:
        """(bits, place of the lowest one in q) of each plane."""
        found, place = [], 0
        for width in (4, 2, 1):
            if self.bits & width:
                found.append((width, place))
                place += width
        return found

    @property
    def rows(self) -> int:
        """Depths of a chunk."""
        return 8 // min(width for width, _ in self.planes)

    def size(self, depths: int, width: int) -> int:
        """Bytes of a packed panel."""
        return tir.ceildiv(depths, self.rows) * self.rows * width * self.bits // 8

    def pack(self, panel: Array, base: Array) -> Array:
        """int8 [depths, width] less the bases [width], as bytes."""
        depths, width = panel.shape
        whole = tir.ceildiv(depths, self.rows) * self.rows
        q = np.zeros((whole, width), np.uint8)
        q[:depths] = (panel.astype(np.int32) - base) >> self.shift
        chunks = q.reshape(-1, self.rows, width)
        parts = []
        for bits, place in self.planes:
            fields = (chunks >> place) & (2**bits - 1)
            together = fields.reshape(len(chunks), -1, 8 // bits, width)
            places = (bits * np.arange(8 // bits, dtype=np.uint8))[:, None]
            parts.append((together << places).sum(2, dtype=np.uint8).reshape(len(chunks), -1))
        return np.concatenate(parts, axis=1).reshape(-1)

    def unpack(
        self, source: Expr, start: Expr, base: Expr, first: Expr, target: Expr, depths: int, width: int
    ) -> None:
        """Emits the inverse of `pack`: int8 [depths (whole chunks), width] into `target`.

        Parameters
        ----------
        source, start : packed weights and where the panel begins.
        base, first : bases of all columns, as wide as the panel's rows, and where the panel's begin.
        """
        lanes = WIDEST if width % WIDEST == 0 else WIDEST // 2
        chunk = self.rows * width * self.bits // 8
        with TB.serial(0, tir.ceildiv(depths, self.rows)) as c, TB.serial(0, width // lanes) as v:
            bases = tir.let(tir.load(base, first + v * lanes, lanes))
            loaded, at = [], start + c * chunk + v * lanes
            for bits, _ in self.planes:
                loaded.append(
                    [tir.let(tir.load(source, at + i * width, lanes)) for i in range(self.rows * bits // 8)]
                )
                at = at + self.rows * bits // 8 * width
            for row in range(self.rows):
                q = None
                for (bits, place), vectors in zip(self.planes, loaded, strict=True):
                    index, inside = divmod(row, 8 // bits)
                    field = _moved(vectors[index], place + self.shift - inside * bits, lanes)
                    mask = (2**bits - 1) << (place + self.shift)
                    field = field & tir.constant(mask, "uint8", lanes)
                    q = field if q is None else q | field
                value = tir.reinterpret(q, f"int8x{lanes}") + bases
                tir.store(target, value, (c * self.rows + row) * width + v * lanes, lanes)


def _moved(value: Expr, left: int, lanes: int) -> Expr:
    """uint8 lanes shifted to the left, or to the right by a negative number."""
    if left == 0:
        return value
    by = tir.constant(abs(left), "uint8", lanes)
    return value << by if left > 0 else value >> by
