"""The schedule of functions without a kernel of their own: elementwise chains, copies, pooling, float parts.

Elementwise producers are inlined into elementwise consumers; outer loops run in parallel, the innermost one
in vectors. Reductions keep their order: lanes run over independent outputs, so no schedule changes a value.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm.s_tir import Schedule, ScheduleError

MAX_LANES = 16
MAX_SUMS = 8
PARALLEL_FROM = 1 << 14
"""Loop iterations from which starting threads pays: about 10 us of work."""

TASKS = 64
"""Iterations of the parallel loop that are enough; loops further in stay as they are, so that nothing is
divided per element to find where it lies.
"""

SPATIAL = 0  # tvm.tirx.IterVar.DataPar


def schedule_default(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Schedule any function of spatial and reduction blocks for a CPU."""
    sch = Schedule(tvm.IRModule({"main": func}))
    inline_elementwise(sch)
    for block in blocks_of(sch):
        schedule_block(sch, block)
    return sch.mod["main"].with_attrs(dict(func.attrs))


def inline_elementwise(sch: Schedule) -> None:
    """Inlines elementwise blocks that only elementwise blocks read."""
    for block in blocks_of(sch):
        if is_elementwise(sch, block) and all(is_elementwise(sch, c) for c in sch.get_consumers(block)):
            _inline(sch, block)


def blocks_of(sch: Schedule) -> list[Any]:
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def _kinds(sch: Schedule, block: Any) -> list[int]:
    return [int(v.iter_type) for v in sch.get(block).iter_vars]


def is_elementwise(sch: Schedule, block: Any) -> bool:
    return all(kind == SPATIAL for kind in _kinds(sch, block))


def _inline(sch: Schedule, block: Any) -> None:
    """Inline a block into its consumers; one that writes a result of the function cannot be and stays."""
    try:
        sch.compute_inline(block)
    except ScheduleError:
        return


def loops_by_kind(sch: Schedule, block: Any) -> tuple[list[Any], list[Any]]:
    """Spatial and reduction loops of a block that is not scheduled yet."""
    pairs = list(zip(sch.get_loops(block), _kinds(sch, block), strict=True))
    return [v for v, kind in pairs if kind == SPATIAL], [v for v, kind in pairs if kind != SPATIAL]


def _extent(sch: Schedule, loops: list[Any]) -> int:
    return math.prod(int(sch.get(loop).extent) for loop in loops)


def schedule_block(sch: Schedule, block: Any) -> None:
    """Lanes, registers and threads for one block with loops of its own."""
    if not sch.get_loops(block) or len(sch.get_loops(block)) != len(_kinds(sch, block)):
        return  # a scalar
    spatial, reduction = loops_by_kind(sch, block)
    work = _extent(sch, [*spatial, *reduction])
    if not spatial:
        return  # one number; the order of its sum is the program's
    outer, vector = _split_lanes(sch, spatial)
    outer, register = _split_registers(sch, outer) if reduction else (outer, [])
    sums = sch.cache_write(block, 0, "local") if reduction else None
    sch.reorder(*outer, *reduction, *register, *vector)
    outer = _fuse_tasks(sch, outer)
    if sums is not None and outer:
        sch.reverse_compute_at(sums, outer[-1])
        write_out(sch, sch.get_loops(sums)[len(outer) :], bool(vector))
    if outer and work >= PARALLEL_FROM:
        sch.parallel(outer[0])
    write_out(sch, [*register, *vector], bool(vector))
    if reduction:
        initial = sch.decompose_reduction(block, reduction[0])
        write_out(sch, sch.get_loops(initial)[len(outer) :], bool(vector))


def _fuse_tasks(sch: Schedule, outer: list[Any]) -> list[Any]:
    """The outermost loops as one, as many as it takes for TASKS iterations."""
    count = next((n for n in range(1, len(outer)) if _extent(sch, outer[:n]) >= TASKS), len(outer))
    return [sch.fuse(*outer[:count]), *outer[count:]] if outer else []


def write_out(sch: Schedule, loops: list[Any], lanes: bool) -> None:
    """Unrolls all loops; with `lanes` the last one becomes a vector."""
    for loop in loops[: len(loops) - lanes]:
        sch.unroll(loop)
    if lanes:
        sch.vectorize(loops[-1])


def _split_registers(sch: Schedule, outer: list[Any]) -> tuple[list[Any], list[Any]]:
    """A few iterations of a channel-like loop: their sums share operands and do not wait for each other.

    The first loop (images) and the last one (blocks of lanes) are left alone.
    """
    for position in range(1, len(outer) - 1):
        count = math.gcd(_extent(sch, [outer[position]]), MAX_SUMS)
        if count > 1:
            blocks, inner = sch.split(outer[position], [None, count])
            return [*outer[:position], blocks, *outer[position + 1 :]], [inner]
    return outer, []


def _split_lanes(sch: Schedule, spatial: list[Any]) -> tuple[list[Any], list[Any]]:
    """The loops outside of the lanes, and the loop over them (none if the innermost extent is odd)."""
    *outer, last = spatial
    lanes = math.gcd(_extent(sch, [last]), MAX_LANES)
    if lanes == 1:
        return spatial, []
    blocks, lane = sch.split(last, [None, lanes])
    return [*outer, blocks], [lane]
