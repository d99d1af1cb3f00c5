"""What tuning may decide about each kernel: plain data, so that search, records and kernels agree on it.

A decision is a name with its candidates, the default first; one candidate each, by name, is a schedule.
Kernels that have nothing to decide have an empty space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from tvm_vitq.errors import VitqError
from tvm_vitq.schedules import tir
from tvm_vitq.schedules.attention import Attention
from tvm_vitq.schedules.group_linear import GroupLinear
from tvm_vitq.schedules.isa import ORDERS, Tile
from tvm_vitq.schedules.layer_norm import LayerNorm
from tvm_vitq.schedules.linear import Linear

Schedule = Mapping[str, Any]
"""Decision -> the candidate taken; values are JSON: numbers, strings, and lists of them."""

BLOCK_ROWS = (24, 48, 96, 192, 384, 768, 1536)
"""Rows of a panel that one task computes: more of them read the weights less often, fewer make more tasks."""

HEAD_TASKS = (1, 2, 3, 4, 6, 8)
"""Tasks that share the query rows of a head: each packs the head's keys and values."""

NORM_ROWS = (1, 4, 16, 64, 256)
"""Rows that a task normalizes: all of them in one task wake no other thread."""


def space_of(spec: Any) -> dict[str, list[Any]]:
    """Decisions and their candidates. The first ones together are the kernel's default schedule.

    register_tile : [rows, columns] of the product;  block_rows, unroll, order : see `isa.Tile`.
    """
    if type(spec) is Linear:
        block_rows = _block_rows(spec, spec.m)
        return {
            "register_tile": _tiles(spec, spec.m),
            "block_rows": block_rows,
            "unroll": _first(spec.tiles.unroll, spec.target.unrolls),
            "order": _first(spec.tiles.order, ORDERS if len(block_rows) > 1 else ()),
        }
    if type(spec) is GroupLinear:
        return {"register_tile": _tiles(spec, spec.tokens), "block_rows": _block_rows(spec, spec.tokens)}
    if type(spec) is Attention:
        parts = [tir.ceildiv(spec.tq, tasks) for tasks in HEAD_TASKS]
        return {"register_tile": _tiles(spec, spec.tq), "block_rows": _first(spec.block_rows, parts)}
    if type(spec) is LayerNorm:
        several = [rows for rows in NORM_ROWS if rows < spec.m]
        return {"block_rows": _first(spec.block_rows, [*several, spec.m])}
    return {}


def _first(default: Any, others: Iterable[Any]) -> list[Any]:
    """Candidates, once each."""
    unique = [default]
    unique += [other for other in others if other not in unique]
    return unique


def _tiles(spec: Linear | Attention, rows: int) -> list[list[int]]:
    """Register tiles of no more than `rows`."""
    fitting = [list(tile) for tile in spec.target.register_tiles() if tile[0] <= rows]
    return _first([min(spec.tiles.rows, rows), spec.tiles.columns], fitting)


def _block_rows(spec: Linear, rows: int) -> list[int]:
    """Rows of a task, of `rows` that share a panel; the last candidate is all of them."""
    return _first(min(spec.block_rows, rows), [*(some for some in BLOCK_ROWS if some < rows), rows])


def completed(spec: Any, schedule: Schedule) -> dict[str, Any]:
    """A schedule with all decisions of `space_of`.

    One that is missing takes its default: a record that does not have it was made before it could be decided,
    when kernels always did what is the default now.

    Raises
    ------
    VitqError : the schedule has a decision, or a candidate, that the kernel does not.
    """
    known = space_of(spec)
    full = {**{name: candidates[0] for name, candidates in known.items()}, **schedule}
    if set(full) != set(known) or any(full[name] not in known[name] for name in known):
        raise VitqError(
            "not a schedule of this kernel",
            where=spec.name,
            got=dict(schedule),
            expected=f"one candidate each of {', '.join(known) or 'nothing: it has no decisions'}",
            fix="tune the kernel anew: its search space is another one than when the record was made",
        )
    return full


def scheduled(spec: Any, schedule: Schedule) -> Any:
    """The kernel under a schedule, which is `completed`."""
    full = completed(spec, schedule)
    if "register_tile" not in full:
        return dataclasses.replace(spec, **full)
    rows, columns = full.pop("register_tile")
    return dataclasses.replace(spec, tile=Tile(rows, columns, **full))
