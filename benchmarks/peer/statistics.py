"""From the rounds of all engines to one figure each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

QUIET = 0.02
"""Share of the time without a core below which the machine counts as ours alone."""


@dataclass(frozen=True)
class Spread:
    """Median with the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, median, high = np.percentile(np.asarray(values, np.float64), [10, 50, 90])
        return cls(float(median), float(low), float(high))


def per_round(slices: Sequence[dict[str, Any]], clock: str) -> list[float]:
    """Milliseconds, the median of each round; `clock`: "wall" or "cpu"."""
    return [1e3 * float(np.median(part[clock])) for part in slices]


def waiting_share(rounds: dict[str, list[dict[str, Any]]]) -> float | None:
    """Share of the timed seconds in which threads of an engine had no core to run on; None if not known."""
    parts = [part for slices in rounds.values() for part in slices]
    if not parts or any(part["waited"] is None for part in parts):
        return None
    return sum(part["waited"] for part in parts) / sum(sum(part["wall"]) for part in parts)


def ratios(slices: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], clock: str) -> Spread:
    """Time of an engine over time of the base, round by round: drift of the machine's speed cancels."""
    pairs = zip(per_round(slices, clock), per_round(base, clock), strict=True)
    return Spread.of([value / other for value, other in pairs])
