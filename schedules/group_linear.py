"""Linear layer on codes whose channels are in groups that are known at run time only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.group_linear_body import GroupLinearBody
from tvm_vitq.schedules.group_table import GroupLayout
from tvm_vitq.schedules.isa import Tile
from tvm_vitq.schedules.kernel import Argument, Kernel, kernel_name
from tvm_vitq.schedules.linear import Linear
from tvm_vitq.schedules.packing import GROUP

Array = npt.NDArray


@dataclass(frozen=True)
class GroupLinear(Linear):
    """numerics_groups.int_group_linear behind `GroupTable` and `GroupCodes`: x is what the latter returns.

    tokens : rows of an image;  choices : number of quantizers that channels choose from.

    Arguments of the kernel, in order: x, table, weight, group_multiplier, code_zero, bias, multiplier,
    [zero_point], [lookup table], [residual], out. `pack_groups` returns those from weight to zero_point.
    """

    tokens: int = 0
    choices: int = 1

    BLOCK_ROWS: ClassVar[int] = 512
    """More than of `Linear`: each task gathers its weights."""

    @property
    def tiles(self) -> Tile:
        return self.tile or self.target.group_tile or self.target.tile

    @property
    def layout(self) -> GroupLayout:
        return GroupLayout(self.k, self.choices, self.target.unit)

    @property
    def most_depth(self) -> int:
        # A loop of a length known only at run time takes single units, one of whole registers perhaps several
        # at once. One unit more is no number of whole registers, so that all units are counted.
        return self.layout.positions + self.target.unit

    @property
    def staged(self) -> bool:
        return False

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        _, _, rest = super().name.partition("vitq_linear_")
        return kernel_name("group_linear", rest, [], [], (), f"t{self.tokens}g{self.choices}")

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        known = super().arguments()[2:]  # behind x and weight
        layout, padded = self.layout, packing.padded(self.n, GROUP)
        own = (
            Argument("x", (self.m, layout.positions), self.target.left_dtype("int8"), "input"),
            Argument("groups", (self.m // self.tokens, layout.size), "int32", "input"),
            Argument("weight", (padded * (self.k + 1),), "int8", "constant"),
            Argument("group_multiplier", (self.choices, padded), "float32", "constant"),
            Argument("code_zero", (self.choices,), "int32", "constant"),
        )
        return (*own, *known)

    def parts(self, columns: int) -> list[tuple[int, int]]:
        """(start, width) of what one register holds of a channel's weights in a panel."""
        pieces = tir.pieces(columns, 4 * self.target.lanes)
        return [(start + i * width, width) for start, count, width in pieces for i in range(count)]

    def _stored(self, columns: int) -> Array:
        """The column at each place of a channel's weights: `tir.interleave_parts` puts all in order."""
        step, order = self.target.step, []
        for start, width in self.parts(columns):
            places = np.arange(start, start + width).reshape(step, width // 16, 16 // step)
            order.append(places.transpose(1, 0, 2).reshape(-1))
        return np.concatenate(order)

    def pack_groups(
        self,
        weight: Array,
        bias: Array,
        multiplier: Array | float,
        zero_point: Array | int,
        group_multiplier: Array,
        code_zero: Array,
    ) -> list[Array]:
        """The constants of numerics_groups.int_group_linear as this kernel's arguments.

        Weights are panels of ``[K + 1][columns]``: a channel's weights lie side by side (in the order of
        `_stored`), to be copied to the channel's place; the last row is zeros, for padding.
        """
        full = np.zeros((packing.padded(self.n, GROUP), self.k + 1), np.int8)
        full[: self.n, : self.k] = weight
        ends = np.cumsum(packing.panel_widths(self.n, self.tiles.columns))[:-1]
        panels = np.split(full, ends)
        rows = np.concatenate([panel[self._stored(len(panel))].T.reshape(-1) for panel in panels])
        scales = np.stack([packing.pack_columns(row, self.n, "float32") for row in group_multiplier])
        arrays = [rows, scales, np.asarray(code_zero, np.int32), packing.pack_columns(bias, self.n, "int32")]
        arrays.append(packing.pack_multiplier(multiplier, self.n, self.out))
        if self.zero_point == "scalar":
            arrays.append(np.asarray(zero_point, np.int32).reshape(1))
        elif self.zero_point == "vector":
            arrays.append(packing.pack_columns(zero_point, self.n, "int32"))
        return arrays

    def kernel(self) -> Kernel:
        """Generates the function."""
        arguments = self.arguments()

        def emit() -> None:
            buffers = {a.name: tir.argument(a.name, a.shape, a.dtype) for a in arguments}
            GroupLinearBody(self, buffers).emit()

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments, self.m * self.n * self.k)
