"""The statements of the attention kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tvm_vitq.numerics import Output
from tvm_vitq.schedules import packing, probabilities, tir
from tvm_vitq.schedules.codebook import Lookup
from tvm_vitq.schedules.isa import Sink
from tvm_vitq.schedules.kernel import Split
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.requantize import requantize, zero_lanes
from tvm_vitq.schedules.tir import LANES, TB, Expr, pieces

if TYPE_CHECKING:
    from tvm_vitq.schedules.attention import Attention, View

WIDE = Output("int32")
"""The limits of numerics.round_multiply."""


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


class AttentionBody:
    """Emits the kernel of a specification over its argument buffers."""

    def __init__(self, spec: Attention, buffers: dict[str, Expr]) -> None:
        self.spec, self.b, self.isa = spec, buffers, spec.target
        self.rows = Split.of(spec.tq, spec.tiles.rows)
        self.chunk = Split.of(self.rows.count, tir.ceildiv(self.rows.count, spec.chunks))
        self.qk_depth = packing.padded(spec.d, self.isa.unit)
        self.pv_depth = packing.padded(spec.tk, self.isa.unit)
        self.out_columns = packing.padded(spec.dv, GROUP)
        self.stride = packing.padded(spec.tk, 2 * LANES)
        # Two bytes of p are one left operand where sums of (p - 2**15) * v fit int32.
        joined = spec.probs.planes == 2 and self.isa.wide_left and spec.tk << 22 < 2**31
        self.planes, self.left_source = (1, "uint16") if joined else (spec.probs.planes, "uint8")

    def emit(self) -> None:
        spec = self.spec
        with TB.parallel(0, spec.batch * spec.heads * self.chunk.count) as task:
            head = tir.let(task // self.chunk.count)
            self.chunk_index = tir.let(task % self.chunk.count)
            self.image, self.head = tir.let(head // spec.heads), tir.let(head % spec.heads)
            self.multiplier = tir.let(tir.load(self.b["multiplier"], self.head, 1))
            self.score_multiplier = tir.let(tir.load(self.b["score_multiplier"], self.head, 1))
            self.zero = [tir.let(tir.load(self.b["zeros"], [i, self.head], 1)) for i in range(5)]
            self.lookup = None if spec.book is None else Lookup(spec.book, self.b, self.isa.permute)
            self.keys = self._pack_keys()
            self.values = self._pack_values()
            self.key_correction = self._key_correction()
            self.value_correction = self._value_correction(self.isa.offset(self.left_source))
            self.zero_correction = self._value_correction(self.zero[4]) if spec.probs.zero else None
            self._allocate()
            with TB.serial(0, self.chunk.large) as i:
                tile = tir.let(self.chunk_index * self.chunk.large + i)
                with tir.when(tile < self.rows.count):
                    # The last tile overlaps the one before it, so that there is one tile size; rows are
                    # written twice with the same bytes.
                    self._tile(tir.let(tir.minimum(tile * self.rows.large, spec.tq - self.rows.large)))

    def _at(self, view: View, token: Expr, channel: Expr, lanes: int) -> Expr:
        """`lanes` channels of a token of q, k or v."""
        row = self.image * view.rows + view.row + token
        column = self.head * view.head_stride + view.column + channel
        return tir.load(self.b[f"source{view.source}"], [row, column], lanes)

    def _pack_keys(self) -> Panels:
        """[depth / step][columns][step] of k: words of `step` channels move. Padding stays undefined."""
        spec, step = self.spec, self.isa.step
        panels = Panels(
            tir.scratch(spec.score_columns * self.qk_depth, "int8"),
            spec.score_columns, self.qk_depth, spec.tiles.columns,
        )  # fmt: skip
        whole = spec.d // step

        def word(destination: Expr, token: Expr, width: int) -> None:
            with TB.serial(0, whole) as k:
                tir.store(
                    panels.buffer,
                    self._at(spec.k, token, k * step, step),
                    destination + k * width * step,
                    step,
                )
            for k in range(whole, self.qk_depth // step):
                for i in range(step):
                    inside = k * step + i < spec.d
                    value = self._at(spec.k, token, k * step + i, 1) if inside else tir.constant(0, "int8", 1)
                    tir.store(panels.buffer, value, destination + k * width * step + i, 1)

        for first, count, width in panels.runs():
            tokens = min(count * width, spec.tk - first)
            with TB.serial(0, tokens) as t:
                panel = tir.let(t // width)
                column = t - panel * width
                word(tir.let((first + panel * width) * self.qk_depth + column * step), first + t, width)
        return panels

    def _pack_values(self) -> Panels:
        """[depth / step][columns][step] of v: `step` tokens interleave. Padding channels stay undefined."""
        spec, step = self.spec, self.isa.step
        panels = Panels(
            tir.scratch(self.out_columns * self.pv_depth, "int8"),
            self.out_columns,
            self.pv_depth,
            spec.tiles.columns,
        )

        def interleave(k: Expr, present: int) -> None:
            for start, count, lanes in pieces(spec.dv):
                for channel in range(start, start + count * lanes, lanes):
                    tokens = [self._at(spec.v, k * step + i, channel, lanes) for i in range(present)]
                    tokens += [tir.constant(0, "int8", lanes)] * (step - present)
                    base, column, width = panels.of_column(channel)
                    offset = base + k * (width * step) + column * step
                    tir.store(panels.buffer, tir.interleave(tokens, lanes), offset, lanes * step)

        whole, rest = divmod(spec.tk, step)
        with TB.serial(0, whole) as k:
            interleave(k, step)
        for k in range(whole, self.pv_depth // step):
            interleave(k, rest if k == whole else 0)
        return panels

    def _column_sums(self, panels: Panels, source: str) -> Expr:
        """int32 sums over depth of every packed column: a row of ones times the operand."""
        sums = tir.scratch(panels.columns, "int32")
        ones = self.isa.left_dtype(source)
        for first, count, width in panels.runs():
            with TB.serial(0, count) as panel:
                column = tir.let(first + panel * width)
                self.isa.matmul(
                    1, width, panels.depth,
                    lambda r, k, n: tir.constant(1, ones, n),
                    lambda offset, n, column=column: tir.load(panels.buffer, column * panels.depth + offset,
                    n), lambda r, c, value, n, column=column: tir.store(sums, value, column + c, n), source,
                    True,
                )  # fmt: skip
        return sums

    def _key_correction(self) -> Expr:
        """``-(zero_q + offset) * sum_i k[t, i]``, which every score of key t needs."""
        sums = self._column_sums(self.keys, "int8")
        factor = tir.let(tir.splat(tir.constant(-self.isa.offset("int8"), "int32", 1) - self.zero[0]))
        with TB.serial(0, self.spec.score_columns // LANES) as i:
            tir.store(sums, tir.load(sums, i * LANES) * factor, i * LANES)
        return sums

    def _value_correction(self, offset: Expr | int) -> Expr | None:
        """``-offset * sum_t v[t, c]``, for probabilities that are too large by an offset."""
        if isinstance(offset, int) and offset == 0:
            return None
        sums = self._column_sums(self.values, "uint8")
        factor = tir.let(tir.splat(tir.constant(0, "int32", 1) - offset))
        for c in range(0, self.out_columns, LANES):
            tir.store(sums, tir.load(sums, c) * factor, c)
        return sums

    def _allocate(self) -> None:
        rows, columns = self.rows.large, self.stride
        self.query = tir.scratch(rows * self.qk_depth, self.isa.left_dtype("int8"))
        self.scores = tir.scratch(rows * columns, "int32")
        self.exponentials = tir.scratch(rows * columns, "uint16")
        planes = self.planes
        self.probs = tir.scratch(planes * rows * columns, self.isa.left_dtype("uint8"))
        self.sums = tir.scratch(planes * rows * self.out_columns, "int32")
        self.row_term = tir.scratch(rows, "int32")
        self.row_scale = tir.scratch(rows, "float32")

    def _tile(self, row: Expr) -> None:
        self._stage_query(row)
        self._product(self.query, self.qk_depth, self.qk_depth, self.keys, self._scores(row), "int8")
        probabilities.emit(self)
        columns = self.out_columns
        for plane in range(self.planes):
            first = plane * self.rows.large
            self._product(
                self.probs, self.stride, self.pv_depth, self.values,
                lambda r, c, value, n, first=first: tir.store(self.sums, value, (first + r) * columns + c, n),
                self.left_source, first,
            )  # fmt: skip
        self._output(row, self.rows.large)

    def _scores(self, row: Expr) -> Sink:
        """Sums of products become base-2 scores on their way out of the registers."""
        multiplier = {n: tir.let(tir.splat(self.score_multiplier, n)) for n in {self.isa.lanes, LANES}}

        def sink(r: int, column: Expr, value: Expr, lanes: int) -> None:
            value = value + tir.load(self.key_correction, column, lanes)
            value = value + tir.splat(tir.load(self.row_term, r, 1), lanes)
            zero = zero_lanes(None, WIDE, lanes, self.isa.saturating_rint)
            value = requantize(value, multiplier[lanes], zero, WIDE, lanes)
            for i, (images, heads, rows) in enumerate(self.spec.additive):
                image = 0 if images == 1 else TB.floormod(self.image, images)
                where = [image, 0 if heads == 1 else self.head, 0 if rows == 1 else row + r, column]
                value = value + tir.load(self.b[f"additive{i}"], where, lanes)
            tir.store(self.scores, value, r * self.stride + column, lanes)

        return sink

    def _product(
        self, left: Expr, stride: int, depth: int, panels: Panels, sink: Sink, source: str, start: int = 0
    ) -> None:
        """Rows of left from `start` on @ panels; the columns given to `sink` count from the first panel."""
        for first, count, width in panels.runs():
            with TB.serial(0, count) as panel:
                column = tir.let(first + panel * width)
                self.isa.matmul(
                    self.rows.large, width, depth,
                    lambda r, k, n: tir.load(left, (start + r) * stride + k, n),
                    lambda offset, n, column=column: tir.load(panels.buffer, column * depth + offset, n),
                    lambda r, c, value, n, column=column: sink(r, column + c, value, n),
                    source, True,
                )  # fmt: skip

    def _stage_query(self, row: Expr) -> None:
        """The query rows as left operand, and ``zero_k * (d * zero_q - sum_i q[t, i])`` of each."""
        spec, depth = self.spec, self.qk_depth
        total = tir.scratch(LANES, "int32")
        with TB.serial(0, self.rows.large) as r:
            tir.store(total, tir.constant(0, "int32"), 0)
            for start, count, lanes in pieces(spec.d):
                with TB.serial(0, count) as i:
                    at = start + i * lanes
                    value = tir.let(self._at(spec.q, row + r, at, lanes))
                    tir.store(self.query, self.isa.convert_left(value, "int8", lanes), r * depth + at, lanes)
                    old = tir.load(total, 0, lanes)
                    tir.store(total, old + tir.cast(value, "int32", lanes), 0, lanes)
            for i in range(spec.d, depth):
                zero = self.isa.convert_left(tir.constant(0, "int8", 1), "int8", 1)
                tir.store(self.query, zero, r * depth + i, 1)
            q_sum = tir.intrinsic("llvm.vector.reduce.add", "int32", tir.load(total, 0))
            tir.store(self.row_term, self.zero[1] * (self.zero[0] * spec.d - q_sum), r, 1)

    def _lanes(self, value: Expr, lanes: int) -> Expr:
        return tir.let(tir.splat(value, lanes) if lanes > 1 else value)

    def _sum(self, r: Expr, c: int, lanes: int) -> Expr:
        """``sum_t p[t] v[t, c]`` of a row, out of the sums of one or both bytes of p, high one first."""
        total = None
        for plane in range(self.planes):
            value = tir.load(self.sums, (plane * self.rows.large + r) * self.out_columns + c, lanes)
            if self.value_correction is not None:
                value = value + tir.load(self.value_correction, c, lanes)
            total = value if total is None else (total << tir.constant(8, "int32", lanes)) + value
        return total

    def _output(self, row: Expr, rows: int) -> None:
        """Requantizes the tile and stores it at its place in [batch * tq, heads * dv]."""
        spec, out = self.spec, self.spec.out
        for start, count, lanes in pieces(spec.dv):
            zero_point = tir.let(tir.splat(self.zero[3], lanes) if lanes > 1 else self.zero[3])
            zero = zero_lanes(zero_point, out, lanes, self.isa.saturating_rint)
            scale = self._lanes(self.multiplier, lanes)
            with TB.serial(0, rows) as r:
                if spec.probs.by_row:
                    scale = self._lanes(tir.load(self.row_scale, r, 1), lanes)
                term = self._lanes(tir.load(self.row_term, r, 1), lanes)
                for c in range(start, start + count * lanes, lanes):
                    value = self._sum(r, c, lanes) + term
                    if self.zero_correction is not None:
                        value = value + tir.load(self.zero_correction, c, lanes)
                    value = requantize(tir.let(value), scale, zero, out, lanes)
                    if out.dtype not in ("int32", "float32"):
                        value = tir.cast(value, out.dtype, lanes)
                    at = [self.image * spec.tq + row + r, self.head * spec.dv + c]
                    tir.store(self.b["out"], value, at, lanes)
