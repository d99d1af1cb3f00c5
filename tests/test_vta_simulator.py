"""The simulator against a plain interpreter of the documented semantics; its cycles against the formulas."""

from __future__ import annotations

import numpy as np
import pytest
from vta_programs import CONFIG, UOPS, product

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.config import Memory, VtaConfig
from tvm_vitq.vta.machine.cycles import count_cycles
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
    decode_uops,
    encode,
    no_op,
)
from tvm_vitq.vta.machine.order import follow
from tvm_vitq.vta.machine.simulator import Simulator


def wrapped(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def operate(op: int, left: int, right: int) -> int:
    """An ALU operation on Python's integers."""
    if op == AluOp.SHR:
        return left >> right if right >= 0 else left << -right
    if op in (AluOp.MIN, AluOp.MAX):
        return min(left, right) if op == AluOp.MIN else max(left, right)
    return left + right if op == AluOp.ADD else left * right


def interpret(machine: Simulator, loop: Loop) -> None:
    """GEMM and ALU as documented, one micro-op at a time, in Python integers."""
    for o in range(loop.outer):
        for i in range(loop.inner):
            for word in machine.uop[loop.uop_begin : loop.uop_end]:
                d, s, w = (int(v) for v in decode_uops(np.array([word]))[0])
                d += o * loop.dst_outer + i * loop.dst_inner
                s += o * loop.src_outer + i * loop.src_inner
                if isinstance(loop, Gemm):
                    w += o * loop.wgt_outer + i * loop.wgt_inner
                for lane in range(16):
                    old = int(machine.acc[d, lane])
                    if isinstance(loop, Gemm) and loop.reset:
                        machine.acc[d, lane] = 0
                        continue
                    if isinstance(loop, Gemm):
                        row = machine.wgt[w, lane].astype(int)
                        new = old + int((machine.inp[s].astype(int) * row).sum())
                    else:
                        right = int(machine.acc[s, lane]) if loop.immediate is None else loop.immediate
                        new = operate(loop.op, old, right)
                    machine.acc[d, lane] = wrapped(new)
                    machine.out[d, lane] = (wrapped(new) + 128) % 256 - 128


def machines(seed: int) -> tuple[Simulator, Simulator, np.random.Generator]:
    """Two machines with the same random contents; accumulators from the extremes too."""
    rng = np.random.default_rng(seed)
    first, second = (Simulator(CONFIG, np.zeros(1 << 16, np.uint8)) for _ in range(2))
    first.inp[:] = rng.integers(-128, 128, first.inp.shape)
    first.wgt[:] = rng.integers(-128, 128, first.wgt.shape)
    first.acc[:] = rng.choice(
        [-(2**31), 2**31 - 1, -1, 0, 300, -129, *rng.integers(-(2**20), 2**20, 50)], first.acc.shape
    )
    for name in ("inp", "wgt", "acc", "out"):
        getattr(second, name)[:] = getattr(first, name)
    return first, second, rng


def same(first: Simulator, second: Simulator) -> None:
    assert np.array_equal(first.acc, second.acc)
    assert np.array_equal(first.out, second.out)


@pytest.mark.parametrize("seed", range(12))
def test_gemm_is_as_documented(seed):
    """Steps and micro-ops of every kind: rows innermost, rows in a loop, results that meet, no rows."""
    first, second, rng = machines(seed)
    count = int(rng.integers(1, 6))
    uops = np.stack([rng.integers(0, 8, count), rng.integers(0, 30, count), rng.integers(0, 30, count)], 1)
    if seed % 3 == 0:
        uops = np.stack([np.arange(count), 3 + np.arange(count), np.full(count, 7)], 1)
    first.uop[:count] = second.uop[:count] = (uops * [1, 1 << 11, 1 << 22]).sum(1)
    steps = {
        f"{name}_{loop}": int(rng.choice([0, 1, count, 5]))
        for name in ("dst", "src", "wgt")
        for loop in ("outer", "inner")
    }
    gemm = Gemm(uop_end=count, outer=int(rng.integers(1, 5)), inner=int(rng.integers(1, 7)), **steps)
    first.execute([gemm])
    interpret(second, gemm)
    same(first, second)


def test_long_sums_are_exact():
    """128 products of -128 by -128 and 16 channels: more than float32 holds at once."""
    machine = Simulator(CONFIG, np.zeros(1 << 16, np.uint8))
    machine.inp[:] = -128
    machine.wgt[:] = -128
    machine.uop[0] = 0
    machine.acc[:] = 1
    machine.execute([Gemm(inner=1000, src_inner=1, wgt_inner=1)])
    assert (machine.acc[0] == 1 + 1000 * 16 * 2**14).all()


IMMEDIATES = [None, 0, 1, 7, 15, -1, -16]
EXTREMES = [-128, 127, 32767, -32768]


@pytest.mark.parametrize(
    ("op", "immediate"),
    [(op, value) for op in AluOp for value in IMMEDIATES + EXTREMES * (op is not AluOp.SHR)],
)
def test_alu_is_as_documented(op, immediate):
    first, second, rng = machines(int(op))
    uops = np.stack([np.arange(40), 100 + np.arange(40), np.zeros(40, int)], 1)
    first.uop[:40] = second.uop[:40] = (uops * [1, 1 << 11, 1 << 22]).sum(1)
    if op is AluOp.SHR and immediate is None:
        amounts = rng.integers(-31, 32, (600, 16))
        first.acc[100:700] = second.acc[100:700] = amounts
    alu = Alu(op=op, immediate=immediate, uop_end=40, inner=2, dst_inner=40, src_inner=40)
    first.execute([alu])
    interpret(second, alu)
    same(first, second)


@pytest.mark.parametrize("op", [AluOp.ADD, AluOp.MAX])
def test_alu_on_its_own_results(op):
    """A prefix sum: each micro-op reads what the one before wrote."""
    first, second, _ = machines(5)
    uops = np.stack([1 + np.arange(30), np.arange(30), np.zeros(30, int)], 1)
    first.uop[:30] = second.uop[:30] = (uops * [1, 1 << 11, 1 << 22]).sum(1)
    alu = Alu(op=op, uop_end=30)
    first.execute([alu])
    interpret(second, alu)
    same(first, second)


@pytest.mark.parametrize(
    "load",
    [
        Load(memory=Memory.INP, sram=3, dram=64, rows=3, columns=5, stride=9),
        Load(memory=Memory.INP, sram=3, dram=64, rows=3, columns=5, stride=0),
        Load(
            memory=Memory.INP,
            dram=64,
            rows=2,
            columns=2,
            stride=7,
            pad_top=1,
            pad_bottom=2,
            pad_left=3,
            pad_right=4,
        ),
        Load(memory=Memory.ACC, sram=9, dram=16, rows=2, columns=3, stride=4, pad_left=1),
        Load(memory=Memory.WGT, sram=9, dram=4, rows=2, columns=3, stride=4),
        Load(memory=Memory.ACC_8BIT, dram=64, rows=2, columns=3, stride=4),
        Load(memory=Memory.UOP, dram=256, rows=1, columns=30, stride=30),
        Load(memory=Memory.INP, sram=3, dram=0, rows=0, columns=0, stride=0, pad_left=1),
    ],
    ids=str,
)
def test_loads_are_as_documented(load):
    memory = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    machine = Simulator(CONFIG, memory)
    machine.inp[:], machine.wgt[:], machine.acc[:], machine.uop[:] = 5, 5, 5, 5
    size = CONFIG.element_bytes(load.memory)
    kind = {Memory.ACC: "<i4", Memory.UOP: "<u4"}.get(load.memory, "i1")
    target = {Memory.INP: machine.inp, Memory.WGT: machine.wgt, Memory.UOP: machine.uop}
    scratchpad = target.get(load.memory, machine.acc)
    expected = scratchpad.copy().reshape(len(scratchpad), -1)
    at = load.sram
    width = load.pad_left + load.columns + load.pad_right
    for row in range(-load.pad_top, load.rows + load.pad_bottom) if load.columns else ():
        expected[at : at + width] = 0
        if 0 <= row < load.rows:
            start = (load.dram + row * load.stride) * size
            found = memory[start : start + load.columns * size].view(kind).reshape(load.columns, -1)
            expected[at + load.pad_left : at + load.pad_left + load.columns] = found
        at += width
    machine.execute([load])
    assert np.array_equal(scratchpad.reshape(len(scratchpad), -1), expected)


def test_stores_cut_to_their_low_bits_and_leave_what_lies_between():
    memory = np.full(1 << 12, 9, np.uint8)
    machine = Simulator(CONFIG, memory)
    machine.acc[:6] = np.array([300, -129, 127, -128, 256, -1])[:, None]
    machine.uop[:6] = [n | n << 11 for n in range(6)]
    machine.execute(
        [
            Alu(op=AluOp.SHR, immediate=0, uop_end=6, push_next=True),
            Store(memory=Memory.OUT, dram=16, rows=2, columns=3, stride=5, pop_prev=True),
        ]
    )
    found = memory[256 : 256 + 16 * 8].view(np.int8).reshape(8, 16)
    assert found[:, 0].tolist() == [44, 127, 127, 9, 9, -128, 0, -1]
    assert (memory[:256] == 9).all() and (memory[256 + 128 :] == 9).all()


def test_results_are_what_operations_left_not_what_was_loaded():
    memory = np.ones(1 << 12, np.uint8)
    machine = Simulator(CONFIG, memory)
    machine.uop[0] = 0
    store = Store(memory=Memory.OUT, dram=16, rows=1, columns=1, stride=1, pop_prev=True)
    machine.execute(
        [
            Alu(op=AluOp.ADD, immediate=7),
            Gemm(reset=True, push_next=True),
            store,
        ]
    )
    assert (memory[256:272] == 7).all() and (machine.acc[0] == 0).all()


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("depth", [64, 192])
def test_a_product_in_tiles(contexts, depth):
    made = product(depth=depth, contexts=contexts)
    machine = Simulator(CONFIG, made.memory)
    stream = encode(made.program)
    made.memory[0x300 : 0x300 + len(stream)] = np.frombuffer(stream, np.uint8)
    machine.run(0x300, len(made.program))
    assert 0x300 + len(stream) <= UOPS
    assert np.array_equal(made.result(), made.expected)


def test_any_order_that_tokens_allow_gives_the_same():
    made = product()
    order = follow(made.program)
    position = {at: [n for n, stage in enumerate(order.stages) if stage == at] for at in range(3)}
    rng = np.random.default_rng(0)
    machine = Simulator(CONFIG, made.memory)
    done = [0, 0, 0]
    while any(done[at] < len(position[at]) for at in range(3)):
        at = int(rng.integers(3))
        if done[at] < len(position[at]) and (order.before[position[at][done[at]]] <= done).all():
            machine._step(made.program[position[at][done[at]]])
            done[at] += 1
    assert np.array_equal(made.result(), made.expected)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (Load(memory=Memory.INP, dram=0, rows=1, columns=1), "device memory for INP"),
        (Load(memory=Memory.INP, dram=250, rows=3, columns=10, stride=1), "device memory"),
        (Load(memory=Memory.INP, sram=2047, dram=1, rows=1, columns=2, stride=1), "beyond INP"),
        (Store(memory=Memory.OUT, sram=2047, dram=1, rows=1, columns=2), "beyond OUT"),
        (Gemm(outer=3, dst_outer=1024), "beyond ACC"),
        (Gemm(outer=3, src_outer=1024), "beyond INP"),
        (Gemm(outer=3, wgt_outer=512), "beyond WGT"),
        (Alu(op=0, inner=3, src_inner=1024), "beyond ACC"),
        (Alu(op=6), "no VTA ALU operation"),
        (Gemm(uop_begin=8192, uop_end=8193), "beyond UOP"),
        (Gemm(pop_prev=True), "waits for ever"),
    ],
    ids=str,
)
def test_what_cannot_run_says_so(instruction, message):
    machine = Simulator(CONFIG, np.zeros(4096, np.uint8))
    with pytest.raises(VitqError, match=rf"(?s){message}.*where: instruction 0"):
        machine.execute([instruction])


