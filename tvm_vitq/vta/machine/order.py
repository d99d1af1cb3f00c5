"""What happens before what: the tokens of a stream, followed through the queues of the machine.

Stages take their instructions in order and run at the same time; only tokens order two stages. Such a
network has one outcome whatever the stages' speeds: either each run ends, and the n-th pop of a queue always
meets its n-th push, or each one stops at the same instructions. So one walk, as greedy as possible, decides
both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tvm_vitq.numerics import Array
from tvm_vitq.vta.machine.isa import Instruction, Stage, stage, tokens

QUEUED = 512
"""Instructions that a stage's queue holds; fetching waits when one is full."""

TOKENS = 255
"""Tokens that a queue holds; the Chisel design loses the next."""

QUEUE_NAMES = {
    (Stage.LOAD, Stage.COMPUTE): "load to compute",
    (Stage.COMPUTE, Stage.LOAD): "compute to load",
    (Stage.COMPUTE, Stage.STORE): "compute to store",
    (Stage.STORE, Stage.COMPUTE): "store to compute",
}
Queue = tuple[Stage, Stage]


@dataclass
class Order:
    """Outcome of following the tokens.

    sequence : positions in the stream, in one order in which they can run.
    before : int64 [instructions, 3], how many instructions of each stage are done before one starts, in every
        run; -1 for those that never start.
    stages, ranks : each instruction's stage (-1: none) and its place among those of its stage.
    waits : for every pop that is met, (position, queue): position that pushed.
    stuck : the first instruction of each stage that never starts, with the queue in which it finds no token;
        None for what was never fetched.
    left : tokens left over, by queue.
    most : the largest number of tokens that a queue can hold in any run.
    """

    sequence: list[int] = field(default_factory=list)
    before: Array = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    stages: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    waits: dict[tuple[int, Queue], int] = field(default_factory=dict)
    stuck: dict[int, Queue | None] = field(default_factory=dict)
    left: dict[Queue, int] = field(default_factory=dict)
    most: dict[Queue, int] = field(default_factory=dict)


def pops(instruction: Instruction, at: Stage) -> list[Queue]:
    """Queues that an instruction takes a token from. Those that its stage does not have are left out."""
    prev, next_, _, _ = tokens(instruction)
    return [(source, at) for source in _neighbours(at, prev, next_)]


def pushes(instruction: Instruction, at: Stage) -> list[Queue]:
    """Queues that it gives a token to."""
    _, _, prev, next_ = tokens(instruction)
    return [(at, sink) for sink in _neighbours(at, prev, next_)]


def _neighbours(at: Stage, prev: bool, next_: bool) -> list[Stage]:
    return [Stage(at + step) for wanted, step in ((prev, -1), (next_, 1)) if wanted and 0 <= at + step <= 2]


def follow(program: Sequence[Instruction]) -> Order:
    """Walks through a stream as a machine with full queues of instructions would."""
    walk = _Walk(program)
    while walk.advance():
        pass
    return walk.finish()


class _Walk:
    def __init__(self, program: Sequence[Instruction]) -> None:
        self.program = program
        self.fetched = 0
        self.pending: dict[Stage, deque[int]] = {at: deque() for at in Stage}
        self.done = {at: np.zeros(3, np.int64) for at in Stage}
        self.given: dict[Queue, deque[int]] = {queue: deque() for queue in QUEUE_NAMES}
        self.after: dict[int, Array] = {}
        self.popped: dict[Queue, list[int]] = {queue: [] for queue in QUEUE_NAMES}
        self.pushed: dict[Queue, list[int]] = {queue: [] for queue in QUEUE_NAMES}
        self.order = Order(before=np.full((len(program), 3), -1, np.int64))
        counts = [0, 0, 0]
        for instruction in program:
            at = stage(instruction)
            self.order.stages.append(-1 if at is None else int(at))
            self.order.ranks.append(-1 if at is None else counts[at])
            if at is not None:
                counts[at] += 1

    def advance(self) -> bool:
        """Fetches what fits and runs what can; False if neither moved."""
        moved = self._fetch()
        for at in Stage:
            while self.pending[at] and self._run(self.pending[at][0], at):
                self.pending[at].popleft()
                moved = True
        return moved

    def _fetch(self) -> bool:
        start = self.fetched
        while self.fetched < len(self.program):
            at = self.order.stages[self.fetched]
            if at >= 0:
                if len(self.pending[Stage(at)]) == QUEUED:
                    break
                self.pending[Stage(at)].append(self.fetched)
            self.fetched += 1
        return self.fetched > start

    def _run(self, position: int, at: Stage) -> bool:
        instruction = self.program[position]
        needed = pops(instruction, at)
        if any(not self.given[queue] for queue in needed):
            return False
        clock = self.done[at]
        for queue in needed:
            pusher = self.given[queue].popleft()
            self.popped[queue].append(position)
            self.order.waits[position, queue] = pusher
            clock = np.maximum(clock, self.after[pusher])
        self.order.before[position] = clock
        clock = clock.copy()
        clock[at] = self.order.ranks[position] + 1
        self.done[at] = clock
        for queue in pushes(instruction, at):
            self.given[queue].append(position)
            self.pushed[queue].append(position)
            self.after[position] = clock
        self.order.sequence.append(position)
        return True

    def finish(self) -> Order:
        order = self.order
        for at in Stage:
            if self.pending[at]:
                position = self.pending[at][0]
                missing = [queue for queue in pops(self.program[position], at) if not self.given[queue]]
                order.stuck[position] = missing[0]
        for position in range(self.fetched, len(self.program)):
            order.stuck[position] = None
            break
        for queue in QUEUE_NAMES:
            order.left[queue] = len(self.given[queue])
            order.most[queue] = self._most(queue)
        return order

    def _most(self, queue: Queue) -> int:
        """Tokens in a queue at most: at each push, all pops that need not have happened are still to come."""
        ranks = np.array([self.order.ranks[position] for position in self.popped[queue]], np.int64)
        most = 0
        for number, position in enumerate(self.pushed[queue], 1):
            started = self.order.before[position][queue[1]]
            most = max(most, number - int(np.searchsorted(ranks, started)))
        return most
