"""Attention on codes as one kernel: q·kT, base-2 scores, softmax or sigmoid to 8 bits, ·v, conversion.

One task is a head (of one image or window), or some of its rows. K and V of the head are packed once for the
register tile; then a few query rows at a time pass through all steps, so that scores and probabilities never
leave the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Output
from tvm_vitq.numerics_attention import SIGMOID_BITS, Probabilities
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.attention_body import AttentionBody
from tvm_vitq.schedules.codebook import Form
from tvm_vitq.schedules.isa import Isa, Tile, isa
from tvm_vitq.schedules.kernel import Argument, Kernel, Split, kernel_name
from tvm_vitq.schedules.packing import GROUP
from tvm_vitq.schedules.tir import LANES

Array = npt.NDArray

TASKS = 6
"""Heads are cut into blocks of rows when there are fewer tasks than this, where the schedule does not say."""


@dataclass(frozen=True)
class View:
    """Where q, k or v lie.

    Element (b, h, t, i) is ``sources[source][b * rows + row + t, column + h * head_stride + i]``.
    """

    source: int
    column: int
    head_stride: int
    rows: int
    row: int = 0


@dataclass(frozen=True)
class Attention:
    """numerics_attention.int_attention on q, k, v that are views of row-major matrices.

    isa : name of the instruction set.
    batch, heads, tq, tk, d, dv : q is [batch, heads, tq, d], k [.., tk, d], v [.., tk, dv].
    sources : shapes of the int8 matrices that q, k and v point into.
    additive : leading three sizes of each additive term ``[nb, nh, tq or 1, tk]``; nb divides batch and image
        b takes
        term ``b % nb`` (windows of one image follow each other); nh is 1 or heads.
    probs : quantizer of probabilities; its tables, if any, are arguments and not part of the kernel.
    tile : register tile and query rows of a task; None takes the instruction set's default.

    Arguments of the kernel: the sources, score_multiplier, multiplier, zeros (of q, k, v, out and the
    probabilities), [tables of probs], the additive terms, out. `pack` returns those from score_multiplier to
    the additive terms. out : [batch * tq, heads * dv].
    """

    isa: str
    batch: int
    heads: int
    tq: int
    tk: int
    d: int
    dv: int
    sources: tuple[tuple[int, int], ...]
    q: View
    k: View
    v: View
    probs: Probabilities
    out: Output
    additive: tuple[tuple[int, int, int], ...] = ()
    tile: Tile | None = None

    @property
    def target(self) -> Isa:
        return isa(self.isa)

    @property
    def staggered(self) -> bool:
        """Whether the passes over the scores of a tile run inside the product of the tile before it: where
        the loop has issue slots left, and a register holds as many lanes as a step of them takes.
        """
        return self.target.has_side and self.target.lanes == LANES

    @property
    def tiles(self) -> Tile:
        """The tile sizes in force. The passes in the loop need registers, those of one row of sums."""
        if self.tile is None and self.staggered:
            return replace(self.target.tile, rows=self.target.tile.rows - 1)
        return self.tile or self._own_tile or self.target.tile

    @property
    def _own_tile(self) -> Tile | None:
        """`Isa.attention_tile`, unless its last one overlaps others too much: a row takes as long twice."""
        tile = self.target.attention_tile
        if tile is None:
            return None
        rows = Split.of(self.tq, tile.rows)
        return tile if rows.count * rows.large - self.tq <= self.tq // 16 else None

    @property
    def score_columns(self) -> int:
        """Columns of the score tile."""
        return packing.padded(self.tk, GROUP)

    @property
    def block_rows(self) -> int:
        """Query rows of a task, which takes whole tiles. Each task packs K and V of its head."""
        return self.tiles.block_rows or tir.ceildiv(self.tq, tir.ceildiv(TASKS, self.batch * self.heads))

    @property
    def book(self) -> Form | None:
        """The form of a codebook."""
        return Form.of(self.probs, self.target.permute is not None) if self.probs.kind == "codebook" else None

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        p = self.probs
        kind = p.kind.replace("_", "") + str(p.qmax)
        kind += f"n{p.numerator}s{p.shift}g{p.guard}" if p.kind == "softmax" else ""
        if self.book is not None:
            kind = f"codebook{p.planes}{self.book.name}" + ("row" if p.relative else f"g{p.guard}")
            kind += "z" if p.zero else ""
        views = [f"{v.source}c{v.column}h{v.head_stride}r{v.rows}o{v.row}" for v in (self.q, self.k, self.v)]
        sources = [f"{rows}x{columns}" for rows, columns in self.sources]
        additive = ["a" + "x".join(str(n) for n in shape) for shape in self.additive]
        clip = f"{self.out.qmin}to{self.out.qmax}".replace("-", "m")
        tile = "" if self.tile is None else self.tile.name
        epilogue = [kind] + (["shift"] if self.out.kind == "shift" else [])
        shape = (self.batch, self.heads, self.tq, self.tk, self.d, self.dv)
        extra = [*sources, *views, *additive, clip, tile]
        return kernel_name("attention", self.out.dtype, ["int8", "int8", "int8"], epilogue, shape, *extra)

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        result = [Argument(f"source{i}", shape, "int8", "input") for i, shape in enumerate(self.sources)]
        result.append(Argument("score_multiplier", (self.heads,), "float32", "constant"))
        result.append(Argument("multiplier", (self.heads,), packing.multiplier_dtype(self.out), "constant"))
        result.append(Argument("zeros", (5, self.heads), "int32", "constant"))
        if self.probs.kind == "sigmoid":
            result.append(Argument("table", (2**SIGMOID_BITS,), "uint8", "constant"))
        if self.book is not None:
            result += self.book.arguments()
        for i, term in enumerate(self.additive):
            result.append(Argument(f"additive{i}", (*term, self.score_columns), "int32", "constant"))
        out = (self.batch * self.tq, self.heads * self.dv)
        return (*result, Argument("out", out, self.out.dtype, "output"))

    def __post_init__(self) -> None:
        p = self.probs
        if p.kind == "softmax" and (p.shift < 17 or p.numerator + (1 << (p.shift - 1)) >= 2**31):
            raise VitqError(
                "step of the softmax quantizer out of range",
                got=f"numerator {p.numerator}, shift {p.shift}",
                expected="17 <= shift, numerator + half < 2**31",
            )

    def pack(
        self,
        score_multiplier: Array,
        multiplier: Array,
        zero_q: Array,
        zero_k: Array,
        zero_v: Array,
        zero_point: Array | int = 0,
        additive: tuple[Array, ...] = (),
    ) -> list[Array]:
        """The constants of int_attention as arguments; scalars are repeated for all heads."""
        zeros = np.empty((5, self.heads), np.int32)
        for row, value in zip(zeros, (zero_q, zero_k, zero_v, zero_point, self.probs.zero), strict=True):
            row[:] = value
        per_head = packing.pack_multiplier(multiplier, self.heads, self.out)[: self.heads]
        arrays = [np.full(self.heads, score_multiplier, np.float32), per_head, zeros]
        if self.probs.table is not None:
            arrays.append(np.asarray(self.probs.table, np.uint8))
        if self.book is not None:
            arrays += self.book.pack(self.probs)
        for term, shape in zip(additive, self.additive, strict=True):
            padded = np.zeros((*shape, self.score_columns), np.int32)
            padded[..., : self.tk] = term
            arrays.append(padded)
        return arrays

    def kernel(self) -> Kernel:
        """Generates the function."""
        arguments = self.arguments()

        def emit() -> None:
            buffers = {a.name: tir.argument(a.name, a.shape, a.dtype) for a in arguments}
            AttentionBody(self, buffers).emit()

        macs = self.batch * self.heads * self.tq * self.tk * (self.d + self.dv)
        return Kernel(self.name, tir.prim_func(self.name, emit), arguments, macs)