def test_more_instructions_than_memory_holds():
    with pytest.raises(VitqError, match="device memory for instructions"):
        Simulator(CONFIG, np.zeros(4096, np.uint8)).run(4000, 10)


def cycles(*program: Instruction, config: VtaConfig = CONFIG) -> int:
    """Cycles of a program beyond those of nothing."""
    empty = count_cycles([Finish()], config).total
    return count_cycles([*program, Finish()], config).total - empty


def test_loops_cost_their_micro_ops():
    loop = {"uop_end": 10, "outer": 5, "inner": 4}
    fetched = 2  # beats of one more instruction; the next ones arrive while it works
    assert cycles(Gemm(**loop)) == 200 + 7 + fetched
    assert cycles(Gemm(reset=True, **loop)) == 200 + 7 + fetched
    assert cycles(Alu(op=0, immediate=3, **loop)) == 200 + 7 + fetched
    assert cycles(Alu(op=0, **loop)) == 400 + 7 + fetched


def test_loads_cost_their_bursts():
    """22 cycles to the first beat, 2 between bursts, 2 beats an input of 16 bytes; a row is a burst."""
    row = Load(memory=Memory.INP, dram=0x400, rows=1, columns=50, stride=50, push_next=True)
    rows = Load(memory=Memory.INP, dram=0x400, rows=5, columns=10, stride=128, push_next=True)
    one = count_cycles([row, Finish(pop_prev=True)], CONFIG)
    five = count_cycles([rows, Finish(pop_prev=True)], CONFIG)
    assert one.busy["load"] == 5 + 22 + 100
    assert five.busy["load"] == 5 + 22 + 100 + 4 * 2
    assert one.read["INP"] == five.read["INP"] == 800
    long = Load(memory=Memory.WGT, dram=0x400, rows=1, columns=100, stride=100, push_next=True)
    assert count_cycles([long, Finish(pop_prev=True)], CONFIG).busy["load"] == 5 + 22 + 3200 + 12 * 2
    short = count_cycles([long, Finish(pop_prev=True)], VtaConfig(target="de10nano"))
    assert short.busy["load"] == 5 + 22 + 3200 + 199 * 2, "bursts of 128 bytes"
    wide = count_cycles([long, Finish(pop_prev=True)], VtaConfig(target="zcu104"))
    assert wide.busy["load"] == 5 + 22 + 1600 + 12 * 2, "a port twice as wide"


def test_stores_cost_their_elements_twice_over_the_port():
    store = Store(memory=Memory.OUT, dram=0x400, rows=2, columns=50, stride=128, push_prev=True)
    found = count_cycles([store, Finish(pop_next=True)], CONFIG)
    assert found.busy["store"] == 3 + 2 * (8 + 100) + 100
    assert found.written == 1600


def test_two_contexts_hide_what_one_does_not():
    two, one = (count_cycles(product(contexts=contexts).program, CONFIG) for contexts in (2, 1))
    assert two.products == one.products == 160 * 12 * 16
    assert one.total > 1.1 * two.total
    busiest = max(two.busy.values())
    assert busiest <= two.total < 1.1 * busiest + 3000, "the first loads and the last store stay"
    assert two.utilization == two.products / two.total


def test_a_stream_without_end_is_refused():
    for program in ([Finish(pop_prev=True)], [no_op(Stage.LOAD)], [Gemm(pop_next=True), Finish()]):
        with pytest.raises(VitqError, match="waits for ever"):
            count_cycles(program, CONFIG)
