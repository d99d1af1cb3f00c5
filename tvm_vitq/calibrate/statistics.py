"""Statistics of tensors in bounded memory: exact tails, a random sample of the rest, and from them range
searches.

A `Summary` keeps, for each set of elements that will share a scale (a *row*), its largest and smallest
values exactly and a uniform sample of all. That makes high quantiles and clipping errors exact, where they
decide, and rounding errors of the bulk accurate to a percent, in a few hundred kilobytes per site instead of
gigabytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tvm_vitq.errors import VitqError


@dataclass
class Summary:
    """Rows of values, P of them with `count` values each.

    low, high : [P, m], the m smallest values ascending and the m largest descending.
    sample : [P, S], values drawn from the whole row.
    """

    count: int
    low: Tensor
    high: Tensor
    sample: Tensor

    @property
    def minimum(self) -> Tensor:
        return self.low[:, 0]

    @property
    def maximum(self) -> Tensor:
        return self.high[:, 0]

    @classmethod
    def of(cls, rows: Tensor) -> Summary:
        """Summary of rows that are at hand as a whole (weights); everything is exact."""
        return cls(rows.shape[1], rows.amin(1, True), rows.amax(1, True), rows)

    def quantiles(self, p: float) -> tuple[Tensor, Tensor]:
        """The (1 - p) and p quantile of every row, linear between order statistics, as in NumPy's default.

        Needs ``(1 - p) * count`` values in the tails, unless the sample is the whole row.
        """
        low, high = self.low, self.high
        if self.sample.shape[1] == self.count:
            low = self.sample.sort(1).values
            high = low.flip(1)
        position = (self.count - 1) * (1.0 - p)
        first = math.floor(position)
        if first >= low.shape[1]:
            raise VitqError("quantile beyond the kept tails", where="Summary.quantiles", got=p)
        second = min(first + 1, low.shape[1] - 1)
        weight = position - first

        def between(tail: Tensor) -> Tensor:
            return torch.lerp(tail[:, first], tail[:, second], weight)

        return between(low), between(high)

    def weighted(self) -> tuple[Tensor, Tensor]:
        """Values and weights [P, n] whose sums are those of the whole rows."""
        if self.sample.shape[1] == self.count:
            return self.sample, torch.ones_like(self.sample)
        bulk = (self.sample >= self.low[:, -1:]) & (self.sample <= self.high[:, -1:])
        rest = max(self.count - 2 * self.low.shape[1], 0)
        weight = bulk * (rest / bulk.sum(1, keepdim=True).clamp(min=1))
        tails = torch.cat([self.low, self.high], 1)
        weights = torch.cat([torch.ones_like(tails), weight.to(tails.dtype)], 1)
        return torch.cat([tails, self.sample], 1), weights

    def squared_error(self, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
        """Mean squared error of uniform quantization of every row with scale, zero : [P], as [P]."""
        size = self.low.shape[1]

        def errors(x: Tensor) -> Tensor:
            codes = (x / scale[:, None]).round_().add_(zero[:, None]).clamp_(qmin, qmax)
            return codes.sub_(zero[:, None]).mul_(scale[:, None]).sub_(x).square_()

        if self.sample.shape[1] == self.count:
            return errors(self.sample).mean(1)
        bulk = (self.sample >= self.low[:, -1:]) & (self.sample <= self.high[:, -1:])
        inner = (errors(self.sample) * bulk).sum(1) / bulk.sum(1).clamp(min=1)
        tails = errors(self.low).sum(1) + errors(self.high).sum(1)
        return (tails + inner * max(self.count - 2 * size, 0)) / self.count


class Collector:
    """Builds a Summary from parts of a row-wise tensor of known total size.

    Parameters
    ----------
    count : values per row that will come.
    tail : share of them to keep exactly at each end; at least the extreme value is kept.
    sample : values per row to draw.
    """

    def __init__(self, count: int, tail: float, sample: int, generator: torch.Generator) -> None:
        self.count = count
        self.size = min(count, math.ceil(count * tail) + 2 if tail else 1)
        self.wanted = min(sample, count)
        self.generator = generator
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take the next [P, n] values."""
        self.high = self._merge(self.high, rows, True)
        self.low = self._merge(self.low, rows, False)
        drawn = max(1, math.ceil(self.wanted * rows.shape[1] / self.count))
        if drawn >= rows.shape[1]:
            self.parts.append(rows.clone())
            return
        index = torch.randint(rows.shape[1], (drawn,), generator=self.generator)
        self.parts.append(rows[:, index])

    def _merge(self, kept: Tensor | None, rows: Tensor, largest: bool) -> Tensor:
        if self.size == 1:
            extreme = (rows.amax(1, True) if largest else rows.amin(1, True)).clone()
            return extreme if kept is None else (torch.maximum if largest else torch.minimum)(kept, extreme)
        if kept is not None:
            if len(rows) == 1 and kept.shape[1] == self.size:
                # most values are no news: drop them before sorting
                rows = rows[rows > kept[0, -1]] if largest else rows[rows < kept[0, -1]]
                rows = rows[None]
            rows = torch.cat([kept, rows], 1)
        return rows.topk(min(self.size, rows.shape[1]), 1, largest=largest).values

    def summary(self) -> Summary:
        assert self.low is not None and self.high is not None  # add() was called
        return Summary(self.count, self.low, self.high, torch.cat(self.parts, 1))


def rows_of(x: Tensor, granularity: str, axis: int | None, group_size: int | None = None) -> Tensor:
    """A tensor as [P, n]: one row for each set of elements that shares a scale, in the order of a plan's
    lists.
    """
    if granularity == "group":
        assert group_size is not None  # checked by SiteSpec
        groups = x.unflatten(-1, (-1, group_size))
        if axis is None:
            return groups.movedim(-2, 0).flatten(1)
        return groups.movedim((axis, -2), (0, 1)).flatten(0, 1).flatten(1)
    if granularity == "tensor":
        return x.reshape(1, -1)
    assert axis is not None  # checked by SiteQuantizer
    return x.movedim(axis, 0).flatten(1)
