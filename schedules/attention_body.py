"""The statements of the attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_vitq.numerics import Output
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.attention_panels import (
    Panels,
    key_correction,
    pack_keys,
    pack_values,
    value_correction,
)
from tvm_vitq.schedules.codebook import Lookup
from tvm_vitq.schedules.isa import Side
from tvm_vitq.schedules.kernel import Split
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.probabilities import passes
from tvm_vitq.schedules.requantize import requantize, zero_lanes
from tvm_vitq.schedules.tir import LANES, TB, Expr, pieces

if TYPE_CHECKING:
    from tvm_vitq.schedules.attention import Attention, View

WIDE = Output("int32")
"""The limits of numerics.round_multiply."""

FAR = -(2**30)
"""Score of padding: its distance to any maximum fits int32 and its exponential is 0."""


PanelSink = Callable[[int, Expr, Expr, int, bool], None]
"""As `isa.Sink`; the last argument says whether lanes may be padding: they are the last ones of a panel."""


@dataclass(frozen=True)
class Operand:
    """Rows of a left operand in memory, `stride` elements from each other; `depth` of them count."""

    buffer: Expr
    first: Expr
    stride: int
    depth: int
    source: str

    def load(self, r: int, k: Expr, lanes: int) -> Expr:
        """Elements of a row of the tile."""
        return tir.load(self.buffer, (self.first + r) * self.stride + k, lanes)


class AttentionBody:
    """Emits the kernel of a specification over its argument buffers."""

    def __init__(self, spec: Attention, buffers: dict[str, Expr]) -> None:
        self.spec, self.b, self.isa = spec, buffers, spec.target
        self.rows = Split.of(spec.tq, spec.tiles.rows)
        self.chunk = Split.of(self.rows.count, tir.ceildiv(min(spec.block_rows, spec.tq), spec.tiles.rows))
        self.qk_depth = packing.padded(spec.d, self.isa.unit)
        self.pv_depth = packing.padded(spec.tk, self.isa.unit)
        self.out_columns = packing.padded(spec.dv, GROUP)
        self.stride = packing.padded(spec.tk, 2 * LANES)
        # Two bytes of p are one left operand where sums of (p - 2**15) * v fit int32.
        joined = spec.probs.planes == 2 and self.isa.wide_left and spec.tk << 22 < 2**31
        # Slots of probabilities and their sums that are being written and read.
        self.new: Expr = 0
        self.old: Expr = 0
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
            self.keys = pack_keys(self)
            self.values = pack_values(self)
            self.key_correction = key_correction(self)
            self.value_correction = value_correction(self, self.isa.offset(self.left_source))
            self.zero_correction = value_correction(self, self.zero[4]) if spec.probs.zero else None
            self._allocate()
            self.passes = passes(self)
            first = tir.let(self.chunk_index * self.chunk.large)
            self.end = tir.let(tir.minimum(first + self.chunk.large, self.rows.count))
            with TB.serial(0, self.chunk.large + int(spec.staggered)) as i:
                tile = tir.let(first + i)
                if spec.staggered:
                    with tir.when(tile <= self.end):
                        self._staggered(i, tile)
                else:
                    with tir.when(tile < self.end):
                        self._tile(self._row(tile))

    def _row(self, tile: Expr) -> Expr:
        """The first row of a tile. The last tile overlaps the one before it, so that there is one tile size;
        rows are written twice with the same bytes.
        """
        return tir.let(tir.minimum(tile * self.rows.large, self.spec.tq - self.rows.large))

    def _tile(self, row: Expr) -> None:
        self._score(row)
        for step in self.passes:
            step.emit()
        for plane in range(self.planes):
            self._weigh(plane)
        self._output(row)

    def _staggered(self, i: Expr, tile: Expr) -> None:
        """The scores of a tile, and the result of the tile before it; in the products of the latter, the
        passes over the former.
        """
        self.new, self.old = tir.let(i % 2), tir.let(1 - i % 2)
        active = tir.let(tile < self.end)
        with tir.when(active):
            self._score(self._row(tile))

        def first() -> None:
            for step in self.passes:
                step.emit()

        def later() -> None:
            for plane in range(self.planes):
                if plane >= len(self.passes):
                    self._weigh(plane)
                    continue
                step = self.passes[plane]
                step.start()
                iterations = self.values.split.count * (self.pv_depth // self.isa.unit)
                # Two steps share their constants where sums leave registers for that.
                at_once = 1 if self.values.split.large * GROUP > 2 * LANES else 2
                self._weigh(plane, step.spread(iterations, at_once, active))
                with tir.when(active):
                    step.end()
            self._output(self._row(tile - 1))
            with tir.when(active):
                for step in self.passes[self.planes :]:
                    step.emit()

        tir.choose(i == 0, first, later)

    def _weigh(self, plane: int, side: Side | None = None) -> None:
        """Sums of values weighted with one byte of the probabilities."""
        columns, rows = self.out_columns, self.rows.large

        def sink(r: int, column: Expr, value: Expr, lanes: int, _: bool) -> None:
            tir.store(self.sums, value, (plane * rows + r) * columns + column, lanes)

        first = (self.old * self.planes + plane) * rows
        operand = Operand(self.probs, first, self.stride, self.pv_depth, self.left_source)
        self._product(operand, self.values, sink, side)

    def at(self, view: View, token: Expr, channel: Expr, lanes: int) -> Expr:
        """`lanes` channels of a token of q, k or v."""
        row = self.image * view.rows + view.row + token
        column = self.head * view.head_stride + view.column + channel
        return tir.load(self.b[f"source{view.source}"], [row, column], lanes)

    def _allocate(self) -> None:
        spec, rows, columns = self.spec, self.rows.large, self.stride
        self.query = tir.scratch(rows * self.qk_depth, self.isa.left_dtype("int8"))
        self.query_term = tir.scratch(rows, "int32")
        self.scores = tir.scratch(rows * columns, "int32")
        for r in range(rows):
            for column in range(spec.score_columns, columns, LANES):
                tir.store(self.scores, tir.constant(FAR, "int32"), r * columns + column)
        self.limit = tir.scratch(spec.score_columns, "int32")
        for column in range(0, spec.score_columns, LANES):
            most = tir.constant(2**31 - 1, "int32")
            most = tir.first_lanes(most, min(LANES, spec.tk - column), FAR)
            tir.store(self.limit, most, column)
        self.tops = [tir.scratch(self.isa.lanes, "int32") for _ in range(rows)]
        self.highest, self.factors = tir.scratch(rows, "int32"), tir.scratch(rows, "int32")
        if spec.probs.kind == "softmax":
            self.exponentials = tir.scratch(rows * columns, "uint16")
        slots = 1 + int(spec.staggered)
        self.probs = tir.scratch(slots * self.planes * rows * columns, self.isa.left_dtype("uint8"))
        self.sums = tir.scratch(self.planes * rows * self.out_columns, "int32")
        self.row_term = tir.scratch(slots * rows, "int32")
        self.row_scale = tir.scratch(slots * rows, "float32")

    def store_probs(self, planes: list[Expr], at: Expr) -> None:
        """Stores vectors of uint16 probabilities, or the bytes of them, as left operands."""
        lanes = 2 * LANES
        for plane, value in enumerate(planes):
            value = tir.cast(value, self.left_source, lanes)
            left = self.isa.convert_left(value, self.left_source, lanes)
            row = (self.new * self.planes + plane) * self.rows.large
            tir.store(self.probs, left, row * self.stride + at, lanes)

    def _score(self, row: Expr) -> None:
        """Base-2 scores of the tile, and the largest of each row."""
        self._stage_query(row)
        lanes = self.isa.lanes
        for top in self.tops:
            tir.store(top, tir.constant(FAR, "int32", lanes), 0, lanes)
        query = Operand(self.query, 0, self.qk_depth, self.qk_depth, "int8")
        self._product(query, self.keys, self._scores(row))
        for r, top in enumerate(self.tops):
            highest = tir.intrinsic("llvm.vector.reduce.smax", "int32", tir.load(top, 0, lanes))
            tir.store(self.highest, highest, r, 1)

    def _scores(self, row: Expr) -> PanelSink:
        """Sums of products become base-2 scores on their way out of the registers."""
        multiplier = {n: tir.let(tir.splat(self.score_multiplier, n)) for n in {self.isa.lanes, LANES}}

        def sink(r: int, column: Expr, value: Expr, lanes: int, last: bool) -> None:
            value = value + tir.load(self.key_correction, column, lanes)
            value = value + tir.splat(tir.load(self.query_term, r, 1), lanes)
            zero = zero_lanes(None, WIDE, lanes, self.isa.saturating_rint)
            value = requantize(value, multiplier[lanes], zero, WIDE, lanes)
            for i, (images, heads, rows) in enumerate(self.spec.additive):
                image = 0 if images == 1 else TB.floormod(self.image, images)
                where = [image, 0 if heads == 1 else self.head, 0 if rows == 1 else row + r, column]
                value = value + tir.load(self.b[f"additive{i}"], where, lanes)
            if last and self.spec.tk % GROUP:
                value = tir.minimum(value, tir.load(self.limit, column, lanes))
            value = tir.let(value)
            tir.store(self.scores, value, r * self.stride + column, lanes)
            if self.spec.probs.kind != "sigmoid":
                tir.store(self.tops[r], tir.maximum(tir.load(self.tops[r], 0, lanes), value), 0, lanes)

        return sink

    def _product(self, left: Operand, panels: Panels, sink: PanelSink, side: Side | None = None) -> None:
        """left @ panels; the columns given to `sink` and the iterations given to `side` count from the first
        panel.
        """
        panels_before = 0
        for first, count, width in panels.runs():
            with TB.serial(0, count) as panel:
                column = tir.let(first + panel * width)
                extra: list[Side] = []
                if side is not None:
                    before = tir.let((panel + panels_before) * (left.depth // self.isa.unit))
                    extra = [lambda i, before=before, side=side: side(before + i)]

                def write(
                    r: int, c: Expr, value: Expr, n: int, column: Expr = column, width: int = width
                ) -> None:
                    sink(r, column + c, value, n, not isinstance(c, int) or c + n > width - GROUP)

                self.isa.matmul(
                    self.rows.large, width, left.depth, left.load,
                    lambda offset, n, column=column: tir.load(
                        panels.buffer, column * left.depth + offset, n
                    ),
                    write, left.source, True, *extra,
                )  # fmt: skip
            panels_before += count

    def _stage_query(self, row: Expr) -> None:
        """The query rows as left operand, and ``zero_k * (d * zero_q - sum_i q[t, i])`` of each."""
        spec, depth = self.spec, self.qk_depth
        total = tir.scratch(LANES, "int32")
        with TB.serial(0, self.rows.large) as r:
            tir.store(total, tir.constant(0, "int32"), 0)
            for start, count, lanes in pieces(spec.d):
                with TB.serial(0, count) as i:
                    at = start + i * lanes
                    value = tir.let(self.at(spec.q, row + r, at, lanes))
                    tir.store(self.query, self.isa.convert_left(value, "int8", lanes), r * depth + at, lanes)
                    old = tir.load(total, 0, lanes)
                    tir.store(total, old + tir.cast(value, "int32", lanes), 0, lanes)
            for i in range(spec.d, depth):
                zero = self.isa.convert_left(tir.constant(0, "int8", 1), "int8", 1)
                tir.store(self.query, zero, r * depth + i, 1)
            q_sum = tir.intrinsic("llvm.vector.reduce.add", "int32", tir.load(total, 0))
            tir.store(self.query_term, self.zero[1] * (self.zero[0] * spec.d - q_sum), r, 1)

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

    def _output(self, row: Expr) -> None:
        """Requantizes the tile and stores it at its place in [batch * tq, heads * dv]."""
        spec, out, rows = self.spec, self.spec.out, self.rows.large
        for start, count, lanes in pieces(spec.dv):
            zero_point = tir.let(tir.splat(self.zero[3], lanes) if lanes > 1 else self.zero[3])
            zero = zero_lanes(zero_point, out, lanes, self.isa.saturating_rint)
            scale = self._lanes(self.multiplier, lanes)
            with TB.serial(0, rows) as r:
                if spec.probs.by_row:
                    scale = self._lanes(tir.load(self.row_scale, self.old * rows + r, 1), lanes)
                term = self._lanes(tir.load(self.row_term, self.old * rows + r, 1), lanes)
                for c in range(start, start + count * lanes, lanes):
                    value = self._sum(r, c, lanes) + term
                    if self.zero_correction is not None:
                        value = value + tir.load(self.zero_correction, c, lanes)
                    value = requantize(tir.let(value), scale, zero, out, lanes)
                    if out.dtype not in ("int32", "float32"):
                        value = tir.cast(value, out.dtype, lanes)
                    at = [self.image * spec.tq + row + r, self.head * spec.dv + c]
                    tir.store(self.b["out"], value, at, lanes)
