"""Constants in the layouts of the kernels: NumPy only, run once at build."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics import Output
from tvm_vitq.schedules.kernel import Split

Array = npt.NDArray

GROUP = 16
"""Columns are padded to multiples of this, the lanes of the epilogue."""


def padded(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def panel_widths(columns: int, tile_columns: int) -> list[int]:
    """Columns of each panel: nearly equal multiples of GROUP, at most `tile_columns`."""
    split = Split.of(padded(columns, GROUP) // GROUP, tile_columns // GROUP)
    return [GROUP * size for size in split.sizes()]


def pack_right(weight: Array, tile_columns: int, step: int, unit: int, groups: int = 1) -> list[Array]:
    """int8 [N, K] as panels of ``[groups][depth / step][columns][step]``, each flat, zero padded.

    Each group of K / groups depths is padded by itself to a multiple of `unit`.
    """
    n, k = weight.shape
    width, depth = k // groups, padded(k // groups, unit)
    full = np.zeros((padded(n, GROUP), groups, depth), np.int8)
    full[:n, :, :width] = weight.reshape(n, groups, width)
    panels, start = [], 0
    for columns in panel_widths(n, tile_columns):
        panel = full[start : start + columns].reshape(columns, groups, depth // step, step)
        panels.append(panel.transpose(1, 2, 0, 3).reshape(-1))
        start += columns
    return panels


def pack_columns(values: Array | int | float, columns: int, dtype: str) -> Array:
    """[N], [1] or a number as [padded N]; a number is repeated, padding is zero."""
    result = np.zeros(padded(columns, GROUP), dtype)
    result[:columns] = np.asarray(values)
    return result


def pack_multiplier(multiplier: Array | float, columns: int, out: Output) -> Array:
    """Per column multipliers; for the kind "shift" the int32 shifts s of ``2**-s``."""
    if out.kind == "multiply" or out.dtype == "float32":
        return pack_columns(multiplier, columns, "float32")
    shift = -np.log2(np.asarray(multiplier, np.float64))
    return pack_columns(shift.astype(np.int32), columns, "int32")


def multiplier_dtype(out: Output) -> str:
    """Type of what pack_multiplier returns."""
    return "int32" if out.kind == "shift" and out.dtype != "float32" else "float32"
