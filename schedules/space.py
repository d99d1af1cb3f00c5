"""What tuning may decide about each kernel: plain data, so that search, records and kernels agree on it.

A decision is a name with its candidates; one candidate each, by name, is a schedule. Kernels that have
nothing to decide have an empty space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tvm_vitq.errors import VitqError
from tvm_vitq.schedules.attention import Attention
from tvm_vitq.schedules.isa import Tile
from tvm_vitq.schedules.linear import Linear

Schedule = Mapping[str, Any]
"""Decision -> the candidate taken; values are JSON: numbers, and lists of them."""

BLOCK_ROWS = (24, 48, 96, 192, 384, 768, 1536)
"""Rows of a panel that one task computes: more of them read the weights less often, fewer make more tasks."""


def space_of(spec: Any) -> dict[str, list[Any]]:
    """Decisions and their candidates.

    register_tile : [rows, columns] of the product;  block_rows, unroll : see `isa.Tile`.
    """
    if type(spec) is Linear:
        enough = [rows for rows in BLOCK_ROWS if rows < spec.m] + [spec.m]
        return {
            "register_tile": _tiles(spec, spec.m),
            "block_rows": enough,
            "unroll": list(spec.target.unrolls),
        }
    if type(spec) is Attention:
        return {"register_tile": _tiles(spec, spec.tq)}
    return {}


def _tiles(spec: Linear | Attention, rows: int) -> list[list[int]]:
    """Register tiles of no more than `rows`; the default one is always among them."""
    default = min(spec.tiles.rows, rows), spec.tiles.columns
    fitting = [tile for tile in spec.target.register_tiles() if tile[0] <= rows]
    return [list(tile) for tile in sorted({default, *fitting})]


def scheduled(spec: Any, schedule: Schedule) -> Any:
    """The kernel under a schedule; VitqError if that does not decide what `space_of` asks for."""
    known = space_of(spec)
    if set(schedule) != set(known) or any(schedule[name] not in known[name] for name in known):
        raise VitqError(
            "not a schedule of this kernel",
            where=spec.name,
            got=dict(schedule),
            expected=f"one candidate each of {', '.join(known) or 'nothing: it has no decisions'}",
            fix="tune the kernel anew: its search space is another one than when the record was made",
        )
    rows, columns = schedule["register_tile"]
    rest = {name: value for name, value in schedule.items() if name != "register_tile"}
    return dataclasses.replace(spec, tile=Tile(rows, columns, **rest))
