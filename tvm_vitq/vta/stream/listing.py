"""Streams as text, one instruction a line."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from tvm_vitq.vta.machine.config import Memory
from tvm_vitq.vta.machine.isa import (
    Alu,
    AluOp,
    Finish,
    Gemm,
    Instruction,
    Load,
    Loop,
    Stage,
    Store,
    Transfer,
    Unknown,
    stage,
)
from tvm_vitq.vta.stream.assembler import Stream

_SYMBOLS = {AluOp.ADD: "+", AluOp.SHR: ">>", AluOp.MUL: "*"}


def stream_listing(stream: Stream) -> Iterator[str]:
    """`listing`, in which transfers name their buffers and count elements from the beginning of these."""
    return listing(
        stream.program, ["dram" if used < 0 else stream.buffers[used].name for used in stream.uses]
    )


def listing(program: Iterable[Instruction], buffers: Iterable[str] = ()) -> Iterator[str]:
    """Lines such as

    ``12 compute gemm ACC[d] += WGT[w] INP[s] | uops 3..7 x 4 (d 208, s 0, w 12) x 12 (...) | pop load``

    with the loops from the outer to the inner one, their steps in brackets, and the tokens at the end.

    Parameters
    ----------
    buffers : name of the memory that each instruction transfers to or from; "dram" if there are none.
    """
    names = itertools.chain(buffers, itertools.repeat("dram"))
    for position, (instruction, buffer) in enumerate(zip(program, names, strict=False)):
        at = stage(instruction)
        parts = [_operation(instruction, buffer), *filter(None, [_tokens(instruction, at)])]
        yield f"{position:6d} {at.name.lower() if at is not None else '?':8s}{' | '.join(parts)}"


def _operation(instruction: Instruction, buffer: str) -> str:
    if isinstance(instruction, Transfer):
        return _transfer(instruction, buffer)
    if isinstance(instruction, Gemm):
        return (
            f"gemm ACC[d] = 0{_loops(instruction)}"
            if instruction.reset
            else (f"gemm ACC[d] += WGT[w] INP[s]{_loops(instruction)}")
        )
    if isinstance(instruction, Alu):
        right = "ACC[s]" if instruction.immediate is None else str(instruction.immediate)
        name = AluOp(instruction.op).name.lower() if instruction.op in list(AluOp) else f"op{instruction.op}"
        symbol = _SYMBOLS.get(instruction.op)  # type: ignore[call-overload]
        value = f"ACC[d] {symbol} {right}" if symbol else f"{name}(ACC[d], {right})"
        return f"{name} ACC[d] = {value}{_loops(instruction)}"
    if isinstance(instruction, Unknown):
        return f"no instruction, opcode {instruction.opcode}"
    return "finish" if isinstance(instruction, Finish) else "?"


def _transfer(transfer: Transfer, buffer: str) -> str:
    verb = "store" if isinstance(transfer, Store) else "load"
    if not transfer.columns:
        return f"{verb} nothing"
    name = Memory(transfer.memory).name if transfer.memory in list(Memory) else f"memory{transfer.memory}"
    pads = [transfer.pad_top, transfer.pad_bottom, transfer.pad_left, transfer.pad_right]
    local = f"{name}[{transfer.sram}]"
    far = f"{buffer}[{transfer.dram:#x}]"
    shape = f"{transfer.rows} x {transfer.columns}, stride {transfer.stride}"
    around = f", pads {pads}" if any(pads) else ""
    return f"{verb} {local} {'<-' if isinstance(transfer, Load) else '->'} {far} | {shape}{around}"


def _loops(loop: Loop) -> str:
    text = f" | uops {loop.uop_begin}..{loop.uop_end - 1}"
    for which in ("outer", "inner"):
        times = getattr(loop, which)
        if times != 1:
            names = [("d", "dst"), ("s", "src"), *([("w", "wgt")] if isinstance(loop, Gemm) else [])]
            steps = ", ".join(f"{short} {getattr(loop, f'{name}_{which}')}" for short, name in names)
            text += f" x {times} ({steps})"
    return text


def _tokens(instruction: Instruction, at: Stage | None) -> str:
    found = []
    for action in ("pop", "push"):
        for side, step in (("prev", -1), ("next", 1)):
            if getattr(instruction, f"{action}_{side}"):
                neighbour = None if at is None else at + step
                name = Stage(neighbour).name.lower() if neighbour in (0, 1, 2) else "nobody"
                found.append(f"{action} {name}")
    return ", ".join(found)
