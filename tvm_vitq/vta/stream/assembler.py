"""Writes streams: the caller puts instructions in an order in which one after the other would be right, and
this adds the tokens that keep it right when the stages run at the same time.

An instruction waits for what wrote the elements that it reads, and for what read or wrote those that it
overwrites. Two contexts, the one in use while the other is filled, therefore overlap by themselves: no token
ties them. A dependence is a push at the earlier and a pop at the later instruction; it is left out where
others imply it. Loads and stores are no neighbours: what a store wrote reaches a load through the compute
stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.machine.config import PAGE, PORTABLE_UOPS, UOP_BYTES, Memory, VtaConfig
from tvm_vitq.vta.machine.cycles import count_cycles, duration
from tvm_vitq.vta.machine.isa import (
    Alu,
    Finish,
    Gemm,
    Instruction,
    Load,
    Loop,
    Stage,
    Store,
    encode_uops,
    indices,
    no_op,
    stage,
)


@dataclass(eq=False)
class Buffer:
    """Device memory that a stream uses; its address is known when it is placed.

    name : for messages and listings.
    size : bytes.
    contents : uint8 [size] of constants, else None.
    written : whether the host writes it before each run.
    """

    name: str
    size: int
    contents: Array | None = None
    written: bool = True


@dataclass
class Stream:
    """A program whose transfers count elements from the beginning of their buffers.

    program : the instructions.
    buffers : what they use.
    uses : for each instruction the place of its buffer in `buffers`, -1 for none.
    """

    program: list[Instruction] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)

    def placed(self, addresses: Sequence[int], config: VtaConfig) -> list[Instruction]:
        """The program for buffers at these device addresses, multiples of the largest element's bytes."""
        placed = []
        for instruction, used in zip(self.program, self.uses, strict=True):
            if used >= 0 and isinstance(instruction, (Load, Store)):
                offset = addresses[used] // config.element_bytes(instruction.memory)
                instruction = replace(instruction, dram=instruction.dram + offset)
            placed.append(instruction)
        return placed

    def cycles(self, config: VtaConfig) -> int:
        """By the cycle model, buffers one behind the other.

        Raises
        ------
        VitqError : it never ends.
        """
        ends = np.cumsum([0, *(-(-buffer.size // PAGE) * PAGE for buffer in self.buffers)])
        return count_cycles(self.placed(ends.tolist(), config), config).total


class _Elements:
    """Ranks of the last instruction of each stage that wrote and read each element."""

    def __init__(self, count: int) -> None:
        self.wrote = np.full((3, count), -1, np.int64)
        self.read = np.full((3, count), -1, np.int64)


class Assembler:
    """Collects a stream.

    Parameters
    ----------
    config : the machine.
    """

    def __init__(self, config: VtaConfig) -> None:
        self.config = config
        self._program: list[Instruction] = []
        self._buffers: list[Buffer | None] = []
        self._positions: dict[Stage, list[int]] = {at: [] for at in Stage}
        self._ends: dict[Stage, list[int]] = {at: [] for at in Stage}
        self._clock = {at: np.zeros(3, np.int64) for at in Stage}
        self._after: list[Array] = []
        self._pads = {memory: _Elements(config.depth(memory)) for memory in Memory}
        self._far: dict[Buffer, _Elements] = {}
        self._settled = np.zeros(config.depth(Memory.ACC), bool)
        self._deferred: list[tuple[range, Iterator[None]]] = []
        self._pages: list[Buffer] = []
        self._uops: Array = np.zeros((0, 3), np.int64)
        self._tables: dict[bytes, int] = {}
        self._turn_page()

    def uops(self, rows: Array) -> tuple[int, int]:
        """Begin and end of micro-ops [n, 3] of (dst, src, wgt), for the next instruction; equal tables are
        kept once. A full scratchpad is loaded anew, which only the compute stage sees.

        Raises
        ------
        VitqError : more than every implementation holds.
        """
        rows = np.ascontiguousarray(rows, np.int64).reshape(-1, 3)
        limit = min(PORTABLE_UOPS, self.config.depth(Memory.UOP))
        if len(rows) > limit:
            raise VitqError(
                "VTA instruction needs too many micro-ops",
                got=len(rows),
                expected=f"at most {limit}",
                fix="use tiles of fewer rows",
            )
        key = rows.tobytes()
        if key not in self._tables and len(self._uops) + len(rows) > limit:
            self._turn_page()
        begin = self._tables.setdefault(key, len(self._uops))
        if begin == len(self._uops):
            self._uops = np.concatenate([self._uops, rows])
            self._pages[-1].contents = encode_uops(self._uops, self.config).view(np.uint8)
        return begin, begin + len(rows)

    def _turn_page(self) -> None:
        self._uops = np.zeros((0, 3), np.int64)
        self._tables = {}
        self._pages.append(Buffer(f"micro-ops {len(self._pages)}", 0))
        self._wait(Load(memory=Memory.UOP, rows=1), self._pages[-1], {})

    def settled(self, accumulators: Array) -> bool:
        """Whether all of these were last written by an operation, so that they can be stored."""
        return bool(self._settled[accumulators].all())

    def defer(self, accumulators: range, steps: Iterator[None]) -> None:
        """Leaves the rest of a tile's stores for later, one at each `advance`: what the next one stores must
        be made in accumulators that are still being stored, so other work is to come first.
        """
        self._deferred.append((accumulators, steps))

    def advance(self) -> None:
        """One step of everything deferred whose accumulators are not being stored any more."""
        now = self.now
        self._deferred = [
            entry for entry in self._deferred if self.stored(entry[0]) > now or next(entry[1], self) is None
        ]

    @property
    def now(self) -> int:
        """When the compute stage is done with what it has been given, in cycles: an estimate, in which every
        stage has a channel of its own.
        """
        return self._ends[Stage.COMPUTE][-1] if self._ends[Stage.COMPUTE] else 0

    def stored(self, accumulators: range) -> int:
        """When nothing in these is being stored any more."""
        return self._end(
            Stage.STORE,
            int(
                self._pads[Memory.OUT]
                .read[Stage.STORE][accumulators.start : accumulators.stop]
                .max(initial=-1)
            ),
        )

    def written(self, buffer: Buffer) -> int:
        """When the last result in a buffer is stored."""
        if buffer not in self._far:
            return 0
        return self._end(Stage.STORE, int(self._far[buffer].wrote[Stage.STORE].max(initial=-1)))

    def _end(self, at: Stage, rank: int) -> int:
        return self._ends[at][rank] if rank >= 0 else 0

    def settle(self, accumulators: range) -> None:
        """All steps of what is deferred in any of these, which are about to be overwritten."""
        waiting = []
        for held, steps in self._deferred:
            if held.start < accumulators.stop and accumulators.start < held.stop:
                for _ in steps:
                    pass
            else:
                waiting.append((held, steps))
        self._deferred = waiting

    def load(
        self, memory: Memory, sram: int, buffer: Buffer, dram: int, rows: int, columns: int, stride: int
    ) -> None:
        """Elements of a buffer, `dram` the first of them, to a scratchpad from `sram` on."""
        self._append(
            Load(memory=memory, sram=sram, dram=dram, rows=rows, columns=columns, stride=stride), buffer
        )

    def store(self, sram: int, buffer: Buffer, dram: int, rows: int, columns: int, stride: int) -> None:
        """Results from `sram` on to a buffer."""
        self._append(
            Store(memory=Memory.OUT, sram=sram, dram=dram, rows=rows, columns=columns, stride=stride), buffer
        )

    def loop(self, instruction: Gemm | Alu) -> None:
        """A GEMM or ALU instruction over micro-ops that `uops` gave."""
        self._append(instruction, None)

    def finish(self) -> Stream:
        """The whole stream: micro-ops are loaded first, FINISH waits for everything."""
        self.settle(range(self.config.depth(Memory.ACC)))
        ends = {at: len(self._positions[at]) - 1 for at in (Stage.LOAD, Stage.STORE)}
        self._wait(no_op(Stage.COMPUTE), None, {at: end for at, end in ends.items() if end >= 0})
        program = [self._sized(*entry) for entry in zip(self._program, self._buffers, strict=True)]
        buffers = list(dict.fromkeys(buffer for buffer in self._buffers if buffer is not None))
        place = {buffer: number for number, buffer in enumerate(buffers)}
        uses = [-1 if buffer is None else place[buffer] for buffer in self._buffers]
        return Stream([*program, Finish()], buffers, [*uses, -1])

    def _sized(self, instruction: Instruction, buffer: Buffer | None) -> Instruction:
        """Loads of micro-ops get the length that their page has in the end."""
        if buffer is None or buffer not in self._pages or buffer.contents is None:
            return instruction
        buffer.size = len(buffer.contents)
        count = buffer.size // UOP_BYTES
        return replace(instruction, columns=count, stride=count)  # type: ignore[call-arg]

    def _append(self, instruction: Instruction, buffer: Buffer | None) -> None:
        reads, writes = self._touched(instruction, buffer)
        at = stage(instruction)
        assert at is not None
        needed: dict[Stage, int] = {}
        for other in Stage:
            if other is not at:
                ranks = [elements.wrote[other][chosen].max() for elements, chosen in (*reads, *writes)]
                ranks += [elements.read[other][chosen].max() for elements, chosen in writes]
                needed[other] = int(max(ranks, default=-1))
        rank = self._wait(instruction, buffer, needed)
        for elements, chosen in reads:
            elements.read[at][chosen] = rank
        for elements, chosen in writes:
            elements.wrote[at][chosen] = rank

    def _wait(self, instruction: Instruction, buffer: Buffer | None, needed: dict[Stage, int]) -> int:
        """Appends an instruction that starts after those of other stages; its rank in its own."""
        at = stage(instruction)
        assert at is not None
        for other in sorted(needed, key=lambda other: abs(other - at), reverse=True):
            if needed[other] < self._clock[at][other]:
                continue
            if abs(other - at) == 2:  # through the compute stage, whose no-op waits in our place
                between = self._wait(no_op(Stage.COMPUTE), None, {other: needed[other]})
                needed[Stage.COMPUTE] = max(needed.get(Stage.COMPUTE, -1), between)
        clock = self._clock[at]
        begin = max(
            [*self._ends[at][-1:], *(self._end(other, rank) for other, rank in needed.items())], default=0
        )
        for other, rank in needed.items():
            if rank >= self._clock[at][other] and abs(other - at) == 1:
                pusher = self._positions[other][rank]
                push, pop = ("push_next", "pop_prev") if other < at else ("push_prev", "pop_next")
                self._program[pusher] = replace(self._program[pusher], **{push: True})
                instruction = replace(instruction, **{pop: True})
                clock = np.maximum(clock, self._after[pusher])
        rank = len(self._positions[at])
        clock = clock.copy()
        clock[at] = rank + 1
        self._clock[at] = clock
        self._positions[at].append(len(self._program))
        self._ends[at].append(begin + duration(instruction, self.config))
        self._program.append(instruction)
        self._buffers.append(buffer)
        self._after.append(clock)
        return rank

    def _touched(
        self, instruction: Instruction, buffer: Buffer | None
    ) -> tuple[list[tuple[_Elements, Array]], list[tuple[_Elements, Array]]]:
        """What an instruction reads and what it writes."""
        if isinstance(instruction, (Load, Store)):
            assert buffer is not None
            near = instruction.sram + np.arange(instruction.rows * instruction.columns)
            local = (self._pads[Memory(instruction.memory)], near)
            far = (self._buffer(buffer), self._words(instruction))
            if isinstance(instruction, Store):
                return [local], [far]
            local_writes = [local]
            if instruction.memory == Memory.ACC:
                self._settled[near] = False
                local_writes.append((self._pads[Memory.OUT], near))  # what is being stored from there
            return ([far] if buffer.contents is None else []), local_writes
        assert isinstance(instruction, Loop)
        span = self._uops[instruction.uop_begin : instruction.uop_end]
        dst, src, wgt = (np.unique(part) for part in indices(instruction, span))
        self._settled[dst] = not (isinstance(instruction, Gemm) and instruction.reset)
        writes = [(self._pads[Memory.ACC], dst), (self._pads[Memory.OUT], dst)]
        reads = []
        if isinstance(instruction, Gemm) and not instruction.reset:
            reads = [(self._pads[Memory.INP], src), (self._pads[Memory.WGT], wgt)]
        return reads, writes

    def _buffer(self, buffer: Buffer) -> _Elements:
        if buffer not in self._far:
            self._far[buffer] = _Elements(-(-buffer.size // self._word))
        return self._far[buffer]

    @property
    def _word(self) -> int:
        """Bytes of the smallest element that a store writes."""
        return self.config.element_bytes(Memory.OUT)

    def _words(self, transfer: Load | Store) -> Array:
        size = self.config.element_bytes(transfer.memory)
        assert size % self._word == 0 or UOP_BYTES == size
        starts = (transfer.dram + np.arange(transfer.rows) * transfer.stride) * size
        return ((starts[:, None] + np.arange(0, transfer.columns * size, self._word)) // self._word).ravel()
