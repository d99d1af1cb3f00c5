"""Chains of reshape and permute as one permutation of atoms, so that any chain has one short normal form.

Every axis is a product of atoms, outermost first. A reshape splits atoms and regroups them, a permute
reorders groups; afterwards atoms that are neighbours before and after belong together again. Axes of size
one have no atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod


@dataclass(frozen=True)
class Step:
    """One remaining operation: a reshape to `values`, or a permute by `values`."""

    kind: str
    values: tuple[int, ...]


class AxisMap:
    """How the axes of a result are made of the axes of a source tensor."""

    def __init__(self, shape: list[int]) -> None:
        self.source_shape = list(shape)
        self.shape = list(shape)
        self._sizes: list[int] = []
        self._source = [[self._atom(s)] if s != 1 else [] for s in shape]
        self._current = [list(group) for group in self._source]

    def _atom(self, size: int) -> int:
        self._sizes.append(size)
        return len(self._sizes) - 1

    def permute(self, axes: list[int]) -> None:
        self._current = [self._current[a] for a in axes]
        self.shape = [self.shape[a] for a in axes]

    def reshape(self, shape: list[int]) -> bool:
        """Regroup as `shape`; False, with the map unusable, where the sizes do not refine each other."""
        queue = [atom for group in self._current for atom in group]
        groups: list[list[int]] = []
        for size in shape:
            group: list[int] = []
            while size > 1:
                if not queue:
                    return False
                atom = queue.pop(0)
                if self._sizes[atom] > size:
                    if self._sizes[atom] % size:
                        return False
                    atom, rest = self._split(atom, size)
                    queue.insert(0, rest)
                if size % self._sizes[atom]:
                    return False
                size //= self._sizes[atom]
                group.append(atom)
            groups.append(group)
        self._current, self.shape = groups, list(shape)
        return not queue

    def _split(self, atom: int, outer: int) -> tuple[int, int]:
        first, second = self._atom(outer), self._atom(self._sizes[atom] // outer)
        for group in self._source:
            if atom in group:
                at = group.index(atom)
                group[at : at + 1] = [first, second]
        return first, second

    def slice(self, axis: int, begin: int, end: int) -> tuple[int, int, int, AxisMap] | None:
        """Where result[begin:end] along `axis` lies in the source: (axis, begin, end, map), or None.

        That is possible where the sliced atom is the outermost of its source axis.
        """
        group = self._current[axis]
        if not group:
            return None
        atom = group[0]
        inner = prod(self._sizes[a] for a in group[1:])
        if begin % inner or end % inner:
            return None
        origin = next(i for i, g in enumerate(self._source) if atom in g)
        if self._source[origin][0] != atom:
            return None
        first, last = begin // inner, end // inner
        step = prod(self._sizes[a] for a in self._source[origin][1:])
        part = AxisMap([])
        part._sizes = list(self._sizes)
        part._sizes[atom] = last - first
        part._source = [[a for a in g if part._sizes[a] != 1] for g in self._source]
        part._current = [[a for a in g if part._sizes[a] != 1] for g in self._current]
        part.source_shape = list(self.source_shape)
        part.source_shape[origin] = (last - first) * step
        part.shape = list(self.shape)
        part.shape[axis] = end - begin
        return origin, first * step, last * step, part

    def with_last_axis(self, size: int) -> AxisMap | None:
        """The same movement of rows that have `size` elements; None where it takes rows apart."""
        if not self.shape or not self.source_shape or self._source[-1] != self._current[-1]:
            return None
        rows = AxisMap([])
        rows._sizes = list(self._sizes)
        last = [rows._atom(size)] if size != 1 else []
        rows._source = [*(list(g) for g in self._source[:-1]), last]
        rows._current = [*(list(g) for g in self._current[:-1]), list(last)]
        rows.source_shape = [*self.source_shape[:-1], size]
        rows.shape = [*self.shape[:-1], size]
        return rows

    def steps(self) -> list[Step]:
        """The shortest of reshape, permute, reshape that makes the result from the source."""
        before = [a for g in self._source for a in g]
        after = [a for g in self._current for a in g]
        if before == after:
            return [] if self.shape == self.source_shape else [Step("reshape", tuple(self.shape))]
        place = {atom: i for i, atom in enumerate(before)}
        target = {atom: i for i, atom in enumerate(after)}
        options = [self._blocks(before, target)]
        if _runs(self._source, target):
            axes = _order(self._source, target)
            shape = [self.source_shape[a] for a in axes]
            options.append(self._chain(self.source_shape, axes, shape))
        if _runs(self._current, place):
            axes = _order(self._current, place)
            shape = [self.shape[a] for a in axes]
            inverse = [axes.index(i) for i in range(len(axes))]
            options.append(self._chain(shape, inverse, self.shape))
        return min(reversed(options), key=len)

    def _blocks(self, before: list[int], target: dict[int, int]) -> list[Step]:
        """The general form, on maximal blocks of atoms that stay together."""
        blocks: list[list[int]] = []
        for atom in before:
            if blocks and target[atom] == target[blocks[-1][-1]] + 1:
                blocks[-1].append(atom)
            else:
                blocks.append([atom])
        shape = [prod(self._sizes[a] for a in b) for b in blocks]
        axes = sorted(range(len(blocks)), key=lambda i: target[blocks[i][0]])
        if self.source_shape[:1] == self.shape[:1] == [1]:  # keep a batch of one visible
            shape, axes = [1, *shape], [0, *(a + 1 for a in axes)]
        return self._chain(shape, axes, [shape[a] for a in axes])

    def _chain(self, shape: list[int], axes: list[int], permuted: list[int]) -> list[Step]:
        steps = [Step("permute", tuple(axes))]
        if shape != self.source_shape:
            steps.insert(0, Step("reshape", tuple(shape)))
        if permuted != self.shape:
            steps.append(Step("reshape", tuple(self.shape)))
        return steps


def _runs(groups: list[list[int]], position: dict[int, int]) -> bool:
    """Whether each group is a run of consecutive positions in the other order."""
    return all(position[b] == position[a] + 1 for g in groups for a, b in pairwise(g))


def _order(groups: list[list[int]], position: dict[int, int]) -> list[int]:
    """Axes sorted by position in the other order; axes of size one keep their index."""
    axes = sorted((i for i, g in enumerate(groups) if g), key=lambda i: position[groups[i][0]])
    for i, group in enumerate(groups):
        if not group:
            axes.insert(i, i)
    return axes
