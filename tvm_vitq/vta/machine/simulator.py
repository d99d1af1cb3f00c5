"""What a stream computes, on arrays: the machine's scratchpads, one instruction at a time.

Where implementations differ it does what hardware does: results are stored from OUT, which GEMM and ALU fill
and neither LOAD nor a reset does, and are cut to their low 8 bits. Operations that no portable stream has
(`check`) work as in the simulators of others: MUL, loads of bytes, shifts by any amount.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.machine.config import Memory, VtaConfig
from tvm_vitq.vta.machine.isa import (
    Alu,
    AluOp,
    Finish,
    Gemm,
    Instruction,
    Load,
    Store,
    Transfer,
    decode,
    decode_uops,
    indices,
)
from tvm_vitq.vta.machine.order import QUEUE_NAMES, follow

EXACT_DEPTH = 1024
"""Products of bytes whose sum float32 holds exactly: 1024 * 2^14 = 2^24."""


class Simulator:
    """A machine with its scratchpads, which keep their content from run to run, and a device memory.

    Parameters
    ----------
    config : sizes.
    memory : uint8 array, read and written in place; an address is an index. Address 0 is never valid.
    """

    def __init__(self, config: VtaConfig, memory: Array) -> None:
        self.config = config
        self.memory = memory
        block = config.block
        self.uop = np.zeros(config.depth(Memory.UOP), np.uint32)
        self.inp = np.zeros((config.depth(Memory.INP), block), np.int8)
        self.wgt = np.zeros((config.depth(Memory.WGT), block, block), np.int8)
        self.acc = np.zeros((config.depth(Memory.ACC), block), np.int32)
        self.out = np.zeros((config.depth(Memory.OUT), block), np.int8)

    def run(self, address: int, count: int) -> None:
        """Runs `count` instructions from device address `address` to their end.

        Raises
        ------
        VitqError : the stream waits for ever, or an instruction reaches beyond a scratchpad or the memory.
        """
        stream = self._bytes(address, 16 * count, "instructions").tobytes()
        self.execute(decode(stream, self.config))

    def execute(self, program: Sequence[Instruction]) -> None:
        """As `run`, for decoded instructions."""
        order = follow(program)
        if order.stuck:
            position, queue = next(iter(order.stuck.items()))
            raise VitqError(
                "VTA stream waits for ever",
                where=f"instruction {position}",
                got="no token " + (QUEUE_NAMES[queue] if queue else "frees the queue in front of it"),
            )
        for position in order.sequence:
            try:
                self._step(program[position])
            except VitqError as error:
                raise VitqError(
                    error.what, where=f"instruction {position}", got=error.got, expected=error.expected
                ) from None

    def _step(self, instruction: Instruction) -> None:
        if isinstance(instruction, Load):
            self._load(instruction)
        elif isinstance(instruction, Store):
            self._store(instruction)
        elif isinstance(instruction, Gemm):
            self._gemm(instruction)
        elif isinstance(instruction, Alu):
            self._alu(instruction)
        elif not isinstance(instruction, Finish):
            raise VitqError("no VTA instruction", got=instruction)

    def _bytes(self, address: int, count: int, what: str) -> Array:
        if address <= 0 or address + count > len(self.memory):
            raise VitqError(
                f"VTA reaches beyond the device memory for {what}",
                got=f"{count} bytes at {address:#x}",
                expected=f"addresses from 1 to {len(self.memory):#x}",
            )
        return self.memory[address : address + count]

    def _rows(self, transfer: Transfer, element_bytes: int) -> Array:
        """The transfer's bytes of device memory, [rows, columns * element_bytes], a view."""
        width = transfer.columns * element_bytes
        start, step = transfer.dram * element_bytes, transfer.stride * element_bytes
        span = self._bytes(start, (transfer.rows - 1) * step + width, Memory(transfer.memory).name)
        return np.lib.stride_tricks.as_strided(span, (transfer.rows, width), (step, 1))

    def _load(self, load: Load) -> None:
        if not load.columns:
            return
        size, memory = self.config.element_bytes(load.memory), Memory(load.memory)
        elsewhere: dict[Memory, Array] = {
            Memory.UOP: self.uop[:, None],
            Memory.INP: self.inp,
            Memory.WGT: self.wgt.reshape(len(self.wgt), -1),
        }
        scratchpad = elsewhere.get(memory, self.acc)
        kind = np.int8 if memory is Memory.ACC_8BIT else scratchpad.dtype
        found = self._rows(load, size) if load.rows else np.zeros((0, load.columns * size), np.uint8)
        elements: Array = found.view(kind).reshape(load.rows, load.columns, scratchpad.shape[1])
        sides = ((load.pad_top, load.pad_bottom), (load.pad_left, load.pad_right), (0, 0))
        elements = np.pad(elements, sides).reshape(-1, scratchpad.shape[1])
        _within(load.sram, len(elements), len(scratchpad), memory.name)
        scratchpad[load.sram : load.sram + len(elements)] = elements

    def _store(self, store: Store) -> None:
        if not store.columns or not store.rows:
            return
        count = store.rows * store.columns
        _within(store.sram, count, len(self.out), "OUT")
        found = self.out[store.sram : store.sram + count].reshape(store.rows, -1)
        self._rows(store, self.config.element_bytes(Memory.OUT))[:] = found.view(np.uint8)

    def _uops(self, loop: Gemm | Alu) -> Array:
        _within(loop.uop_begin, loop.uop_end - loop.uop_begin, len(self.uop), "UOP")
        return decode_uops(self.uop[loop.uop_begin : loop.uop_end], self.config)

    def _gemm(self, gemm: Gemm) -> None:
        if not gemm.count:
            return
        dst, src, wgt = indices(gemm, self._uops(gemm))
        _within(0, int(dst.max()) + 1, len(self.acc), "ACC")
        if gemm.reset:
            self.acc[dst.ravel()] = 0
            return
        _within(0, int(src.max()) + 1, len(self.inp), "INP")
        _within(0, int(wgt.max()) + 1, len(self.wgt), "WGT")
        axis = _row_axis(dst, wgt)
        if axis is None:
            self._products(dst.ravel(), src.ravel(), wgt.ravel())
        else:
            rows = dst.shape[axis]
            by_rows = [np.moveaxis(part, axis, -1).reshape(-1, rows) for part in (dst, src, wgt)]
            self._rows_times_weights(*by_rows)
        self.out[dst] = self.acc[dst].astype(np.int8)

    def _rows_times_weights(self, dst: Array, src: Array, wgt: Array) -> None:
        """Products of many rows with one weight element each, all [products, rows]. Those that add to the
        same rows are one matrix product: sums of integers have no order.
        """
        for first in np.unique(dst[:, 0]):
            mine = np.flatnonzero(dst[:, 0] == first)
            for part in np.array_split(mine, -(-len(mine) * self.config.block // EXACT_DEPTH)):
                left = self.inp[src[part].T].reshape(dst.shape[1], -1)
                right = self.wgt[wgt[part, 0]].transpose(0, 2, 1).reshape(left.shape[1], -1)
                sums = left.astype(np.float32) @ right.astype(np.float32)
                self.acc[dst[mine[0]]] += sums.astype(np.int32)

    def _products(self, dst: Array, src: Array, wgt: Array) -> None:
        """Any order of any elements, one at a time where results meet."""
        for start in range(0, len(dst), 4096):
            part = slice(start, start + 4096)
            left, right = self.inp[src[part]].astype(np.int32), self.wgt[wgt[part]].astype(np.int32)
            np.add.at(self.acc, dst[part], np.einsum("nc,nkc->nk", left, right))

    def _alu(self, alu: Alu) -> None:
        if not alu.count:
            return
        uops = self._uops(alu)
        dst, src, _ = (part.reshape(-1) for part in indices(alu, uops))
        _within(0, int(dst.max()) + 1, len(self.acc), "ACC")
        if alu.immediate is None:
            _within(0, int(src.max()) + 1, len(self.acc), "ACC")
        for part in _independent(dst, src if alu.immediate is None else dst[:0]):
            right = np.int32(alu.immediate) if alu.immediate is not None else self.acc[src[part]]
            self.acc[dst[part]] = operate(alu.op, self.acc[dst[part]], right)
        self.out[dst] = self.acc[dst].astype(np.int8)


def _row_axis(dst: Array, wgt: Array) -> int | None:
    """The longest loop along which results differ and weights do not, if there is one; which products meet in
    one row is the same for all its rows, as all steps are constant.
    """
    found = None
    for axis in range(3):
        results = np.moveaxis(dst, axis, 0).reshape(dst.shape[axis], -1)
        distinct = len(np.unique(results[:, 0])) == len(results)
        same = (np.take(wgt, [0], axis) == wgt).all()
        if distinct and same and (found is None or dst.shape[axis] > dst.shape[found]):
            found = axis
    return found


def _independent(dst: Array, src: Array) -> list[slice]:
    """Cuts a sequence of operations where one would read or write what an earlier one of its piece wrote."""
    if len(np.unique(dst)) == len(dst) and not np.intersect1d(dst, src).size:
        return [slice(0, len(dst))]
    return [slice(number, number + 1) for number in range(len(dst))]


def operate(op: int, left: Array, right: Array) -> Array:
    """An ALU operation on int32, which wraps.

    Raises
    ------
    VitqError : no such operation.
    """
    if op == AluOp.MIN:
        return np.minimum(left, right)
    if op == AluOp.MAX:
        return np.maximum(left, right)
    if op == AluOp.ADD:
        return left + right
    if op == AluOp.SHR:
        amount = np.broadcast_to(right, left.shape)
        down = left >> np.clip(amount, 0, 31)
        return np.where(amount >= 0, down, left << np.clip(-amount, 0, 31)).astype(np.int32)
    if op == AluOp.MUL:
        return left * right
    raise VitqError("no VTA ALU operation", got=op, expected="0 to 4")


def _within(start: int, count: int, size: int, what: str) -> None:
    if start + count > size:
        raise VitqError(
            f"VTA instruction reaches beyond {what}",
            got=f"element {start + count - 1}",
            expected=f"below {size}",
        )
