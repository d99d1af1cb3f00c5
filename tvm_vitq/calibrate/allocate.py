"""The multiple-choice knapsack: one option for every item, least loss within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm_vitq.errors import VitqError

MOST_STATES = 20_000
"""Combinations kept at a time. Layers of a Transformer have few different sizes, so their sums coincide and
there are far fewer; of more, the best one of every cell of a grid of costs is kept: within the budget, and
near the best."""


@dataclass(frozen=True)
class Option:
    """What choosing it costs and loses; costs are not negative, losses finite."""

    cost: int
    loss: float


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Which option of every item makes the sum of losses least, with the sum of costs at most `budget`.

    Exact dynamic programming over the combinations that no other one beats in cost and loss (while these are
    at most `MOST_STATES`).

    Raises
    ------
    VitqError : even the cheapest options cost more than the budget.
    """
    cheapest = [min(option.cost for option in options) for options in items]
    if sum(cheapest) > budget:
        raise VitqError(
            "the budget is too small", where="budget", got=budget, expected=f"{sum(cheapest)} or more"
        )
    needed = sum(cheapest)
    front: list[tuple[int, float]] = [(0, 0.0)]
    choices: list[list[tuple[int, int]]] = []  # per item and state: state before it, option
    for options, least in zip(items, cheapest, strict=True):
        needed -= least
        front, chosen = _extended(front, options, budget - needed)
        if len(front) > MOST_STATES:
            front, chosen = _thinned(front, chosen)
        choices.append(chosen)
    state = len(front) - 1
    picked = []
    for chosen in reversed(choices):
        state, option = chosen[state]
        picked.append(option)
    return picked[::-1]


def _extended(
    front: list[tuple[int, float]], options: Sequence[Option], budget: int
) -> tuple[list[tuple[int, float]], list[tuple[int, int]]]:
    """The front with one more item: states by ascending cost and descending loss, and how each was made."""
    made = sorted(
        (cost + option.cost, loss + option.loss, state, number)
        for state, (cost, loss) in enumerate(front)
        for number, option in enumerate(options)
        if cost + option.cost <= budget
    )
    states: list[tuple[int, float]] = []
    chosen: list[tuple[int, int]] = []
    for cost, loss, state, number in made:
        if not states or loss < states[-1][1]:
            states.append((cost, loss))
            chosen.append((state, number))
    return states, chosen


def _thinned(
    front: list[tuple[int, float]], chosen: list[tuple[int, int]]
) -> tuple[list[tuple[int, float]], list[tuple[int, int]]]:
    """The best state of every cell of costs, and the cheapest of all."""
    first = front[0][0]
    cell = (front[-1][0] - first) // MOST_STATES + 1
    best = {(cost - first) // cell: number for number, (cost, _) in enumerate(front)}
    numbers = sorted({0, *best.values()})
    return [front[n] for n in numbers], [chosen[n] for n in numbers]
