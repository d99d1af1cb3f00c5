"""Linear layer on codes: staging, product, output conversion, table lookup and residual add in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics import Multiples, Output, Partial
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.isa import Isa, Tile, isa
from tvm_vitq.schedules.kernel import Argument, Kernel, kernel_name
from tvm_vitq.schedules.linear_body import LinearBody
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.weight_planes import WeightPlanes

Array = npt.NDArray


@dataclass(frozen=True)
class Linear:
    """numerics.int_linear of x [M, K] and weight [N, K], optionally followed by int_lookup or int_add.

    isa : name of the instruction set.
    out : conversion of the sums. With `lookup` it is Output("uint16", 0, 4095) and the result is the table's
        entry.
    lookup : dtype of the table (4096 entries, an argument), or None.
    codes : converts the entries of a table of wide values (numerics.int_requantize), with a multiplier and a
        zero point per column; None leaves them.
    residual : adds a wide tensor [M, N] with saturation; `out` is then int32.
    zero_point : "none" (0), "scalar" or "vector", how the output's zero point is given.
    groups : K is cut into this many groups with scales of their own (numerics.Partial); 0 for none.
    multiples : the groups' scales are whole multiples (numerics.Multiples).
    row_scales, row_zero_points : Partial.row_multiplier and Partial.row_zero_point are present (needs groups
        >= 1).
    planes : weights are packed this way and unpacked in the kernel, panel by panel; None: a byte each.
    tile : tile sizes; None takes the instruction set's default.

    Arguments of the kernel, in order: x, weight, [weight_base], bias, multiplier, [zero_point], [count],
    [group_multiplier, group_bias], [row_multiplier], [row_zero_point, colsum], [entry_multiplier,
    entry_zero], [table], [residual], out. `pack` returns those from weight to colsum, `pack_codes` the two
    behind them.
    """

    isa: str
    m: int
    n: int
    k: int
    out: Output
    lookup: str | None = None
    codes: Output | None = None
    residual: bool = False
    zero_point: str = "none"
    groups: int = 0
    multiples: bool = False
    row_scales: bool = False
    row_zero_points: bool = False
    planes: WeightPlanes | None = None
    tile: Tile | None = None

    BLOCK_ROWS: ClassVar[int] = 208
    """Rows of a task, or fewer for whole tiles, where the schedule does not say."""

    @property
    def target(self) -> Isa:
        return isa(self.isa)

    @property
    def tiles(self) -> Tile:
        """The tile sizes in force."""
        return self.tile or (self.target.group_tile if self.multiples else None) or self.target.tile

    @property
    def block_rows(self) -> int:
        """Rows of a task, in whole tiles; as many as there are, or more, mean all."""
        return self.tiles.block_rows or max(1, self.BLOCK_ROWS // self.tiles.rows) * self.tiles.rows

    @property
    def group_width(self) -> int:
        """Depths of a group."""
        return self.k // max(self.groups, 1)

    @property
    def depth(self) -> int:
        """Depths of a group as stored: padded to whole iterations."""
        return packing.padded(self.group_width, self.target.unit)

    @property
    def whole_depth(self) -> int:
        """Depths of all groups as stored."""
        return self.depth * max(self.groups, 1)

    @property
    def most_depth(self) -> int:
        """Depths that a row's products run through at most."""
        return self.whole_depth

    @property
    def out_dtype(self) -> str:
        return self.codes.dtype if self.codes else self.lookup or self.out.dtype

    @property
    def staged(self) -> bool:
        """Whether x is first converted into a private copy."""
        return self.target.left_dtype("int8") != "int8" or self.depth != self.group_width

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        epilogue = ["shift"] if self.out.kind == "shift" else []
        entries = f"{self.codes.qmin}to{self.codes.qmax}".replace("-", "m") if self.codes else ""
        epilogue += [f"lut{entries}"] if self.lookup else []
        epilogue += ["add"] if self.residual else []
        weight = "qs8cx" if not self.groups else f"qs8{'m' if self.multiples else 'g'}{self.group_width}"
        weight += f"w{self.planes.bits}s{self.planes.shift}" if self.planes else ""
        left = "qs8" + ("px" if self.row_scales else "") + ("pz" if self.row_zero_points else "")
        zero = {"none": "", "scalar": "z", "vector": "zv"}[self.zero_point]
        clip = "" if self.out_dtype == "float32" else f"{self.out.qmin}to{self.out.qmax}".replace("-", "m")
        tile = "" if self.tile is None else self.tile.name
        shape = (self.m, self.k, self.n)
        return kernel_name("linear", self.out_dtype, [left, weight], epilogue, shape, clip, zero, tile)

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        m, n, k, padded = self.m, self.n, self.k, packing.padded(self.n, GROUP)
        result = [Argument("x", (m, k), "int8", "input")]
        if self.planes is None:
            result.append(Argument("weight", (padded * self.whole_depth,), "int8", "constant"))
        else:
            size = sum(map(self.panel_bytes, packing.panel_widths(n, self.tiles.columns)))
            result.append(Argument("weight", (size,), "uint8", "constant"))
            result.append(Argument("weight_base", (padded * self.target.step,), "int8", "constant"))
        result.append(Argument("bias", (padded,), "int32", "constant"))
        result.append(Argument("multiplier", (padded,), packing.multiplier_dtype(self.out), "constant"))
        if self.zero_point != "none":
            shape = (1,) if self.zero_point == "scalar" else (padded,)
            result.append(Argument("zero_point", shape, "int32", "constant"))
        if self.multiples:
            result.append(Argument("count", (self.groups, padded), "int16", "constant"))
        elif self.groups:
            result.append(Argument("group_multiplier", (self.groups, padded), "float32", "constant"))
            result.append(Argument("group_bias", (self.groups, padded), "int32", "constant"))
        if self.row_scales:
            result.append(Argument("row_multiplier", (m,), "float32", "constant"))
        if self.row_zero_points:
            result.append(Argument("row_zero_point", (m,), "int32", "constant"))
            result.append(Argument("colsum", (self.groups, padded), "int32", "constant"))
        if self.codes:
            result.append(Argument("entry_multiplier", (padded,), "float32", "constant"))
            result.append(Argument("entry_zero", (padded,), "int32", "constant"))
        if self.lookup:
            result.append(Argument("table", (4096,), self.lookup, "input"))
        if self.residual:
            result.append(Argument("residual", (m, n), "int32", "input"))
        return (*result, Argument("out", (m, n), self.out_dtype, "output"))

    def pack(
        self,
        weight: Array,
        bias: Array,
        multiplier: Array | float,
        zero_point: Array | int = 0,
        inner: Partial | Multiples | None = None,
    ) -> list[Array]:
        """The constants of numerics.int_linear as this kernel's arguments from `weight` to `colsum`.

        The offset that the instruction adds to x (128 on x86) is taken back here: ``bias - offset * sum_k
        weight``, where groups count by their multiples.
        """
        target, groups = self.target, max(self.groups, 1)
        panels = packing.pack_right(weight, self.tiles.columns, target.step, target.unit, groups)
        excess = target.offset("int8") * weight.astype(np.int32).reshape(self.n, groups, -1).sum(
            -1, dtype=np.int32
        )
        if inner is None:
            bias = bias.astype(np.int32) - excess[:, 0]
        elif isinstance(inner, Multiples):
            bias = bias.astype(np.int32) - (excess * inner.count.T.astype(np.int32)).sum(1, dtype=np.int32)
        arrays = [np.concatenate(panels)] if self.planes is None else self._packed(weight, panels)
        arrays.append(packing.pack_columns(bias, self.n, "int32"))
        arrays.append(packing.pack_multiplier(multiplier, self.n, self.out))
        if self.zero_point == "scalar":
            arrays.append(np.asarray(zero_point, np.int32).reshape(1))
        elif self.zero_point == "vector":
            arrays.append(packing.pack_columns(zero_point, self.n, "int32"))
        if isinstance(inner, Multiples):
            arrays.append(self._groups(inner.count, "int16"))
        elif inner is not None:
            arrays.append(self._groups(inner.multiplier, "float32"))
            arrays.append(self._groups(inner.bias.astype(np.int32) - excess.T, "int32"))
            if inner.row_multiplier is not None:
                arrays.append(self._rows(inner.row_multiplier, np.float32))
            if inner.row_zero_point is not None and inner.colsum is not None:
                arrays.append(self._rows(inner.row_zero_point, np.int32))
                arrays.append(self._groups(inner.colsum, "int32"))
        return arrays

    def _packed(self, weight: Array, panels: list[Array]) -> list[Array]:
        """Packed panels one after the other, and the bases of all columns, as often as they are summed."""
        assert self.planes is not None  # by the caller
        base = np.repeat(packing.pack_columns(weight.min(1), self.n, "int8"), self.target.step)
        parts, start = [], 0
        for panel in panels:
            width = panel.size // self.whole_depth * self.target.step
            rows = panel.reshape(-1, width)
            parts.append(self.planes.pack(rows, base[start : start + width]))
            start += width
        return [np.concatenate(parts), base]

    def panel_bytes(self, columns: int) -> int:
        """Of the weights of a panel, as stored."""
        if self.planes is None:
            return self.whole_depth * columns
        step = self.target.step
        return self.planes.size(self.whole_depth // step, columns * step)

    def pack_codes(self, multiplier: Array, zero_point: Array) -> list[Array]:
        """Multiplier and zero point of `codes`, [N] or one number each."""
        given = (multiplier, "float32"), (zero_point, "int32")
        return [packing.pack_columns(value, self.n, dtype) for value, dtype in given]

    def _groups(self, values: Array, dtype: str) -> Array:
        """Constants [G, N] with padded columns."""
        return np.stack([packing.pack_columns(row, self.n, dtype) for row in values])

    def _rows(self, values: Array, dtype: type) -> Array:
        """Per token constants, repeated for every image of the batch."""
        return np.tile(np.asarray(values, dtype), self.m // len(values))

    def kernel(self) -> Kernel:
        """Generates the function."""
        arguments = self.arguments()

        def emit() -> None:
            buffers = {a.name: tir.argument(a.name, a.shape, a.dtype) for a in arguments}
            LinearBody(self, buffers).emit()

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments, self.m * self.n * self.k)
