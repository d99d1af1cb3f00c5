"""The schedule of window operators on channels-last images: convolution, depthwise convolution, pooling.

Lanes run over channels. A register tile is some pixels of a row by some vectors of channels: its sums stay in
registers over the whole window, share the filter's loads (in a convolution those of the image too), and pass
through the elementwise operators that follow before they are stored. Blocks of channels are the outermost
loop, so that their filters stay cached. Every sum keeps its order: no number of threads changes a value.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm.s_tir import Schedule, ScheduleError

from tvm_vitq.schedules.default_rule import (
    MAX_LANES,
    PARALLEL_FROM,
    blocks_of,
    inline_elementwise,
    is_elementwise,
    loops_by_kind,
    schedule_block,
    write_out,
)

MAX_SUMS = 14
"""Vectors of sums: their buffer has to stay below 1 KiB to live on the stack, hence in registers."""

WRITTEN_OUT = 128
"""Multiply-adds of vectors that the innermost window loops are written out to."""


def schedule_window(func: tvm.tirx.PrimFunc, target: tvm.target.Target | None) -> tvm.tirx.PrimFunc | None:
    """The scheduled function, or None if it is not one window operator and what is elementwise around it."""
    sch = Schedule(tvm.IRModule({"main": func}))
    inline_elementwise(sch)
    windows = [block for block in blocks_of(sch) if not is_elementwise(sch, block)]
    if len(windows) != 1 or not _is_window(sch, windows[0]):
        return None
    (window,) = windows
    producers = list(sch.get_producers(window))
    results = list(sch.get_consumers(window))
    if not results:
        results = [sch.cache_write(window, 0, "local")]
    elif len(results) == 1 and _aligned(sch, window, results[0]):
        sch.set_scope(window, 0, "local")
    else:
        return None
    known = {_name(sch, block) for block in (window, results[0], *producers)}
    if known != {_name(sch, block) for block in blocks_of(sch)}:
        return None
    for producer in producers:
        schedule_block(sch, producer)
    try:
        _tile(sch, window, results[0], most_sums(target))
    except ScheduleError:
        return None
    return sch.mod["main"].with_attrs(dict(func.attrs))


def most_sums(target: tvm.target.Target | None) -> int:
    """Vectors of MAX_LANES sums that the registers of a target hold beside their operands."""
    if target is None:
        return 1
    bits = int(tvm.get_global_func("target.llvm_get_vector_width")(target))
    many = bits >= 512 or "aarch64" in str(target.attrs.get("mtriple", ""))
    registers = 32 if many else 16
    return max(1, min(MAX_SUMS, registers * 3 // 4 * bits // (32 * MAX_LANES)))


def _name(sch: Schedule, block: Any) -> str:
    return str(sch.get(block).name_hint)


def _is_window(sch: Schedule, block: Any) -> bool:
    """Four spatial loops and a window of rows and columns."""
    if len(sch.get_loops(block)) != len(sch.get(block).iter_vars):
        return False
    spatial, reduction = loops_by_kind(sch, block)
    return len(spatial) == 4 and len(reduction) in (2, 3)


def _extents(sch: Schedule, loops: list[Any]) -> list[int]:
    return [int(sch.get(loop).extent) for loop in loops]


def _aligned(sch: Schedule, window: Any, result: Any) -> bool:
    """Whether the last block goes through the same image in the same order."""
    if not is_elementwise(sch, result) or len(sch.get_loops(result)) != 4:
        return False
    return _extents(sch, list(sch.get_loops(result))) == _extents(sch, loops_by_kind(sch, window)[0])


def _tile(sch: Schedule, window: Any, result: Any, sums: int) -> None:
    spatial, reduction = loops_by_kind(sch, window)
    image, row, column, channel = spatial
    *_, width, channels = _extents(sch, spatial)
    lanes = math.gcd(channels, MAX_LANES)
    vectors, pixels = tile_sizes(channels // lanes, width, sums, shared=len(reduction) == 3)
    work = math.prod(_extents(sch, [*spatial, *reduction]))
    blocks, vector, lane = sch.split(channel, [None, vectors, lanes])
    columns, pixel = sch.split(column, [None, pixels])
    sch.reorder(image, blocks, row, columns, *reduction, pixel, vector, lane)
    outer = sch.fuse(image, blocks, row)
    sch.reverse_compute_at(result, columns)
    _store(sch, sch.get_loops(result)[2:], lanes)
    if work >= PARALLEL_FROM:
        sch.parallel(outer)
    write_out(sch, [pixel, vector, lane], lanes > 1)
    _write_out_window(sch, reduction, vectors * pixels)
    initial = sch.decompose_reduction(window, reduction[0])
    write_out(sch, sch.get_loops(initial)[2:], lanes > 1)


def tile_sizes(vectors: int, width: int, sums: int, shared: bool) -> tuple[int, int]:
    """Vectors of channels and pixels of a register tile, divisors of what there is.

    `shared`: all channels read the same pixels, so that a square tile loads least; otherwise a long one does.
    """

    def merit(tile: tuple[int, int]) -> tuple[int, int]:
        count, pixels = tile
        return count * pixels, -(count + pixels) if shared else pixels

    fitting = [
        (count, pixels)
        for count in range(1, 5)
        for pixels in range(1, sums + 1)
        if vectors % count == 0 and width % pixels == 0 and count * pixels <= sums
    ]
    return max(fitting, key=merit)


def _store(sch: Schedule, loops: list[Any], lanes: int) -> None:
    """Pixels and channels of a tile on their way out, in vectors; axes of one element have no loop."""
    *outer, channel = loops
    if lanes > 1:
        vectors, lane = sch.split(channel, [None, lanes])
        write_out(sch, [*outer, vectors, lane], True)
    else:
        write_out(sch, loops, False)


def _write_out_window(sch: Schedule, reduction: list[Any], sums: int) -> None:
    written = sums
    for loop in reversed(reduction[1:]):  # the first one is where the sums start
        written *= _extents(sch, [loop])[0]
        if written > WRITTEN_OUT:
            return
        sch.unroll(loop)
