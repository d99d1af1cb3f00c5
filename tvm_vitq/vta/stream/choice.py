"""What can be done in several ways, with the same results: tuning finds the one of fewest cycles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

Schedule = Mapping[str, Any]
"""One of the ways, as records have it: plain data."""


class Choice(Protocol):
    """Something with a schedule.

    name : for messages.
    signature : equal where the same schedule is the best.
    schedule : the one that it has.
    """

    name: str

    @property
    def signature(self) -> str: ...

    @property
    def schedule(self) -> Schedule: ...

    def options(self, best: Schedule) -> Iterator[Schedule]:
        """Schedules to try next to the best one so far, the most promising first."""

    def accepts(self, schedule: Schedule) -> bool:
        """Whether it is one for this."""

    def cycles(self, schedule: Schedule) -> int:
        """By the cycle model."""


Choose = Callable[[Choice], Schedule | None]
"""Gives a schedule, or leaves it to the estimate."""
