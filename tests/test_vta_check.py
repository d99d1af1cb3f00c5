"""Every way in which a stream is known to go wrong is found before it runs, and a sound one passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from vta_programs import CONFIG, INPUTS, RESULTS, product

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.check import Region, check, require_sound
from tvm_vitq.vta.machine.config import Memory
from tvm_vitq.vta.machine.isa import (
    Alu,
    AluOp,
    Finish,
    Gemm,
    Instruction,
    Load,
    Stage,
    Store,
    Unknown,
    encode_uops,
    no_op,
)
from tvm_vitq.vta.machine.order import QUEUED, follow

UOP_LOAD, INP_LOAD, WGT_LOAD, RESET, GEMM, SHIFT, STORE = 0, 1, 2, 3, 4, 5, 8
"""Positions of the first of each kind in `product`."""


def rules(program, regions) -> set[str]:
    return {finding.rule for finding in check(program, CONFIG, regions)}


@pytest.fixture(scope="module")
def sound():
    return product()


@pytest.mark.parametrize("contexts", [1, 2])
def test_a_sound_stream_passes(contexts):
    made = product(contexts=contexts)
    assert check(made.program, CONFIG, made.regions) == []
    require_sound(made.program, CONFIG, made.regions, "a product")


def test_the_error_says_what_and_where(sound):
    with pytest.raises(VitqError, match=r"(?s)not sound.*where: fc1.*instruction 8: .*\(overrun\)"):
        program = sound.changed(STORE, dram=RESULTS // 16 + 1000, rows=40)
        require_sound(program, CONFIG, sound.regions, "fc1")


@pytest.mark.parametrize(
    ("position", "values", "rule"),
    [
        (INP_LOAD, {"memory": Memory.OUT}, "memory"),
        (INP_LOAD, {"memory": 6}, "memory"),
        (STORE, {"memory": Memory.ACC}, "memory"),
        (SHIFT, {"op": 5}, "opcode"),
        (WGT_LOAD, {"pop_prev": True}, "token-side"),
        (WGT_LOAD, {"push_prev": True}, "token-side"),
        (STORE, {"pop_next": True}, "token-side"),
        (STORE, {"push_next": True}, "token-side"),
        (INP_LOAD, {"sram": 2000}, "scratchpad"),
        (INP_LOAD, {"rows": 15, "pad_left": 15, "pad_top": 15, "columns": 100}, "scratchpad"),
        (STORE, {"sram": 1800}, "scratchpad"),
        (GEMM, {"uop_begin": 8190, "uop_end": 8194}, "scratchpad"),
        (INP_LOAD, {"dram": 0}, "unmapped"),
        (INP_LOAD, {"dram": 0x200000}, "unmapped"),
        (INP_LOAD, {"dram": INPUTS // 16 + 100}, "overrun"),
        (STORE, {"dram": INPUTS // 16}, "read-only"),
        (STORE, {"pad_top": 1}, "pads"),
        (INP_LOAD, {"rows": 0}, "rows"),
        (GEMM, {"outer": 40}, "scratchpad"),
        (GEMM, {"src_inner": 200}, "scratchpad"),
        (GEMM, {"wgt_outer": 500}, "scratchpad"),
        (INP_LOAD, {"columns": 79}, "uninitialized"),
        (WGT_LOAD, {"columns": 47}, "uninitialized"),
        (UOP_LOAD, {"columns": 400}, "uninitialized"),
        (RESET, {"inner": 3}, "uninitialized"),
        (STORE, {"sram": 0, "rows": 5, "stride": 100}, "uninitialized"),
        (GEMM, {"inner": 0}, "portable"),
        (SHIFT, {"op": AluOp.MUL}, "portable"),
        (SHIFT, {"immediate": 16}, "portable"),
        (SHIFT, {"immediate": -17}, "portable"),
        (SHIFT, {"src_inner": 0}, "portable"),
        (UOP_LOAD, {"sram": 2000}, "portable"),
        (GEMM, {"push_prev": False}, "deadlock"),
        (STORE, {"push_prev": False}, "deadlock"),
        (WGT_LOAD, {"push_next": False}, "deadlock"),
        (INP_LOAD, {"push_next": True}, "token-left"),
        (GEMM, {"pop_prev": False}, "race"),
    ],
)
def test_one_wrong_value(sound, position, values, rule):
    assert rule in rules(sound.changed(position, **values), sound.regions)


def without(program: list[Instruction], position: int) -> list[Instruction]:
    return program[:position] + program[position + 1 :]


def test_unknown_opcodes(sound):
    assert rules([Unknown(opcode=6), *sound.program], sound.regions) == {"opcode"}


def test_finish_is_there_once_and_last(sound):
    program = sound.program
    assert rules(program[:-1], sound.regions) == {"finish"}
    assert rules([*program, Finish()], sound.regions) == {"finish"}
    assert rules([*program[:-1], Finish(), no_op(Stage.STORE)], sound.regions) == {"finish"}
    assert rules([*program[:-1], no_op(Stage.STORE), Finish()], sound.regions) == {"finish"}
    assert rules([*program[:-1], no_op(Stage.LOAD), Finish()], sound.regions) == {"finish"}


def test_finish_that_does_not_wait_for_the_last_store(sound):
    assert rules(without(sound.program, len(sound.program) - 2), sound.regions) == {"finish", "token-left"}


def test_a_cycle_of_tokens():
    program = [
        no_op(Stage.LOAD, pop_next=True, push_next=True),
        no_op(Stage.COMPUTE, pop_prev=True, push_prev=True),
        Finish(),
    ]
    assert rules(program, []) == {"deadlock"}


def test_more_tokens_than_a_queue_keeps():
    program: list[Instruction] = [no_op(Stage.LOAD, push_next=True) for _ in range(256)]
    program += [no_op(Stage.COMPUTE, pop_prev=True) for _ in range(256)]
    assert rules([*program, Finish()], []) == {"token-lost"}
    assert rules([*program[1:256], *program[257:], Finish()], []) == set()


def test_more_instructions_in_front_of_a_token_than_a_queue_holds():
    waiting: list[Instruction] = [no_op(Stage.STORE, pop_prev=True, push_prev=True)]
    waiting += [no_op(Stage.STORE)] * QUEUED
    rest = [no_op(Stage.COMPUTE, push_next=True), no_op(Stage.COMPUTE, pop_next=True)]
    program = [*waiting[:-1], *rest, no_op(Stage.STORE, push_prev=True), Finish(pop_next=True)]
    assert rules(program, []) == set()
    program = [*waiting, *rest, no_op(Stage.STORE, push_prev=True), Finish(pop_next=True)]
    assert rules(program, []) == {"deadlock"}


def tokenless(program: list[Instruction], position: int, name: str) -> list[Instruction]:
    """The program without a token: the push `name` at `position`, and the pop that it meets."""
    order = follow(program)
    pops = {"push_next": "pop_prev", "push_prev": "pop_next"}
    reader = next(
        at
        for (at, queue), pusher in order.waits.items()
        if pusher == position and (queue[1] > queue[0]) == (name == "push_next")
    )
    program = list(program)
    program[position] = replace(program[position], **{name: False})
    program[reader] = replace(program[reader], **{pops[name]: False})
    return program


def test_every_token_is_needed(sound):
    """Without any one of them something is unordered, though a run may give the right bytes. Only the last
    but one store need not be waited for: the last one is.
    """
    spare = [
        (position, name)
        for position, instruction in enumerate(sound.program)
        for name in ("push_prev", "push_next")
        if getattr(instruction, name)
        and not rules(tokenless(sound.program, position, name), sound.regions) & {"race", "finish"}
    ]
    stores = [position for position, entry in enumerate(sound.program) if isinstance(entry, Store)]
    assert spare == [(stores[-2], "push_prev")]


def uops_region(rows: list[list[int]]) -> tuple[Instruction, Region]:
    words = encode_uops(np.array(rows))
    load = Load(memory=Memory.UOP, dram=0x400, rows=1, columns=len(words), stride=len(words))
    return load, Region("micro-ops", 0x1000, 4 * len(words), contents=words.view(np.uint8))


def on_accumulators(rows: list[list[int]], *program: Instruction, contents=None) -> set[str]:
    """Rules that a program on four loaded accumulators breaks."""
    load, region = uops_region(rows)
    data = Region("data", 0x2000, 256, contents=contents)
    results = Region("results", 0x3000, 256, written=False, writable=True)
    acc = Load(memory=Memory.ACC, dram=0x2000 // 64, rows=1, columns=4, stride=4)
    return rules([load, acc, *program, Finish()], [region, data, results])


def test_near_micro_ops():
    each = [[n, n, 0] for n in range(4)]
    add = Alu(op=AluOp.ADD, immediate=1, uop_end=4)
    assert on_accumulators(each, add) == set()
    assert on_accumulators([[0, 0, 0], [0, 0, 0]], Alu(op=AluOp.ADD, immediate=1, uop_end=2)) == {"near"}
    again = [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert on_accumulators(again, Alu(op=AluOp.ADD, immediate=1, uop_end=3)) == {"near"}
    two = Alu(op=AluOp.ADD, immediate=1, uop_end=2, inner=2)
    assert on_accumulators(each, two) == {"near"}, "loop boundaries count"
    follows = [[0, 3, 0], [1, 0, 0]]
    assert on_accumulators(follows, Alu(op=AluOp.ADD, uop_end=2)) == {"near"}


def test_amounts_of_shifts_from_accumulators():
    rows = [[0, 3, 0]]
    shift = Alu(op=AluOp.SHR)
    amounts = np.zeros(64, np.int32)
    assert on_accumulators(rows, shift) == {"portable"}, "not known"
    assert on_accumulators(rows, shift, contents=amounts.view(np.uint8)) == set()
    for wrong in (16, -1):
        amounts[50] = wrong
        assert on_accumulators(rows, shift, contents=amounts.view(np.uint8)) == {"portable"}
    amounts[50] = 15
    add = Alu(op=AluOp.ADD, immediate=1, uop_begin=1, uop_end=2)
    assert on_accumulators([*rows, [3, 3, 0]], add, shift, contents=amounts.view(np.uint8)) == {"portable"}


def test_an_immediate_whose_source_is_another():
    assert on_accumulators([[0, 1, 0]], Alu(op=AluOp.ADD, immediate=1)) == {"portable"}


@pytest.mark.parametrize("stale", ["load", "reset"])
def test_results_that_no_operation_made(stale):
    rows = [[n, n, 0] for n in range(4)]
    store = Store(memory=Memory.OUT, dram=0x300, rows=1, columns=4, stride=4, pop_prev=True, push_prev=True)
    push, pop = no_op(Stage.COMPUTE, push_next=True), no_op(Stage.COMPUTE, pop_next=True)
    reset = Gemm(reset=True, uop_end=4)
    touch = Alu(op=AluOp.SHR, immediate=0, uop_end=4)
    assert on_accumulators(rows, touch, push, store, pop) == set()
    if stale == "reset":
        assert on_accumulators(rows, touch, reset, push, store, pop) == {"stale"}
    else:
        again = Load(memory=Memory.ACC, dram=0x2000 // 64, rows=1, columns=4, stride=4)
        assert on_accumulators(rows, touch, again, push, store, pop) == {"stale"}
        assert "uninitialized" in on_accumulators(rows, push, store, pop)


def test_results_read_back_need_tokens_all_the_way():
    """A store is read by a later load of the same launch: store to compute to load."""
    rows = [[n, n, 0] for n in range(4)]
    store = Store(memory=Memory.OUT, dram=0x300, rows=1, columns=4, stride=4, pop_prev=True, push_prev=True)
    load = Load(memory=Memory.INP, dram=0x300, rows=1, columns=4, stride=4, push_next=True)
    touch = Alu(op=AluOp.SHR, immediate=0, uop_end=4, push_next=True)
    ordered = no_op(Stage.COMPUTE, pop_next=True, push_prev=True)
    end = no_op(Stage.COMPUTE, pop_prev=True)
    assert on_accumulators(rows, touch, store, ordered, replace(load, pop_next=True), end) == set()
    assert "race" in on_accumulators(rows, touch, store, no_op(Stage.COMPUTE, pop_next=True), load, end)


def test_pads_and_loads_that_only_some_have(sound):
    assert "portable" in rules(sound.changed(WGT_LOAD, columns=47, pad_right=1), sound.regions)
    load, region = uops_region([[0, 0, 0]])
    data = Region("data", 0x2000, 256)
    bytes_ = Load(memory=Memory.ACC_8BIT, dram=0x200, rows=1, columns=4, stride=4)
    assert rules([load, bytes_, Finish()], [region, data]) == {"portable"}


def test_micro_ops_must_be_known(sound):
    regions = [
        Region("micro-ops", region.address, region.size) if region.name == "micro-ops" else region
        for region in sound.regions
    ]
    assert "uninitialized" in rules(sound.program, regions)


def test_addresses_fit_32_bits():
    load = Load(memory=Memory.WGT, dram=1 << 24, rows=1, columns=1, stride=1, push_next=True)
    program = [load, Finish(pop_prev=True)]
    assert rules(program, [Region("far", 1 << 32, 256)]) == {"address"}
