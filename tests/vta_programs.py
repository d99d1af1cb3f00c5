"""A sound stream to start from: a matrix product in tiles, requantized, written by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tvm_vitq.vta.check import Region
from tvm_vitq.vta.machine.config import Memory, VtaConfig
from tvm_vitq.vta.machine.isa import (
    Alu,
    AluOp,
    Finish,
    Gemm,
    Instruction,
    Load,
    Stage,
    Store,
    encode_uops,
    no_op,
)

CONFIG = VtaConfig()
UOPS, INPUTS, WEIGHTS, RESULTS, END = 0x1000, 0x10000, 0x40000, 0x80000, 0x100000
HALF = 80
"""Rows at a time."""


@dataclass
class Product:
    """A program with its memory, and what it should leave at RESULTS."""

    program: list[Instruction]
    memory: np.ndarray
    regions: list[Region]
    rows: int
    columns: int
    expected: np.ndarray

    def result(self) -> np.ndarray:
        """What memory holds, int8 [rows, columns]."""
        found = self.memory[RESULTS : RESULTS + self.rows * self.columns].view(np.int8)
        return found.reshape(self.columns // 16, self.rows, 16).transpose(1, 0, 2).reshape(self.rows, -1)

    def changed(self, position: int, **values) -> list[Instruction]:
        """The program with other values in one instruction."""
        program = list(self.program)
        program[position] = replace(program[position], **values)
        return program


def product(depth: int = 192, columns: int = 256, contexts: int = 2, seed: int = 0) -> Product:
    """``clip((x @ w.T) >> 8)`` of 160 rows in two halves, four blocks of 16 columns at a time; with one
    context nothing overlaps.
    """
    rows, blocks, wide = 2 * HALF, depth // 16, 4
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (rows, depth)).astype(np.int8)
    w = rng.integers(-128, 128, (columns, depth)).astype(np.int8)
    memory = np.zeros(END, np.uint8)
    packed_x = x.reshape(rows, blocks, 16).transpose(1, 0, 2)
    packed_w = w.reshape(columns // 16, 16, blocks, 16).transpose(0, 2, 1, 3)
    each = np.arange(HALF)
    uops = []
    for half in range(2):
        for context in range(contexts):
            acc, inp = context * 1024 + each, half * 1024 + each
            uops.append(np.stack([acc, inp, np.full(HALF, context * 512)], 1))
    for context in range(contexts):
        acc = context * 1024 + each
        uops.append(np.stack([acc, acc, 0 * acc], 1))
    words = encode_uops(np.concatenate(uops))
    for address, data in ((UOPS, words), (INPUTS, packed_x), (WEIGHTS, packed_w)):
        data = np.ascontiguousarray(data).view(np.uint8).ravel()
        memory[address : address + len(data)] = data
    program: list[Instruction] = [
        Load(memory=Memory.UOP, dram=UOPS // 4, rows=1, columns=len(words), stride=len(words))
    ]
    tiles = columns // 16 // wide
    for number in range(2 * tiles):
        half, tile = divmod(number, tiles)
        context, later = number % contexts, number >= contexts
        last = number >= 2 * tiles - contexts
        if tile == 0:
            program.append(
                Load(
                    memory=Memory.INP,
                    sram=half * 1024,
                    dram=INPUTS // 16 + half * HALF,
                    rows=blocks,
                    columns=HALF,
                    stride=rows,
                )
            )
        count = wide * blocks
        program.append(
            Load(
                memory=Memory.WGT,
                sram=context * 512,
                dram=WEIGHTS // 256 + tile * count,
                rows=1,
                columns=count,
                stride=count,
                pop_next=later,
                push_next=True,
            )
        )
        begin = (half * contexts + context) * HALF
        plain = (2 * contexts + context) * HALF
        program.append(
            Gemm(
                reset=True,
                uop_begin=plain,
                uop_end=plain + HALF,
                inner=wide,
                dst_inner=HALF,
                pop_next=later,
            )
        )
        program.append(
            Gemm(
                uop_begin=begin,
                uop_end=begin + HALF,
                outer=wide,
                dst_outer=HALF,
                wgt_outer=blocks,
                inner=blocks,
                src_inner=HALF,
                wgt_inner=1,
                pop_prev=True,
                push_prev=not last,
            )
        )
        for op, immediate in ((AluOp.SHR, 8), (AluOp.MAX, -128), (AluOp.MIN, 127)):
            program.append(
                Alu(
                    op=op,
                    immediate=immediate,
                    uop_begin=plain,
                    uop_end=plain + HALF,
                    inner=wide,
                    dst_inner=HALF,
                    src_inner=HALF,
                    push_next=op is AluOp.MIN,
                )
            )
        program.append(
            Store(
                memory=Memory.OUT,
                sram=context * 1024,
                dram=RESULTS // 16 + half * HALF + tile * wide * rows,
                rows=wide,
                columns=HALF,
                stride=rows,
                pop_prev=True,
                push_prev=True,
            )
        )
    program += [no_op(Stage.COMPUTE, pop_next=True) for _ in range(contexts)]
    program.append(Finish())
    regions = [
        Region("micro-ops", UOPS, 4 * len(words), contents=memory[UOPS : UOPS + 4 * len(words)].copy()),
        Region("inputs", INPUTS, x.size),
        Region("weights", WEIGHTS, w.size),
        Region("results", RESULTS, rows * columns, written=False, writable=True),
    ]
    sums = x.astype(np.int64) @ w.T.astype(np.int64)
    expected = np.clip(sums >> 8, -128, 127).astype(np.int8)
    return Product(program, memory, regions, rows, columns, expected)
