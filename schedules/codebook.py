"""Quantizers of probabilities that are codebooks: their form as kernel arguments, and the lookup of p.

Distances y and edges are kept as int16, less 2**15, for which every instruction set has comparisons. Up to
CHAIN edges, all are compared: ``p = values[0] + sum_i (y < edges[i] ? values[i + 1] - values[i] : 0)``, two
or three instructions each for as many lanes as a register has. With more edges, each y reads how many of them
lie above the 2**BUCKET_BITS distances around it, and is compared with those that may lie among these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics_attention import DISTANCE_MAX, Probabilities
from tvm_vitq.schedules import packing, tir
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

HALF = 2**15


@dataclass(frozen=True)
class Form:
    """How a kernel looks p up: a chain of `edges` comparisons, or (0) a bucket and `probes` comparisons."""

    edges: int
    probes: int = 0

    @staticmethod
    def of(probs: Probabilities) -> Form:
        """The form of a codebook."""
        assert probs.edges is not None  # by construction in realize
        if len(probs.edges) <= CHAIN:
            return Form(packing.padded(len(probs.edges), UNROLLED))
        return Form(0, int(np.bincount(probs.edges - 1 >> BUCKET_BITS).max()))

    @property
    def name(self) -> str:
        return f"chain{self.edges}" if self.edges else f"buckets{self.probes}"

    @property
    def room(self) -> int:
        """Length of the array of edges."""
        return self.edges or MOST

    def arguments(self) -> list[Argument]:
        """Edges, and values[0] with the differences; or least code of each bucket, edges, values."""
        sizes = {"edges": (self.room, "int16"), "values": (self.room + 1, "uint16")}
        if not self.edges:
            sizes = {"buckets": (len(LAST), "uint16"), **sizes}
        return [Argument(name, (size,), dtype, "constant") for name, (size, dtype) in sizes.items()]

    def pack(self, probs: Probabilities) -> list[Array]:
        """The arrays of `arguments`."""
        assert probs.edges is not None and probs.values is not None  # by construction in realize
        edges, values = np.full(self.room, -HALF, np.int16), np.zeros(self.room + 1, np.uint16)
        edges[: len(probs.edges)] = probs.edges - HALF
        if self.edges:
            values[: len(probs.values)] = np.diff(probs.values.astype(np.int32), prepend=0)
            return [edges, values]
        values[: len(probs.values)] = probs.values
        above = len(probs.edges) - np.searchsorted(probs.edges[::-1], LAST, side="right")
        return [above.astype(np.uint16), edges, values]


class Lookup:
    """Emits ``p = values[number of edges above y]`` for vectors of 2 * LANES distances."""

    def __init__(self, form: Form, buffers: dict[str, Expr]) -> None:
        self.form, self.b, self.lanes = form, buffers, 2 * LANES
        if form.edges:
            self.edges = [self._splat("edges", i) for i in range(form.edges)]
            self.steps = [self._splat("values", i) for i in range(form.edges + 1)]
        else:
            self.codes = tir.scratch(self.lanes, "int16")
            self.found = tir.scratch(self.lanes, "uint16")

    def _splat(self, name: str, i: int) -> Expr:
        return tir.let(tir.splat(tir.load(self.b[name], i, 1), self.lanes))

    def __call__(self, y: Expr) -> Expr:
        """uint16 p of int16 distances."""
        return self._chain(tir.let(y)) if self.form.edges else self._bucket(y)

    def _chain(self, y: Expr) -> Expr:
        zero = tir.constant(0, "uint16", self.lanes)
        p = self.steps[0]
        for edge, step in zip(self.edges, self.steps[1:], strict=True):
            p = tir.let(p + tir.select(y < edge, step, zero))
        return p

    def _bucket(self, y: Expr) -> Expr:
        tir.store(self.codes, y, 0, self.lanes)
        with TB.serial(0, self.lanes) as i:
            one = tir.let(tir.cast(tir.load(self.codes, i, 1), "int32", 1))
            bucket = (one + HALF) >> tir.constant(BUCKET_BITS, "int32", 1)
            code = tir.let(tir.cast(tir.load(self.b["buckets"], bucket, 1), "int32", 1))
            for _ in range(self.form.probes):
                edge = tir.cast(tir.load(self.b["edges"], code, 1), "int32", 1)
                code = tir.let(code + tir.cast(one < edge, "int32", 1))
            tir.store(self.found, tir.load(self.b["values"], code, 1), i, 1)
        return tir.load(self.found, 0, self.lanes)
