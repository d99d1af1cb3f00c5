"""What each instruction reads was written before it, in every run, and stays until it is read.

One walk through the stream in an order in which it can run. `Order.before` says for each instruction how many
of each other stage are done when it starts; an element's last writer and last reader of each stage say
whether that is enough. Contents that never change (micro-ops, amounts of shifts) are followed by value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_vitq.numerics import Array
from tvm_vitq.vta.check.findings import Finding, Region, region_of
from tvm_vitq.vta.machine.config import UOP_BYTES, Memory, VtaConfig
from tvm_vitq.vta.machine.isa import (
    Alu,
    AluOp,
    Gemm,
    Instruction,
    Load,
    Loop,
    Stage,
    Store,
    Transfer,
    decode_uops,
    indices,
)
from tvm_vitq.vta.machine.order import Order

NEAR = 2
"""Executions of micro-ops that are in the pipeline together with the next one."""


class _Elements:
    """Elements of a memory: the rank of the last instruction of each stage that wrote and read each, -1 for
    none.
    """

    def __init__(self, count: int, written: bool = False) -> None:
        self.wrote = np.full((3, count), -1, np.int64)
        self.read = np.full((3, count), -1, np.int64)
        self.holds = np.full(count, written)


def check_data(
    program: Sequence[Instruction], order: Order, config: VtaConfig, regions: Sequence[Region]
) -> list[Finding]:
    """Reads of what was never written, indices beyond scratchpads, stale results, races, near micro-ops."""
    walk = _Walk(config, regions, order)
    for position in order.sequence:
        walk.step(position, program[position])
    return walk.found


class _Walk:
    def __init__(self, config: VtaConfig, regions: Sequence[Region], order: Order) -> None:
        self.config, self.regions, self.order = config, regions, order
        self.pads = {memory: _Elements(config.depth(memory)) for memory in Memory}
        self.far = {region: _Elements(-(-region.size // UOP_BYTES), region.written) for region in regions}
        self.uops = np.zeros(config.depth(Memory.UOP), np.uint32)
        self.value = np.zeros((config.depth(Memory.ACC), config.block), np.int32)
        self.known = np.zeros(config.depth(Memory.ACC), bool)
        self.stale = np.zeros(config.depth(Memory.ACC), bool)
        self.found: list[Finding] = []
        self.position, self.at = 0, Stage.LOAD

    def step(self, position: int, instruction: Instruction) -> None:
        """Follows one instruction."""
        self.position, self.at = position, Stage(self.order.stages[position])
        if isinstance(instruction, Load) and instruction.columns:
            self._load(instruction)
        elif isinstance(instruction, Store) and instruction.columns:
            self._store(instruction)
        elif isinstance(instruction, Loop) and instruction.count:
            self._loop(instruction)

    def _say(self, rule: str, text: str) -> None:
        self.found.append(Finding(rule, self.position, text))

    def _reads(self, elements: _Elements, chosen: Array, name: str) -> None:
        if not elements.holds[chosen].all():
            missing = np.unique(chosen[~elements.holds[chosen]])
            self._say("uninitialized", f"reads {name}[{missing[0]}], which nothing wrote")
        self._ordered(elements.wrote, chosen, f"reads {name}", "writes")
        elements.read[self.at][chosen] = self.order.ranks[self.position]

    def _writes(self, elements: _Elements, chosen: Array, name: str) -> None:
        self._ordered(elements.read, chosen, f"writes {name}", "reads")
        self._ordered(elements.wrote, chosen, f"writes {name}", "writes")
        elements.wrote[self.at][chosen] = self.order.ranks[self.position]
        elements.holds[chosen] = True

    def _ordered(self, ranks: Array, chosen: Array, doing: str, other: str) -> None:
        before = self.order.before[self.position]
        for at in Stage:
            if at is self.at:
                continue
            late = ranks[at][chosen] >= before[at]
            if late.any():
                rank = int(ranks[at][chosen][late].max())
                who = f"instruction {rank} of the {at.name.lower()} stage"
                self._say("race", f"{doing}[{chosen[late][0]}] while {who} {other} it")

    def _load(self, load: Load) -> None:
        memory = Memory.ACC if load.memory == Memory.ACC_8BIT else Memory(load.memory)
        height = load.rows + load.pad_top + load.pad_bottom
        width = load.columns + load.pad_left + load.pad_right
        chosen = load.sram + np.arange(height * width)
        size = self.config.element_bytes(load.memory)
        region, far = self._far(load, size)
        self._reads(self.far[region], far, region.name)
        self._writes(self.pads[memory], chosen, memory.name)
        constants = _contents(region, load, size) if height * width == load.rows * load.columns else None
        if memory is Memory.UOP:
            if constants is None:
                self._say("uninitialized", f"micro-ops of {region.name} are not known before it runs")
            else:
                self.uops[chosen] = constants.view(np.uint32).ravel()
        elif memory is Memory.ACC:
            self._forget(chosen)
            self.stale[chosen] = True
            if constants is not None and load.memory == Memory.ACC:
                self.value[chosen] = constants.view(np.int32).reshape(len(chosen), -1)
                self.known[chosen] = True

    def _far(self, transfer: Transfer, size: int) -> tuple[Region, Array]:
        """A transfer's region, and the words of it that are touched."""
        region = region_of(self.regions, transfer.dram * size)
        assert region is not None, "check_form found it"
        starts = transfer.dram * size - region.address + np.arange(transfer.rows) * transfer.stride * size
        words = (starts[:, None] + np.arange(0, transfer.columns * size, UOP_BYTES)) // UOP_BYTES
        return region, words.ravel()

    def _store(self, store: Store) -> None:
        chosen = store.sram + np.arange(store.rows * store.columns)
        self._reads(self.pads[Memory.OUT], chosen, "OUT")
        if self.stale[chosen].any():
            entry = int(chosen[self.stale[chosen]][0])
            self._say("stale", f"stores OUT[{entry}], but ACC[{entry}] was last written by a load or a reset")
        region, far = self._far(store, self.config.element_bytes(Memory.OUT))
        self._writes(self.far[region], far, region.name)

    def _loop(self, loop: Loop) -> None:
        span = np.arange(loop.uop_begin, loop.uop_end)
        self._reads(self.pads[Memory.UOP], span, "UOP")
        dst, src, wgt = (part.ravel() for part in indices(loop, decode_uops(self.uops[span], self.config)))
        gemm = isinstance(loop, Gemm)
        used = [(Memory.ACC, dst)]
        if gemm and not loop.reset:
            used += [(Memory.INP, src), (Memory.WGT, wgt)]
        elif isinstance(loop, Alu) and loop.immediate is None:
            used += [(Memory.ACC, src)]
        for memory, chosen in used:
            depth = len(self.pads[memory].holds)
            if chosen.max() >= depth:
                self._say(
                    "scratchpad", f"{memory.name} element {chosen.max()} is beyond the {depth} there are"
                )
                return
        for memory, chosen in used[gemm and loop.reset :]:
            self._reads(self.pads[memory], np.unique(chosen), memory.name)
        if isinstance(loop, Alu):
            self._check_alu(loop, dst, src)
        if not (gemm and loop.reset):
            self._check_near(loop, dst, src)
        chosen = np.unique(dst)
        self._forget(chosen)
        self._writes(self.pads[Memory.ACC], chosen, "ACC")
        self._writes(self.pads[Memory.OUT], chosen, "OUT")
        self.stale[chosen] = gemm and loop.reset

    def _forget(self, chosen: Array) -> None:
        self.known[chosen] = False

    def _check_alu(self, alu: Alu, dst: Array, src: Array) -> None:
        if alu.immediate is not None:
            if (dst != src).any():
                self._say("portable", "with an immediate some read the source: it must be the destination")
        elif alu.op == AluOp.SHR:
            amounts = self.value[np.unique(src)]
            if not self.known[src].all():
                self._say("portable", "shifts by amounts that are not known before it runs")
            elif amounts.min() < 0 or amounts.max() > 15:
                self._say("portable", f"shifts by {amounts.min()} to {amounts.max()}, beyond 0 to 15")

    def _check_near(self, loop: Loop, dst: Array, src: Array) -> None:
        reads = dst if isinstance(loop, Gemm) or loop.immediate is not None else src  # type: ignore[attr-defined]
        for step in range(1, NEAR + 1):
            if (dst[step:] == dst[:-step]).any():
                self._say("near", f"a micro-op writes ACC again {step} after another")
                return
            if (reads[step:] == dst[:-step]).any():
                self._say("near", f"a micro-op reads ACC {step} after another writes it")
                return


def _contents(region: Region, load: Load, size: int) -> Array | None:
    """The bytes that a load brings, [elements, size], if they never change."""
    if region.contents is None:
        return None
    start = load.dram * size - region.address
    rows = [
        region.contents[start + row * load.stride * size :][: load.columns * size] for row in range(load.rows)
    ]
    return np.ascontiguousarray(np.concatenate(rows)).reshape(-1, size)
