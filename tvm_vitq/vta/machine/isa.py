"""Instructions and micro-ops of VTA, to and from their bits.

    >>> decode(encode(Load(memory=Memory.INP, sram=0, dram=64, rows=1, columns=16, stride=16)))[0].columns
    16

An instruction has 128 bits in two words, the lowest bit first. Fields follow each other upwards, and one that
would cross into the next word starts there. Widths of indices come from the configuration.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.machine.config import INSTRUCTION_BYTES, Memory, VtaConfig

DEFAULT = VtaConfig()


class Stage(IntEnum):
    """Units that run at the same time, neighbours in this order."""

    LOAD = 0
    COMPUTE = 1
    STORE = 2


class Opcode(IntEnum):
    """Bits 0 to 2 of an instruction."""

    LOAD = 0
    STORE = 1
    GEMM = 2
    FINISH = 3
    ALU = 4


class AluOp(IntEnum):
    """Operations on int32 lanes. SHR is arithmetic and shifts left by negative amounts; MUL is not in every
    implementation.
    """

    MIN = 0
    MAX = 1
    ADD = 2
    SHR = 3
    MUL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """Tokens that it waits for before it starts, and gives when it is done; "previous" and "next" are the
    neighbours of its stage.
    """

    pop_prev: bool = False
    pop_next: bool = False
    push_prev: bool = False
    push_next: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer(Instruction):
    """`rows` times `columns` elements between a scratchpad, densely from `sram`, and device memory, a row
    every `stride` elements from element `dram` (an address divided by the element's bytes). `columns` 0 moves
    nothing.
    """

    memory: int
    sram: int = 0
    dram: int = 0
    rows: int = 0
    columns: int = 0
    stride: int = 0
    pad_top: int = 0
    pad_bottom: int = 0
    pad_left: int = 0
    pad_right: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Transfer):
    """Device memory to scratchpad; pads are elements of zeros around the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Store(Transfer):
    """OUT to device memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop(Instruction):
    """For o below `outer`, for i below `inner`, for each micro-op from `uop_begin` to before `uop_end`: an
    operation on the element at ``dst + o dst_outer + i dst_inner``, and src alike.
    """

    reset: bool = False
    uop_begin: int = 0
    uop_end: int = 1
    outer: int = 1
    inner: int = 1
    dst_outer: int = 0
    dst_inner: int = 0
    src_outer: int = 0
    src_inner: int = 0

    @property
    def count(self) -> int:
        """Micro-ops executed."""
        return self.outer * self.inner * max(self.uop_end - self.uop_begin, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm(Loop):
    """``ACC[dst] += WGT[wgt] @ INP[src]``; with `reset` ``ACC[dst] = 0``."""

    wgt_outer: int = 0
    wgt_inner: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alu(Loop):
    """``ACC[dst] = op(ACC[dst], immediate)``, or ACC[src] in place of an immediate that is None."""

    op: int
    immediate: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish(Instruction):
    """The end: the host is told that everything is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown(Instruction):
    """Bits that are no instruction."""

    opcode: int


_HEAD = (("opcode", 3), ("pop_prev", 1), ("pop_next", 1), ("push_prev", 1), ("push_next", 1))
_TRANSFER = (
    *(("memory", 3), ("sram", 16), ("dram", 32), ("rows", 16), ("columns", 16), ("stride", 16)),
    *(("pad_top", 4), ("pad_bottom", 4), ("pad_left", 4), ("pad_right", 4)),
)
CLASSES: dict[int, type[Instruction]] = {
    Opcode.LOAD: Load,
    Opcode.STORE: Store,
    Opcode.GEMM: Gemm,
    Opcode.FINISH: Finish,
    Opcode.ALU: Alu,
}
_OPCODES = {kind: opcode for opcode, kind in CLASSES.items()}

Field = tuple[str, int, int]
"""Name, lowest bit, bits."""


@functools.cache
def layout(opcode: int, config: VtaConfig = DEFAULT) -> tuple[Field, ...]:
    """Where the fields of an instruction are."""
    a, i, w, u = config.log_accs, config.log_inps, config.log_wgts, config.log_uops
    loop = (("reset", 1), ("uop_begin", u), ("uop_end", u + 1), ("outer", 14), ("inner", 14))
    steps = (("dst_outer", a), ("dst_inner", a))
    body: tuple[tuple[str, int], ...] = {
        Opcode.LOAD: _TRANSFER,
        Opcode.STORE: _TRANSFER,
        Opcode.GEMM: (
            *(*loop, *steps, ("src_outer", i), ("src_inner", i)),
            *(("wgt_outer", w), ("wgt_inner", w)),
        ),
        Opcode.ALU: (
            *(*loop, *steps, ("src_outer", a), ("src_inner", a)),
            *(("op", 3), ("use_immediate", 1), ("immediate", 16)),
        ),
    }.get(Opcode(opcode), ())
    found: list[Field] = []
    at = 0
    for name, bits in (*_HEAD, *body):
        if at // 64 != (at + bits - 1) // 64:
            at = 64
        found.append((name, at, bits))
        at += bits
    return tuple(found)


def encode(program: Instruction | Iterable[Instruction], config: VtaConfig = DEFAULT) -> bytes:
    """The bits of instructions, 16 bytes each.

    Raises
    ------
    VitqError : a value that its field cannot hold.
    """
    if isinstance(program, Instruction):
        program = [program]
    return b"".join(_encode(number, entry, config) for number, entry in enumerate(program))


def _encode(number: int, instruction: Instruction, config: VtaConfig) -> bytes:
    opcode = instruction.opcode if isinstance(instruction, Unknown) else _OPCODES[type(instruction)]
    known = Opcode.FINISH if isinstance(instruction, Unknown) else opcode
    word = 0
    for name, at, bits in layout(known, config):
        word |= _bits(number, instruction, opcode, name, bits) << at
    return word.to_bytes(INSTRUCTION_BYTES, "little")


def _bits(number: int, instruction: Instruction, opcode: int, name: str, bits: int) -> int:
    if name == "opcode":
        return opcode
    if name == "use_immediate":
        return int(isinstance(instruction, Alu) and instruction.immediate is not None)
    value = int(getattr(instruction, name) or 0)
    low, high = (-(1 << 15), 1 << 15) if name == "immediate" else (0, 1 << bits)
    if not low <= value < high:
        raise VitqError(
            f"VTA instruction has no room for {name}",
            where=f"instruction {number}, {type(instruction).__name__.lower()}",
            got=value,
            expected=f"{low} to {high - 1}",
            fix="use smaller tiles",
        )
    return value & ((1 << bits) - 1)


def decode(stream: bytes, config: VtaConfig = DEFAULT) -> list[Instruction]:
    """The instructions of a stream; what no opcode names becomes `Unknown`.

    Raises
    ------
    VitqError : a length that is no multiple of 16 bytes.
    """
    if len(stream) % INSTRUCTION_BYTES:
        raise VitqError("VTA stream is cut off", got=f"{len(stream)} bytes", expected="a multiple of 16")
    words = np.frombuffer(stream, "<u8").reshape(-1, 2).tolist()
    return [_decode(low | high << 64, config) for low, high in words]


def _decode(word: int, config: VtaConfig) -> Instruction:
    opcode = word & 7
    kind = CLASSES.get(opcode)
    found = layout(opcode if kind else Opcode.FINISH, config)
    values: dict[str, Any] = {name: word >> at & ((1 << bits) - 1) for name, at, bits in found[1:]}
    for name in ("pop_prev", "pop_next", "push_prev", "push_next", "reset"):
        if name in values:
            values[name] = bool(values[name])
    if kind is None:
        return Unknown(opcode=opcode, **values)
    if kind is Alu:
        immediate = (values["immediate"] ^ 0x8000) - 0x8000
        values["immediate"] = immediate if values.pop("use_immediate") else None
    return kind(**values)


def stage(instruction: Instruction) -> Stage | None:
    """The unit that runs an instruction; None if the fetch unit knows none for it."""
    if isinstance(instruction, Load):
        if instruction.memory in (Memory.INP, Memory.WGT):
            return Stage.LOAD
        return Stage.COMPUTE if instruction.memory in (Memory.UOP, Memory.ACC, Memory.ACC_8BIT) else None
    if isinstance(instruction, Store):
        return Stage.STORE
    return None if isinstance(instruction, Unknown) else Stage.COMPUTE


def encode_uops(uops: Array, config: VtaConfig = DEFAULT) -> Array:
    """Micro-ops [n, 3], rows of (dst, src, wgt), as uint32 [n].

    Raises
    ------
    VitqError : an index beyond its field.
    """
    uops = np.asarray(uops, np.int64).reshape(-1, 3)
    widths = (config.log_accs, config.log_accs, config.log_wgts)
    word = np.zeros(len(uops), np.int64)
    at = 0
    for column, bits in enumerate(widths):
        value = uops[:, column]
        if len(value) and not 0 <= value.min() <= value.max() < 1 << bits:
            raise VitqError(
                f"VTA micro-op has no room for {('dst', 'src', 'wgt')[column]}",
                got=f"{value.min()} to {value.max()}",
                expected=f"0 to {(1 << bits) - 1}",
            )
        word |= value << at
        at += bits
    return word.astype(np.uint32)


def decode_uops(words: Array, config: VtaConfig = DEFAULT) -> Array:
    """int64 [n, 3], rows of (dst, src, wgt), of micro-ops uint32 [n]."""
    a, w = config.log_accs, config.log_wgts
    word = np.asarray(words, np.uint32).astype(np.int64)
    mask = (1 << a) - 1
    return np.stack([word & mask, word >> a & mask, word >> 2 * a & ((1 << w) - 1)], axis=1)


def indices(loop: Loop, uops: Array) -> tuple[Array, Array, Array]:
    """Elements that each execution of a micro-op addresses, (dst, src, wgt), int64 [outer, inner, micro-ops],
    in the order of execution.

    Parameters
    ----------
    uops : int64 [n, 3], those from `uop_begin` to before `uop_end`.
    """
    outer = np.arange(loop.outer)[:, None, None]
    inner = np.arange(loop.inner)[None, :, None]
    wgt = (loop.wgt_outer, loop.wgt_inner) if isinstance(loop, Gemm) else (0, 0)
    steps = ((loop.dst_outer, loop.dst_inner), (loop.src_outer, loop.src_inner), wgt)
    dst, src, weight = (uops[:, column] + outer * o + inner * i for column, (o, i) in enumerate(steps))
    return dst, src, weight


def tokens(instruction: Instruction) -> tuple[bool, bool, bool, bool]:
    """(pop_prev, pop_next, push_prev, push_next)."""
    return instruction.pop_prev, instruction.pop_next, instruction.push_prev, instruction.push_next


def no_op(stage_: Stage, **flags: bool) -> Transfer:
    """An instruction of a stage that only moves tokens."""
    kind = Store if stage_ is Stage.STORE else Load
    return kind(
        memory={Stage.LOAD: Memory.INP, Stage.COMPUTE: Memory.UOP, Stage.STORE: Memory.OUT}[stage_], **flags
    )
