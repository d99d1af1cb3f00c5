"""How long a stream takes: the machine event by event, with queues, tokens, and the one channel for reads.

Costs are those of the Chisel design, read from its sources and never calibrated against its simulation: a
model to compare schedules by, good to a few percent at best. Stages run one instruction at a time, in order,
and at the same time as each other; whatever reads device memory shares one channel, burst by burst, in the
order fetch, micro-ops, inputs, weights, accumulators; writes have a channel of their own.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.config import INSTRUCTION_BYTES, Memory, VtaConfig
from tvm_vitq.vta.machine.isa import Alu, Finish, Gemm, Instruction, Load, Stage, Store, Transfer, stage
from tvm_vitq.vta.machine.order import QUEUED, Queue, pops, pushes

LOOP_START = 7
"""Cycles of a GEMM or ALU instruction beside those of its micro-ops."""

SHORT = 2
"""Of FINISH and of transfers that move only tokens."""

LOAD_START, STORE_START, STORE_BURST = 5, 3, 8
FIRST_BURST, NEXT_BURST = 22, 2
"""Cycles before the first beat of a burst: of one that finds the channel idle (16 of memory, 6 of the unit
that asks), and of one that waited for it.
"""

READ_BYTES = 2048
"""Bursts do not cross multiples of this, or of the longest burst where that is shorter."""


@dataclass
class Cycles:
    """What a run costs.

    total : cycles from launch to FINISH.
    busy : cycles in which a stage works, waiting for tokens left out.
    products : GEMM micro-ops that multiply, a cycle each at best.
    read, written : bytes of device memory, by scratchpad; "FETCH" are instructions.
    """

    total: int = 0
    busy: dict[str, int] = field(default_factory=dict)
    products: int = 0
    read: dict[str, int] = field(default_factory=dict)
    written: int = 0

    @property
    def utilization(self) -> float:
        """Share of cycles in which the multipliers work, 0 to 1."""
        return self.products / self.total if self.total else 0.0


def count_cycles(program: Sequence[Instruction], config: VtaConfig) -> Cycles:
    """Cycles of a stream.

    Raises
    ------
    VitqError : it never ends.
    """
    return _Machine(program, config).run()


def bursts(transfer: Transfer, element_bytes: int, config: VtaConfig) -> Iterator[int]:
    """Beats of each burst of a transfer: rows start new ones, and none crosses a multiple of the longest."""
    bus = config.board.bus_bits // 8
    longest = min(READ_BYTES, config.board.burst_beats * bus)
    for row in range(transfer.rows):
        start = (transfer.dram + row * transfer.stride) * element_bytes
        end = start + transfer.columns * element_bytes
        while start < end:
            stop = min(end, (start // longest + 1) * longest)
            yield -(-stop // bus) - start // bus
            start = stop


def duration(instruction: Instruction, config: VtaConfig) -> int:
    """Cycles of an instruction that waits for nothing: its reads find the channel idle."""
    if isinstance(instruction, Transfer) and instruction.columns:
        element_bytes = config.element_bytes(instruction.memory)
        beats = list(bursts(instruction, element_bytes, config))
        if isinstance(instruction, Load):
            return (
                LOAD_START + padding(instruction) + FIRST_BURST + sum(beats) + NEXT_BURST * (len(beats) - 1)
            )
        return STORE_START + STORE_BURST * len(beats) + sum(beats) + instruction.rows * instruction.columns
    if isinstance(instruction, Gemm):
        return instruction.count + LOOP_START
    if isinstance(instruction, Alu):
        return instruction.count * (1 + (instruction.immediate is None)) + LOOP_START
    return SHORT


def padding(load: Load) -> int:
    """Elements of zeros that a load writes."""
    height = load.rows + load.pad_top + load.pad_bottom
    width = load.columns + load.pad_left + load.pad_right
    return height * width - load.rows * load.columns


Process = Generator[tuple[str, Any], None, None]
"""A unit of the machine: it yields ("sleep", cycles), ("token", queue), ("read", (priority, beats)),
("instruction", stage) or ("room", stage), and goes on when that is there.
"""


class _Machine:
    def __init__(self, program: Sequence[Instruction], config: VtaConfig) -> None:
        self.program, self.config = program, config
        self.cycles = Cycles(busy={at.name.lower(): 0 for at in Stage})
        self.now = 0
        self.events: list[tuple[int, int, Process]] = []
        self.count = 0
        self.tokens: dict[Queue, deque[int]] = {}
        self.parked: dict[tuple[str, Any], Process] = {}
        self.pending: dict[Stage, deque[int]] = {at: deque() for at in Stage}
        self.reading = False
        self.requests: list[tuple[int, int, int, Process]] = []
        self.finished = False

    def run(self) -> Cycles:
        for process in (self._fetch(), *(self._unit(at) for at in Stage)):
            self._wake(process, 0)
        while self.events:
            self.now, _, process = heapq.heappop(self.events)
            self._advance(process)
        left = sum(map(len, self.pending.values()))
        if not self.finished or left or any(what == "token" for what, _ in self.parked):
            raise VitqError(
                "VTA stream waits for ever", got=f"{left} instructions never start", expected="FINISH"
            )
        return self.cycles

    def _wake(self, process: Process, delay: int) -> None:
        self.count += 1
        heapq.heappush(self.events, (self.now + delay, self.count, process))

    def _advance(self, process: Process) -> None:
        try:
            what, of = next(process)
        except StopIteration:
            return
        if what == "sleep":
            self._wake(process, of)
        elif what == "read":
            self._ask(process, *of)
        elif what == "token" and self.tokens.get(of):
            self._wake(process, max(self.tokens[of].popleft() - self.now, 0))
        elif (what == "instruction" and self.pending[of]) or (
            what == "room" and len(self.pending[of]) < QUEUED
        ):
            self._wake(process, 0)
        else:
            self.parked[what, of] = process

    def _unpark(self, what: str, of: Any, delay: int) -> bool:
        process = self.parked.pop((what, of), None)
        if process is not None:
            self._wake(process, delay)
        return process is not None

    def _ask(self, process: Process, priority: int, beats: int) -> None:
        self.count += 1
        heapq.heappush(self.requests, (priority, self.count, beats, process))
        if not self.reading:
            self.reading = True
            self._wake(self._serve(), 0)

    def _serve(self) -> Process:
        """The channel while there is something to read."""
        gap = FIRST_BURST
        while self.requests:
            _, _, beats, process = heapq.heappop(self.requests)
            yield "sleep", gap + beats
            gap = NEXT_BURST
            self._advance(process)  # at once, so that its next burst is among those to choose from
        self.reading = False

    def _fetch(self) -> Process:
        bus = self.config.board.bus_bits // 8
        chunk = min(READ_BYTES, self.config.board.burst_beats * bus) // INSTRUCTION_BYTES
        for first in range(0, len(self.program), chunk):
            part = range(first, min(first + chunk, len(self.program)))
            yield "read", (-1, len(part) * INSTRUCTION_BYTES // bus)
            self._count_read("FETCH", len(part) * INSTRUCTION_BYTES)
            for position in part:
                at = stage(self.program[position])
                if at is None:
                    raise VitqError("no VTA instruction", where=f"instruction {position}")
                yield "room", at
                self.pending[at].append(position)
                self._unpark("instruction", at, 1)
                yield "sleep", 1

    def _count_read(self, name: str, count: int) -> None:
        self.cycles.read[name] = self.cycles.read.get(name, 0) + count

    def _unit(self, at: Stage) -> Process:
        while True:
            yield "instruction", at
            instruction = self.program[self.pending[at][0]]
            for queue in pops(instruction, at):
                yield "token", queue
            self.pending[at].popleft()
            self._unpark("room", at, 0)
            start = self.now
            yield from self._execute(instruction)
            self.cycles.busy[at.name.lower()] += self.now - start
            for queue in pushes(instruction, at):
                if not self._unpark("token", queue, 1):
                    self.tokens.setdefault(queue, deque()).append(self.now + 1)
            self.cycles.total = self.now
            self.finished |= isinstance(instruction, Finish)

    def _execute(self, instruction: Instruction) -> Process:
        if isinstance(instruction, Load) and instruction.columns:
            yield from self._load(instruction)
            return
        if isinstance(instruction, Gemm):
            self.cycles.products += 0 if instruction.reset else instruction.count
        if isinstance(instruction, Store):
            self.cycles.written += instruction.rows * instruction.columns * self._bytes(instruction)
        yield "sleep", duration(instruction, self.config)

    def _load(self, load: Load) -> Process:
        memory, size = Memory(load.memory), self._bytes(load)
        priority = {Memory.UOP: 0, Memory.INP: 1, Memory.WGT: 2}.get(memory, 3)
        yield "sleep", LOAD_START + padding(load)
        for beats in bursts(load, size, self.config):
            yield "read", (priority, beats)
        self._count_read(memory.name, load.rows * load.columns * size)

    def _bytes(self, transfer: Transfer) -> int:
        return self.config.element_bytes(transfer.memory)
