"""Quantizers of probabilities that are codebooks: their form as kernel arguments, and the lookup of p.

Distances y and edges are kept as int16, less 2**15, for which every instruction set has comparisons. There
are four forms, for vectors of 2 * LANES distances:

chain: all edges are compared, ``p = values[0] + sum_i (y < edges[i] ? values[i + 1] - values[i] : 0)``; two
    or three instructions each for as many lanes as a register has.
blocks: where an instruction picks lanes by variable positions, and no more than one edge lies inside any of
    32 blocks of distances: y picks its edge, and p above and below it.
lines: where an instruction picks lanes, see codebook_lines.py: y picks the line of its piece, the line a
    guess, the guess an edge to compare with, and the code p.
buckets: y reads how many edges lie above the 2**BUCKET_BITS distances around it, one lane after the other,
    and is compared with those that may lie among these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics_attention import DISTANCE_MAX, Probabilities
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.codebook_lines import FRACTION, lines
from tvm_vitq.schedules.isa import Permute
from tvm_vitq.schedules.kernel import Argument
from tvm_vitq.schedules.tir import LANES, TB, Expr

Array = npt.NDArray

CHAIN = 32
"""Most edges that are all compared."""

UNROLLED = 4
"""Chains have multiples of this length, so that books of nearly the same length share a kernel."""

BUCKET_BITS = 4
"""log2 of the number of distances in a bucket."""

LAST = np.arange(2**BUCKET_BITS - 1, DISTANCE_MAX + 1, 2**BUCKET_BITS)
"""The last distance of each bucket."""

MOST = 256 + 2**BUCKET_BITS
"""Room for the edges of 8 bits with a zero beside them, and for comparisons behind the last edge."""

BLOCK = 2**16 // (2 * LANES)
"""Distances in a block."""

HALF = 2**15


@dataclass(frozen=True)
class Form:
    """Of a kernel's lookup: a `kind` and the number of comparisons for each distance.

    blocks, pieces, entries : of "lines", the lengths of its tables.
    """

    kind: str
    comparisons: int
    blocks: int = 0
    pieces: int = 0
    entries: int = 0

    @property
    def cut(self) -> bool:
        """Whether there are pieces of blocks."""
        return self.pieces > self.blocks

    @staticmethod
    def of(probs: Probabilities, permutes: bool) -> Form:
        """The form of a codebook for an instruction set that does or does not permute."""
        assert probs.edges is not None  # by construction in realize
        inside = probs.edges[probs.edges % BLOCK > 0] // BLOCK
        if permutes and len(np.unique(inside)) == len(inside):
            return Form("blocks", 1)
        if permutes and (found := lines(probs.edges)) is not None:
            entries = max(2 * LANES, 1 << len(probs.edges).bit_length())
            blocks = len(found.base) if found.first is None else len(found.first)
            return Form("lines", 1, blocks, len(found.base), entries)
        if len(probs.edges) <= CHAIN:
            return Form("chain", packing.padded(len(probs.edges), UNROLLED))
        return Form("buckets", int(np.bincount(probs.edges - 1 >> BUCKET_BITS).max()))

    @property
    def name(self) -> str:
        tables = f"x{self.blocks}x{self.pieces}x{self.entries}" if self.kind == "lines" else ""
        return f"{self.kind}{self.comparisons}{tables}"

    def arguments(self) -> list[Argument]:
        """The arrays of `pack`."""
        lengths = {
            "chain": {"edges": self.comparisons, "values": self.comparisons + 1},
            "blocks": {"edges": LANES * 2, "values": LANES * 4},
            "lines": {
                "edges": self.entries,
                "values": self.entries,
                "base": self.pieces,
                "slope": self.pieces,
            },
            "buckets": {"edges": MOST, "values": MOST, "buckets": len(LAST)},
        }[self.kind]
        if self.cut:
            lengths |= {"origin": 1, "first": self.blocks, "cuts": self.blocks}
        return [
            Argument(name, (size,), "int16" if name in ("edges", "origin") else "uint16", "constant")
            for name, size in lengths.items()
        ]

    def pack(self, probs: Probabilities) -> list[Array]:
        """chain: edges, and values[0] with the differences. blocks: edge of each block, p not below and below
        it; blocks in the order of the upper bits of int16 distances. buckets: edges, values, and the code
        of the last distance of each bucket. lines: edges, values and those of codebook_lines.Lines,
        blocks of whole distances in the same order.
        """
        assert probs.edges is not None and probs.values is not None  # by construction in realize
        edges, *rest = (np.zeros(a.shape, a.dtype) for a in self.arguments())
        edges[:] = -HALF
        if self.kind == "blocks":
            first = np.roll(np.arange(0, DISTANCE_MAX, BLOCK), LANES)
            inside = probs.edges[probs.edges % BLOCK > 0]
            edges[(inside // BLOCK + LANES) % (2 * LANES)] = inside - HALF
            codes = above(probs.edges, np.concatenate([first + BLOCK - 1, first]))
            rest[0][:] = probs.values[codes]
            return [edges, *rest]
        edges[: len(probs.edges)] = probs.edges - HALF
        if self.kind == "chain":
            rest[0][: len(probs.values)] = np.diff(probs.values.astype(np.int32), prepend=0)
            return [edges, *rest]
        rest[0][: len(probs.values)] = probs.values
        if self.kind == "buckets":
            rest[1][:] = above(probs.edges, LAST)
        else:
            found = lines(probs.edges)
            assert found is not None  # by `of`
            tables = [found.base, found.slope]
            if self.cut:
                tables += [np.array([found.origin - HALF]), found.first, found.cuts]
            else:
                tables = [np.roll(a, self.blocks // 2) for a in tables]
            for given, table in zip(rest[1:], tables, strict=True):
                given[:] = table
        return [edges, *rest]


class Lookup:
    """Emits ``p = values[number of edges above y]`` for vectors of 2 * LANES distances."""

    def __init__(self, form: Form, buffers: dict[str, Expr], permute: Permute | None) -> None:
        self.form, self.b, self.permute, self.lanes = form, buffers, permute, 2 * LANES
        emit = {
            "chain": self._chain,
            "blocks": self._blocks,
            "lines": self._lines,
            "buckets": self._buckets,
        }
        self.emit: Callable[[Expr], Expr] = emit[form.kind]
        if form.kind == "chain":
            self.edges = [self._splat("edges", i) for i in range(form.comparisons)]
            self.steps = [self._splat("values", i) for i in range(form.comparisons + 1)]
        elif form.kind == "blocks":
            parts = (("edges", 0), ("values", 0), ("values", self.lanes))
            self.tables = [tir.let(tir.load(buffers[name], at, self.lanes)) for name, at in parts]
        elif form.cut:
            self.origin = self._splat("origin", 0)
        elif form.kind == "buckets":
            self.distances, self.found = (tir.scratch(self.lanes, t) for t in ("int16", "uint16"))

    def __call__(self, y: Expr) -> Expr:
        """uint16 p of int16 distances."""
        return self.emit(tir.let(y))

    def farthest(self) -> Expr:
        """p of DISTANCE_MAX."""
        return tir.load(self.b["values"], LANES - 1 if self.form.kind == "blocks" else 0, 1)

    def _splat(self, name: str, i: int) -> Expr:
        return tir.let(tir.splat(tir.load(self.b[name], i, 1), self.lanes))

    def _chain(self, y: Expr) -> Expr:
        zero = tir.constant(0, "uint16", self.lanes)
        p = self.steps[0]
        for edge, step in zip(self.edges, self.steps[1:], strict=True):
            p = tir.let(p + tir.select(y < edge, step, zero))
        return p

    def _blocks(self, y: Expr) -> Expr:
        block = tir.let(y >> tir.constant(BLOCK.bit_length() - 1, "int16", self.lanes))
        types = (f"{t}x{self.lanes}" for t in ("int16", "uint16", "uint16"))
        edge, far, near = (
            self.permute(t, [table], block) for t, table in zip(types, self.tables, strict=True)
        )
        return tir.select(y < edge, near, far)

    def _lines(self, y: Expr) -> Expr:
        bits = 16 - (self.form.blocks.bit_length() - 1)
        unsigned = self._type("uint16")
        if self.form.cut:
            at = tir.let(tir.reinterpret(tir.maximum(y, self.origin) - self.origin, unsigned))
        else:
            at = tir.reinterpret(y, unsigned)
        piece = tir.let(at >> tir.constant(bits, "uint16", self.lanes))
        f = at << tir.constant(16 - bits, "uint16", self.lanes)
        if self.form.cut:
            f, cuts, first = tir.let(f), self._entry("cuts", piece), self._entry("first", piece)
            piece = tir.let(first + tir.multiply_high(f, cuts, self.lanes))
            f = tir.let(f * cuts)
        base, slope = (self._entry(name, piece) for name in ("base", "slope"))
        fall = tir.multiply_high(tir.let(f), slope, self.lanes)
        code = tir.let((base - fall) >> tir.constant(FRACTION, "uint16", self.lanes))
        zero, one = (tir.constant(c, "uint16", self.lanes) for c in (0, 1))
        code = tir.let(code + tir.select(y < self._entry("edges", code), one, zero))
        return self._entry("values", code)

    def _entry(self, name: str, index: Expr) -> Expr:
        """The entries of a table at the low bits of `index`: those of pieces that one instruction reads, then
        one of them by each further bit.
        """
        buffer, at_once = self.b[name], 2 * self.lanes
        dtype, size = self._type(str(buffer.dtype)), int(buffer.shape[0])
        found = []
        for start in range(0, size, at_once):
            parts = range(start, min(start + at_once, size), self.lanes)
            found.append(self.permute(dtype, [tir.load(buffer, at, self.lanes) for at in parts], index))
        bit = at_once
        while len(found) > 1:
            some = index & tir.constant(bit, "uint16", self.lanes)
            upper = tir.let(some) > tir.constant(0, "uint16", self.lanes)
            found = [
                self._opaque(tir.select(upper, b, a), dtype)
                for a, b in zip(found[::2], found[1::2], strict=True)
            ]
            bit *= 2
        return self._opaque(found[0], dtype)

    def _opaque(self, value: Expr, dtype: str) -> Expr:
        """`value` through memory, from where LLVM takes it into a register again: TVM's simplifier needs time
        that is exponential in the number of comparisons that an expression nests.
        """
        element, _, lanes = dtype.partition("x")
        memory = tir.scratch(int(lanes or 1), element)
        tir.store(memory, value, 0, int(lanes or 1))
        return tir.let(tir.load(memory, 0, int(lanes or 1)))

    def _type(self, dtype: str) -> str:
        return f"{dtype}x{self.lanes}"

    def _buckets(self, y: Expr) -> Expr:
        tir.store(self.distances, y, 0, self.lanes)
        with TB.serial(0, self.lanes) as i:
            one = tir.let(tir.cast(tir.load(self.distances, i, 1), "int32", 1))
            bucket = (one + HALF) >> tir.constant(BUCKET_BITS, "int32", 1)
            code = tir.let(tir.cast(tir.load(self.b["buckets"], bucket, 1), "int32", 1))
            for _ in range(self.form.comparisons):
                edge = tir.cast(tir.load(self.b["edges"], code, 1), "int32", 1)
                code = self._opaque(code + tir.cast(one < edge, "int32", 1), "int32")
            tir.store(self.found, tir.load(self.b["values"], code, 1), i, 1)
        return tir.load(self.found, 0, self.lanes)


def above(edges: Array, y: Array) -> Array:
    """Number of descending edges above each y."""
    return len(edges) - np.searchsorted(edges[::-1], y, side="right")
