"""What every implementation does alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tvm_vitq.vta.check.findings import Finding
from tvm_vitq.vta.machine.config import PORTABLE_UOPS, Memory, VtaConfig
from tvm_vitq.vta.machine.isa import Alu, AluOp, Instruction, Load, Loop

PORTABLE_SHIFTS = (-16, 15)
"""Immediate amounts of SHR; amounts from accumulators are checked with the data, 0 to 15."""


def check_portable(program: Sequence[Instruction], config: VtaConfig) -> list[Finding]:
    """Operations, pads and amounts that some implementation lacks or does otherwise."""
    uops = min(PORTABLE_UOPS, config.depth(Memory.UOP))
    found = []
    for position, instruction in enumerate(program):
        for text in (*_transfer(instruction, uops), *_loop(instruction)):
            found.append(Finding("portable", position, text))
    return found


def _transfer(instruction: Instruction, uops: int) -> Iterator[str]:
    if not isinstance(instruction, Load) or not instruction.columns:
        return
    pads = (instruction.pad_top, instruction.pad_bottom, instruction.pad_left, instruction.pad_right)
    if instruction.memory == Memory.ACC_8BIT:
        yield "loads of bytes into accumulators exist in simulators only"
    if instruction.memory in (Memory.UOP, Memory.WGT) and any(pads):
        yield f"pads of {Memory(instruction.memory).name} are ignored by some"
    if instruction.memory == Memory.UOP and instruction.rows != 1:
        yield "micro-ops are loaded in one row"
    if instruction.memory == Memory.UOP and instruction.sram + instruction.columns > uops:
        yield f"micro-op {instruction.sram + instruction.columns - 1} is beyond the {uops} that all have"


def _loop(instruction: Instruction) -> Iterator[str]:
    if not isinstance(instruction, Loop):
        return
    if not instruction.count:
        yield "a loop without iterations is a very long one on hardware"
    if not isinstance(instruction, Alu):
        return
    if instruction.op == AluOp.MUL:
        yield "MUL exists in simulators only"
    low, high = PORTABLE_SHIFTS
    if instruction.op == AluOp.SHR and instruction.immediate is not None:
        if not low <= instruction.immediate <= high:
            yield f"shift by {instruction.immediate}, beyond {low} to {high}"
    if instruction.immediate is not None and (
        (instruction.dst_outer, instruction.dst_inner) != (instruction.src_outer, instruction.src_inner)
    ):
        yield "with an immediate some read the source: its steps must be the destination's"
