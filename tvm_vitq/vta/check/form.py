"""Each instruction by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tvm_vitq.vta.check.findings import Finding, Region, region_of
from tvm_vitq.vta.machine.config import Memory, VtaConfig
from tvm_vitq.vta.machine.isa import (
    Alu,
    AluOp,
    Instruction,
    Load,
    Loop,
    Stage,
    Store,
    Transfer,
    Unknown,
    stage,
)

ADDRESSES = 1 << 32
"""Implementations multiply element and size in 32 bits."""


def check_form(program: Sequence[Instruction], config: VtaConfig, regions: Sequence[Region]) -> list[Finding]:
    """Codes without meaning, tokens to stages that do not exist, transfers beyond scratchpads and regions."""
    found = []
    for position, instruction in enumerate(program):
        for rule, text in _of_one(instruction, config, regions):
            found.append(Finding(rule, position, text))
    return found


def _of_one(
    instruction: Instruction, config: VtaConfig, regions: Sequence[Region]
) -> Iterator[tuple[str, str]]:
    if isinstance(instruction, Unknown):
        yield "opcode", f"opcode {instruction.opcode} is no instruction"
        return
    if isinstance(instruction, Alu) and instruction.op not in list(AluOp):
        yield "opcode", f"ALU operation {instruction.op} does not exist"
    if isinstance(instruction, Load) and instruction.memory in (Memory.OUT, 6, 7):
        yield "memory", f"nothing can be loaded into memory {instruction.memory}"
        return
    if isinstance(instruction, Store) and instruction.memory != Memory.OUT and instruction.columns:
        yield "memory", f"memory {instruction.memory} cannot be stored from"
        return
    yield from _sides(instruction)
    if isinstance(instruction, Transfer) and instruction.columns:
        yield from _transfer(instruction, config, regions)
    if isinstance(instruction, Loop) and instruction.uop_end > config.depth(Memory.UOP):
        yield (
            "scratchpad",
            f"micro-op {instruction.uop_end - 1} is beyond the {config.depth(Memory.UOP)} there are",
        )


def _sides(instruction: Instruction) -> Iterator[tuple[str, str]]:
    at = stage(instruction)
    if at is Stage.LOAD and (instruction.pop_prev or instruction.push_prev):
        yield "token-side", "the load stage has no previous stage"
    if at is Stage.STORE and (instruction.pop_next or instruction.push_next):
        yield "token-side", "the store stage has no next stage"


def _transfer(transfer: Transfer, config: VtaConfig, regions: Sequence[Region]) -> Iterator[tuple[str, str]]:
    memory = Memory(transfer.memory)
    size, depth = config.element_bytes(memory), config.depth(memory)
    if not transfer.rows:
        yield "rows", "a transfer of no rows never ends on hardware"
        return
    pads = (transfer.pad_top, transfer.pad_bottom, transfer.pad_left, transfer.pad_right)
    if isinstance(transfer, Store) and any(pads):
        yield "pads", f"a store cannot pad, got {pads}"
    count = (transfer.rows + pads[0] + pads[1]) * (transfer.columns + pads[2] + pads[3])
    if transfer.sram + count > depth:
        yield (
            "scratchpad",
            f"{memory.name} element {transfer.sram + count - 1} is beyond the {depth} there are",
        )
    start = transfer.dram * size
    end = start + ((transfer.rows - 1) * transfer.stride + transfer.columns) * size
    region = region_of(regions, start)
    if region is None:
        yield "unmapped", f"address {start:#x} belongs to nothing"
    elif end > region.end:
        yield "overrun", f"{memory.name} reaches {end - region.end} bytes beyond {region.name}"
    elif isinstance(transfer, Store) and not region.writable:
        yield "read-only", f"{region.name} is not to be written"
    if end > ADDRESSES:
        yield "address", f"address {end:#x} does not fit 32 bits"
