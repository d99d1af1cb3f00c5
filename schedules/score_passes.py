"""Passes over the scores of a tile of the attention kernel, by themselves or inside another loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm

from tvm_vitq.schedules import tir
from tvm_vitq.schedules.isa import Side
from tvm_vitq.schedules.tir import LANES, TB, Expr

if TYPE_CHECKING:
    from tvm_vitq.schedules.attention_body import AttentionBody

WIDTH = 2 * LANES
"""Scores of a step: as halfwords, in which most is computed, they are one vector."""


class Pass:
    """One way through the scores of a tile: a step for each WIDTH of them, in any order, and the end of each
    row after all steps. Steps of a row share `totals`, vectors of sums in memory.
    """

    totals: tuple[str, ...] = ()
    """Types of the sums."""

    def __init__(self, body: AttentionBody) -> None:
        self.body, self.probs = body, body.spec.probs
        self.row_steps = body.stride // WIDTH
        self.steps = body.rows.large * self.row_steps
        self.sums = [tir.scratch(body.rows.large * self._lanes(t), t) for t in self.totals]

    def start(self) -> None:
        """Clears the sums."""
        for total, dtype in zip(self.sums, self.totals, strict=True):
            lanes = self._lanes(dtype)
            with TB.serial(0, self.body.rows.large) as r:
                tir.store(total, tir.constant(0, dtype, lanes), r * lanes, lanes)

    def emit(self) -> None:
        """The whole pass."""
        self.start()
        with TB.serial(0, self.body.rows.large) as r, TB.serial(0, self.row_steps) as i:
            self.step(r, tir.let(r * self.body.stride + i * WIDTH))
        self.end()

    def spread(self, iterations: int, at_once: int, active: Expr) -> Side:
        """Statements for each of so many iterations of another loop, which together are all steps if `active`
        and nothing if not: evenly spread, for there is as much time between them as the other loop leaves.
        """
        at_once = max(at_once, tir.ceildiv(self.steps, iterations))
        turns = tir.ceildiv(self.steps, at_once)

        def side(iteration: Expr) -> None:
            at = tir.let(iteration * turns)
            with tir.when(tvm.tirx.all(at % iterations < turns, active)):
                first = tir.let(at // iterations * at_once)
                for j in range(at_once):
                    # Only the last turn may have fewer steps.
                    with tir.when(True if self.steps % at_once == 0 else first + j < self.steps):
                        r = tir.let((first + j) // self.row_steps)
                        self.step(r, tir.let(r * self.body.stride + (first + j - r * self.row_steps) * WIDTH))

        return side

    def end(self) -> None:
        """The ends of all rows."""
        with TB.serial(0, self.body.rows.large) as r:
            self.end_row(r)

    def step(self, r: Expr, at: Expr) -> None:
        """The scores from `at` on, which are some of row r."""
        raise NotImplementedError

    def end_row(self, r: Expr) -> None:
        """What follows from the sums of a row."""
        raise NotImplementedError

    @staticmethod
    def _lanes(dtype: str) -> int:
        return WIDTH if dtype == "uint16" else LANES

    def add(self, i: int, r: Expr, value: Expr) -> None:
        """Adds a vector to sum i of a row."""
        lanes = self._lanes(self.totals[i])
        tir.store(self.sums[i], tir.load(self.sums[i], r * lanes, lanes) + value, r * lanes, lanes)

    def total(self, i: int, r: Expr, dtype: str = "int32") -> Expr:
        """Sum i of a row."""
        lanes = self._lanes(self.totals[i])
        return tir.let(tir.add_lanes(tir.cast(tir.load(self.sums[i], r * lanes, lanes), dtype, lanes), dtype))

    def distances(self, r: Expr, at: Expr, shift: Expr | int = 0) -> list[Expr]:
        """``max(t) - t + shift`` of WIDTH scores, as two vectors."""
        top = tir.let(tir.splat(tir.load(self.body.highest, r, 1) + shift))
        return [tir.let(top - tir.load(self.body.scores, at + half)) for half in (0, LANES)]

    def finish_row(self, r: Expr, p_sum: Expr) -> None:
        """The terms of the output that hang on the sum of a row's probabilities."""
        body = self.body
        at = body.new * body.rows.large + r
        tir.store(body.row_term, tir.constant(0, "int32", 1) - body.zero[2] * p_sum, at, 1)
        if self.probs.by_row:
            tir.store(body.row_scale, body.multiplier / tir.cast(p_sum, "float32", 1), at, 1)
