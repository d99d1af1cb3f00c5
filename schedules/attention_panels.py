"""K and V of a head packed for the register tile, in the attention kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.kernel import Split
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.tir import LANES, TB, Expr, pieces

if TYPE_CHECKING:
    from tvm_vitq.schedules.attention_body import AttentionBody


class Panels:
    """A right operand packed in the kernel: `columns` columns (padded), cut into panels of a tile each."""

    def __init__(self, buffer: Expr, columns: int, depth: int, tile_columns: int) -> None:
        self.buffer, self.columns, self.depth = buffer, columns, depth
        self.split = Split.of(columns // GROUP, tile_columns // GROUP)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first column, number of panels, columns of each) of the wide and then of the narrow panels."""
        wide = self.split.number_large
        yield 0, wide, self.split.large * GROUP
        if wide < self.split.count:
            yield wide * self.split.large * GROUP, self.split.count - wide, self.split.small * GROUP

    def of_column(self, column: int) -> tuple[int, int, int]:
        """(offset of the panel, column within it, its width) of a column."""
        for first, count, width in self.runs():
            if column < first + count * width:
                panel = (column - first) // width
                return (first + panel * width) * self.depth, column - first - panel * width, width
        raise IndexError(column)


def pack_keys(body: AttentionBody) -> Panels:
    """[depth / step][columns][step] of k: words of `step` channels move, those of GROUP tokens together where
    a word is an integer. Padding columns stay undefined.
    """
    spec, step = body.spec, body.isa.step
    panels = Panels(
        tir.scratch(spec.score_columns * body.qk_depth, "int8"),
        spec.score_columns, body.qk_depth, spec.tiles.columns,
    )  # fmt: skip
    together = spec.d // step if step < LANES else 0
    for first, count, width in panels.runs():
        tokens = min(count * width, spec.tk - first)

        def place(column: Expr, width: int = width, first: int = first) -> Expr:
            panel = tir.let(column // width)
            inside = column - panel * width
            return tir.let((first + panel * width) * body.qk_depth + inside * step)

        if together:
            with TB.serial(0, tir.ceildiv(tokens, GROUP)) as i:
                _transpose_keys(body, panels, place(i * GROUP), first + i * GROUP, width)
        if together < body.qk_depth // step:
            with TB.serial(0, tokens) as t:
                _move_words(body, panels, place(t), first + t, width, together)
    return panels


def _transpose_keys(body: AttentionBody, panels: Panels, destination: Expr, token: Expr, width: int) -> None:
    """All whole words of GROUP tokens, the last of which stands for those that do not exist."""
    spec, step = body.spec, body.isa.step
    tokens = [tir.let(tir.minimum(token + t, spec.tk - 1)) for t in range(GROUP)]
    for start, count, lanes in pieces(spec.d // step):
        for k in range(start, start + count * lanes, lanes):
            loads = [body.at(spec.k, t, k * step, lanes * step) for t in tokens]
            words = f"int{8 * step}" + (f"x{lanes}" if lanes > 1 else "")
            columns = tir.transpose([tir.let(tir.reinterpret(v, words)) for v in loads], lanes)
            for i, column in enumerate(columns):
                value = tir.reinterpret(column, f"int8x{GROUP * step}")
                tir.store(panels.buffer, value, destination + (k + i) * width * step, GROUP * step)


def _move_words(
    body: AttentionBody, panels: Panels, destination: Expr, token: Expr, width: int, first: int
) -> None:
    """The words of a token from the `first` on, one after the other; missing channels are 0."""
    spec, step = body.spec, body.isa.step
    whole = max(first, spec.d // step)
    with TB.serial(first, whole) as k:
        word = body.at(spec.k, token, k * step, step)
        tir.store(panels.buffer, word, destination + k * width * step, step)
    for k in range(whole, body.qk_depth // step):
        for i in range(step):
            inside = k * step + i < spec.d
            value = body.at(spec.k, token, k * step + i, 1) if inside else tir.constant(0, "int8", 1)
            tir.store(panels.buffer, value, destination + k * width * step + i, 1)


def pack_values(body: AttentionBody) -> Panels:
    """[depth / step][columns][step] of v: `step` tokens interleave. Padding channels stay undefined."""
    spec, step = body.spec, body.isa.step
    panels = Panels(
        tir.scratch(body.out_columns * body.pv_depth, "int8"),
        body.out_columns,
        body.pv_depth,
        spec.tiles.columns,
    )

    def interleave(k: Expr, present: int) -> None:
        for start, count, lanes in pieces(spec.dv):
            for channel in range(start, start + count * lanes, lanes):
                tokens = [body.at(spec.v, k * step + i, channel, lanes) for i in range(present)]
                tokens += [tir.constant(0, "int8", lanes)] * (step - present)
                base, column, width = panels.of_column(channel)
                offset = base + k * (width * step) + column * step
                tir.store(panels.buffer, tir.interleave(tokens, lanes), offset, lanes * step)

    whole, rest = divmod(spec.tk, step)
    with TB.serial(0, whole) as k:
        interleave(k, step)
    for k in range(whole, body.pv_depth // step):
        interleave(k, rest if k == whole else 0)
    return panels


def _column_sums(body: AttentionBody, panels: Panels, source: str) -> Expr:
    """int32 sums over depth of every packed column: a row of ones times the operand."""
    sums = tir.scratch(panels.columns, "int32")
    ones = body.isa.left_dtype(source)
    for first, count, width in panels.runs():
        with TB.serial(0, count) as panel:
            column = tir.let(first + panel * width)
            body.isa.matmul(
                1, width, panels.depth,
                lambda r, k, n: tir.constant(1, ones, n),
                lambda offset, n, column=column: tir.load(panels.buffer, column * panels.depth + offset, n),
                lambda r, c, value, n, column=column: tir.store(sums, value, column + c, n),
                source, True,
            )  # fmt: skip
    return sums


def key_correction(body: AttentionBody) -> Expr:
    """``-(zero_q + offset) * sum_i k[t, i]``, which every score of key t needs."""
    sums = _column_sums(body, body.keys, "int8")
    factor = tir.let(tir.splat(tir.constant(-body.isa.offset("int8"), "int32", 1) - body.zero[0]))
    with TB.serial(0, body.spec.score_columns // LANES) as i:
        tir.store(sums, tir.load(sums, i * LANES) * factor, i * LANES)
    return sums


def value_correction(body: AttentionBody, offset: Expr | int) -> Expr | None:
    """``-offset * sum_t v[t, c]``, for probabilities that are too large by an offset."""
    if isinstance(offset, int) and offset == 0:
        return None
    sums = _column_sums(body, body.values, "uint8")
    factor = tir.let(tir.splat(tir.constant(0, "int32", 1) - offset))
    for c in range(0, body.out_columns, LANES):
        tir.store(sums, tir.load(sums, c) * factor, c)
    return sums
