"""What `GroupTable` and `GroupCodes` compute, in NumPy: the operands of a `GroupLinear` by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics_groups import GroupQuantizers, int_assign, int_group_codes
from tvm_vitq.schedules.group_table import GroupLayout
from tvm_vitq.schedules.isa import Isa

if TYPE_CHECKING:
    from tvm_vitq.schedules.group_linear import GroupLinear

Array = npt.NDArray


def table_of(groups: Array, quantizers: GroupQuantizers, layout: GroupLayout) -> Array:
    """The table of each image, with 0 where `GroupTable` writes nothing.

    groups : int32 [images, K], as `numerics_groups.int_assign` gives them.
    """
    table = np.zeros((len(groups), layout.size), np.int32)
    for row, chosen in zip(table, groups, strict=True):
        row[: layout.positions] = layout.k
        start = 0
        for g in range(layout.groups):
            channels = np.flatnonzero(chosen == g)
            row[layout.starts + g] = start
            row[start * layout.unit : start * layout.unit + len(channels)] = channels
            start += -(-len(channels) // layout.unit)
        row[layout.starts + layout.groups] = start
        row[layout.multiplier : layout.multiplier + layout.k] = quantizers.multiplier[chosen].view(np.int32)
        row[layout.zero : layout.zero + layout.k] = quantizers.zero_point[chosen]
    return table


def codes_of(x: Array, table: Array, quantizers: GroupQuantizers, layout: GroupLayout, isa: Isa) -> Array:
    """The codes of wide x [M, K] in the order of their image's table, as `isa` multiplies them, with 0 in
    padding, [M, positions].
    """
    codes = int_group_codes(x, int_assign(x, quantizers), quantizers).astype(np.int32) + isa.offset("int8")
    result = np.zeros((*codes.shape[:2], layout.positions), isa.left_dtype("int8"))
    for image, order in enumerate(table[:, : layout.positions]):
        places = np.flatnonzero(order < layout.k)
        result[image][:, places] = codes[image][:, order[places]]
    return result.reshape(len(x), -1)


def operands_of(spec: GroupLinear, x: Array, quantizers: GroupQuantizers) -> list[Array]:
    """The first two arguments of the kernel for wide x [..., K]."""
    rows, layout = x.reshape(-1, spec.k), spec.layout
    table = table_of(int_assign(rows, quantizers), quantizers, layout)
    return [codes_of(rows, table, quantizers, layout, spec.target), table]
