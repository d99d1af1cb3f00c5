"""Matrix products on VTA: sound streams, exact results, the cycles that their tiles promise."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.check import Region, check
from tvm_vitq.vta.machine.config import PORTABLE_UOPS, Memory, VtaConfig
from tvm_vitq.vta.machine.cycles import Cycles, count_cycles
from tvm_vitq.vta.machine.isa import Alu, AluOp, Gemm, Load, Stage
from tvm_vitq.vta.machine.order import follow
from tvm_vitq.vta.machine.simulator import Simulator
from tvm_vitq.vta.stream.assembler import Assembler, Buffer, Stream
from tvm_vitq.vta.stream.blocks import Matrix, bias_as_products, pack, unpack
from tvm_vitq.vta.stream.epilogue import Epilogue
from tvm_vitq.vta.stream.matmul import Product
from tvm_vitq.vta.stream.tiles import Tile

CONFIG = VtaConfig()
SMALL = VtaConfig(log_uop_bytes=13, log_inp_bytes=13, log_wgt_bytes=15, log_acc_bytes=15)
WIDE = VtaConfig(log_block=5, log_uop_bytes=15, log_inp_bytes=16, log_wgt_bytes=20, log_acc_bytes=18)


def run(
    stream: Stream, config: VtaConfig, filled: dict[Buffer, np.ndarray]
) -> tuple[Cycles, dict[Buffer, np.ndarray]]:
    """Checks a stream, runs it, and returns its cycles and what its buffers hold in the end."""
    memory = np.zeros(1 << 23, np.uint8)
    addresses, regions, address = [], [], 4096
    for buffer in stream.buffers:
        addresses.append(address)
        data = buffer.contents if buffer.contents is not None else filled.get(buffer)
        if data is not None:
            memory[address : address + buffer.size] = np.ascontiguousarray(data).view(np.uint8).ravel()
        regions.append(
            Region(
                buffer.name,
                address,
                buffer.size,
                contents=buffer.contents,
                written=buffer.written,
                writable=not buffer.written,
            )
        )
        address += -(-buffer.size // 4096) * 4096
    program = stream.placed(addresses, config)
    assert check(program, config, regions) == []
    Simulator(config, memory).execute(program)
    found = {
        buffer: memory[start : start + buffer.size].view(np.int8)
        for buffer, start in zip(stream.buffers, addresses, strict=True)
    }
    return count_cycles(program, config), found


def multiply(
    rows: int,
    depth: int,
    columns: int,
    tile: Tile,
    *,
    config: VtaConfig = CONFIG,
    bias: int = 1 << 17,
    shifts: tuple[int, int] = (8, 12),
    limits: tuple[int | None, int | None] = (-128, 127),
    planes: int = 1,
) -> Cycles:
    """Runs one product of random operands and compares it with NumPy; `bias` is the largest."""
    rng = np.random.default_rng(rows + depth + columns)
    x = rng.integers(-128, 128, (rows, depth)).astype(np.int8)
    w = rng.integers(-128, 128, (columns, depth)).astype(np.int8)
    added = rng.integers(-bias, bias + 1, columns) if bias else None
    shift = rng.integers(*shifts, columns)
    left, right = pack(x, config.block), pack(w, config.block)
    height, width = left.shape[0], right.shape[0]
    x_buffer = Buffer("x", left.size)
    w_buffer = Buffer("w", right.size, contents=right.view(np.uint8).ravel())
    size = height * width * config.block**2
    outs = [Buffer(f"out {plane}", size, written=False) for plane in range(planes)]
    assembler = Assembler(config)
    Product(
        assembler,
        [Matrix(x_buffer, *left.shape[:2])],
        Matrix(w_buffer, *right.shape[:2]),
        [Matrix(out, height, width) for out in outs],
        Epilogue(added, shift, *limits, planes=planes),
        tile,
        rows,
        "product",
    ).emit()
    cycles, found = run(assembler.finish(), config, {x_buffer: left})
    sums = x.astype(np.int64) @ w.T.astype(np.int64) + (0 if added is None else added)
    expected = np.clip(sums >> shift, *limits) if limits != (None, None) else sums >> shift
    result = np.zeros_like(expected)
    for plane, out in enumerate(outs):
        blocks = found[out].reshape(height, width, config.block, config.block)
        byte = unpack(blocks, rows, columns).astype(np.int64)
        result += (byte if plane == planes - 1 else byte & 255) << 8 * plane
    assert np.array_equal(result, expected)
    return cycles


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "tile"),
    [
        (197, 192, 576, (4, 6, 12)),
        (197, 192, 192, (4, 12, 12)),
        (197, 768, 192, (5, 12, 4)),
        (197, 192, 768, (5, 6, 12)),
        (196, 768, 192, (7, 6, 4)),
        (49, 96, 288, (4, 6, 6)),
        (1, 192, 1000, (1, 21, 12)),
        (2, 192, 10, (1, 1, 12)),
        (33, 40, 17, (2, 2, 3)),
        (16, 16, 16, (1, 1, 1)),
    ],
)
def test_products_of_all_sizes(rows, depth, columns, tile, contexts):
    multiply(rows, depth, columns, Tile(*tile, contexts))


@pytest.mark.parametrize(
    "how",
    [
        {"bias": 0},
        {"bias": 1 << 24},
        {"shifts": (9, 10)},
        {"shifts": (0, 1)},
        {"shifts": (0, 1), "limits": (None, None), "planes": 4},
        {"shifts": (0, 1), "limits": (None, None), "planes": 4, "bias": 0},
        {"shifts": (4, 8), "limits": (0, 4095), "planes": 2},
        {"shifts": (14, 20), "bias": 1 << 24},
        {"shifts": (17, 18), "bias": 1 << 24},
        {"shifts": (0, 16), "limits": (-8, 7)},
    ],
    ids=str,
)
def test_epilogues(how):
    multiply(53, 96, 80, Tile(2, 3, 6, 2), **how)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=lambda config: config.text)
def test_other_machines(config):
    multiply(70, 96, 130, Tile(1, 2, 3), config=config)


def test_shifts_that_differ_too_much_are_refused():
    with pytest.raises(VitqError, match=r"(?s)different amounts.*0 to 16"):
        multiply(16, 16, 300, Tile(1, 1, 1), shifts=(0, 17), bias=0)


def test_tiles_that_do_not_fit_are_refused():
    for tile in (Tile(8, 12, 12), Tile(5, 13, 1), Tile(2, 8, 12, 6), Tile(2, 2, 36)):
        with pytest.raises(VitqError, match=r"(?s)tile does not fit.*where: product"):
            multiply(197, 192 * 3, 576, tile)


@pytest.mark.parametrize("largest", [0, 126, 127, 128, 15 * 127 * 127])
def test_bias_as_products_is_exact(largest):
    rng = np.random.default_rng(largest)
    bias = np.concatenate([[largest, -largest, 0], rng.integers(-largest, largest + 1, 30)])
    vector, weights = bias_as_products(bias)
    sums = (weights.astype(np.int64) @ vector.astype(np.int64)).ravel()
    assert np.array_equal(sums[: len(bias)], bias) and not sums[len(bias) :].any()
    assert bias_as_products(np.array([15 * 127 * 127 + 127])) is None


def test_packing():
    x = np.arange(33 * 20).reshape(33, 20).astype(np.int8)
    blocks = pack(x)
    assert blocks.shape == (3, 2, 16, 16)
    assert blocks[1, 1, 2, 3] == x[18, 19] and blocks[2, 0, 1, 0] == 0
    assert np.array_equal(unpack(blocks, 33, 20), x)


def ceiling(blocks: int) -> float:
    """Share of peak that a sum of so many blocks can have with a reset, a shift and two limits."""
    return blocks / (blocks + 4)


@pytest.mark.parametrize(
    ("depth", "columns", "tile", "shifts", "share"),
    [
        (192, 768, (4, 6, 12), (9, 10), 0.89),
        (192, 576, (4, 4, 12), (8, 12), 0.84),
        (768, 192, (5, 12, 4), (9, 10), 0.93),
    ],
)
def test_multipliers_are_busy(depth, columns, tile, shifts, share):
    """Most of what the ALU leaves to the multipliers: with a bias, shifts by channel, 197 rows of 208."""
    cycles = multiply(197, depth, columns, Tile(*tile), shifts=shifts)
    useful = 197 * (depth // 16) * (columns // 16)
    assert useful / cycles.total >= share * ceiling(depth // 16)


def test_two_contexts_overlap():
    two, one = (multiply(197, 192, 576, Tile(4, 6, 12, contexts)) for contexts in (2, 1))
    assert one.total > 1.15 * two.total
    assert two.busy["compute"] > 0.95 * two.total


def test_streams_have_no_more_tokens_than_they_need():
    """No instruction waits for what another wait of its implies."""
    assembler = Assembler(CONFIG)
    x, w = Buffer("x", 256), Buffer("w", 256)
    for _ in range(2):
        assembler.load(Memory.INP, 0, x, 0, 1, 16, 16)
        assembler.load(Memory.WGT, 0, w, 0, 1, 1, 1)
        assembler.loop(_gemm(assembler))
    program = assembler.finish().program
    pops = [entry for entry in program if entry.pop_prev or entry.pop_next]
    assert len(pops) == 3, "the second load of inputs waits, that of weights need not; each GEMM waits"
    assert not follow(program).stuck


def _gemm(assembler: Assembler):
    begin, end = assembler.uops(np.stack([np.arange(16), np.arange(16), np.zeros(16, int)], 1))
    return Gemm(uop_begin=begin, uop_end=end)


def test_results_that_are_read_again_wait_for_their_store():
    """Two products in a launch, the second of the first one's result: (x w1.T >> 8) w2.T >> 8."""
    rng = np.random.default_rng(0)
    x, w1, w2 = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((40, 64), (48, 64), (32, 48)))
    assembler = Assembler(CONFIG)
    buffers = {
        name: Buffer(name, pack(data).size, contents=pack(data).view(np.uint8).ravel())
        for name, data in (("w1", w1), ("w2", w2))
    }
    first, last = Buffer("x", 3 * 4 * 256), Buffer("y", 3 * 2 * 256, written=False)
    middle = Buffer("middle", 3 * 3 * 256, written=False)
    eight = Epilogue(None, np.full(48, 8))
    hidden = Matrix(middle, 3, 3)
    Product(
        *(assembler, [Matrix(first, 3, 4)], Matrix(buffers["w1"], 3, 4), [hidden], eight),
        *(Tile(1, 2, 4), 40, "first"),
    ).emit()
    eight = Epilogue(None, np.full(32, 8))
    Product(
        *(assembler, [hidden], Matrix(buffers["w2"], 2, 3), [Matrix(last, 3, 2)], eight),
        *(Tile(1, 2, 3), 40, "second"),
    ).emit()
    stream = assembler.finish()
    _, found = run(stream, CONFIG, {first: pack(x)})
    hidden_values = np.clip(x.astype(int) @ w1.T.astype(int) >> 8, -128, 127)
    expected = np.clip(hidden_values @ w2.T.astype(int) >> 8, -128, 127)
    assert np.array_equal(unpack(found[last].reshape(3, 2, 16, 16), 40, 32), expected)
    order = follow(stream.program)
    assert max(order.before[n][Stage.STORE] for n, at in enumerate(order.stages) if at == Stage.LOAD) > 0


def test_constants_wait_for_what_is_stored_from_their_place():
    """Accumulators that are loaded anew are those that a store still reads, in the OUT buffer."""
    assembler = Assembler(CONFIG)
    table, out = (
        Buffer("table", 16 * 64, contents=np.zeros(1024, np.uint8)),
        Buffer("out", 256, written=False),
    )
    assembler.load(Memory.ACC, 0, table, 0, 1, 16, 16)
    begin, end = assembler.uops(np.stack([np.arange(16), np.arange(16), np.zeros(16, int)], 1))
    assembler.loop(Alu(op=AluOp.SHR, immediate=0, uop_begin=begin, uop_end=end))
    assembler.store(0, out, 0, 1, 16, 16)
    assembler.load(Memory.ACC, 0, table, 0, 1, 16, 16)
    loads = [i for i in assembler.finish().program if isinstance(i, Load) and i.memory == Memory.ACC]
    assert [load.pop_next for load in loads] == [False, True]


def test_a_full_scratchpad_of_micro_ops_is_loaded_anew():
    assembler = Assembler(CONFIG)
    for start in range(5):
        rows = np.zeros((1000, 3), int)
        rows[:, 0] = rows[:, 1] = start + np.arange(1000)
        begin, end = assembler.uops(rows)
        assembler.loop(Alu(op=AluOp.ADD, immediate=1, uop_begin=begin, uop_end=end))
    stream = assembler.finish()
    pages = [entry for entry in stream.program if isinstance(entry, Load) and entry.memory == Memory.UOP]
    assert [page.columns for page in pages if page.columns] == [2000, 2000, 1000]
    with pytest.raises(VitqError, match="too many micro-ops"):
        assembler.uops(np.zeros((PORTABLE_UOPS + 1, 3)))


def test_weights_as_the_left_operand_give_the_transposed_result():
    """``clip((w @ x.T + bias[:, None]) >> shift[:, None])``: values for attention, with tokens as columns."""
    rng = np.random.default_rng(1)
    x, w = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((197, 192), (64, 192)))
    bias, shift = rng.integers(-(2**17), 2**17, 64), rng.integers(8, 12, 64)
    left, right = pack(w), pack(x)
    weights = Buffer("w", left.size, contents=left.view(np.uint8).ravel())
    inputs, out = Buffer("x", right.size), Buffer("out", 4 * 13 * 256, written=False)
    assembler = Assembler(CONFIG)
    Product(
        *(assembler, [Matrix(weights, 4, 12)], Matrix(inputs, 13, 12), [Matrix(out, 4, 13)]),
        *(Epilogue(bias, shift, by_rows=True), Tile(2, 7, 12), 64, "values"),
    ).emit()
    _, found = run(assembler.finish(), CONFIG, {inputs: right})
    sums = w.astype(np.int64) @ x.T.astype(np.int64) + bias[:, None]
    expected = np.clip(sums >> shift[:, None], -128, 127)
    assert np.array_equal(unpack(found[out].reshape(4, 13, 16, 16), 64, 197), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_left_operands_of_two_bytes(bias):
    """``(256 high + low) @ right.T``, as for probabilities of up to 16 bits."""
    rng = np.random.default_rng(2)
    high, low = (rng.integers(-64, 65, (50, 197)).astype(np.int8) for _ in range(2))
    v = rng.integers(-128, 128, (64, 197)).astype(np.int8)
    added = rng.integers(-(2**20), 2**20, 64) if bias else None
    lefts = [Buffer(name, pack(high).size) for name in ("high", "low")]
    right = Buffer("v", pack(v).size)
    outs = [Buffer(f"out {plane}", 4 * 4 * 256, written=False) for plane in range(4)]
    assembler = Assembler(CONFIG)
    Product(
        *(assembler, [Matrix(left, 4, 13) for left in lefts], Matrix(right, 4, 13)),
        *([Matrix(out, 4, 4) for out in outs], Epilogue(added, np.zeros(64, int), None, None, planes=4)),
        *(Tile(2, 4, 13), 50, "attention"),
    ).emit()
    filled = {lefts[0]: pack(high), lefts[1]: pack(low), right: pack(v)}
    _, found = run(assembler.finish(), CONFIG, filled)
    result = np.zeros((50, 64), np.int64)
    for plane, out in enumerate(outs):
        byte = unpack(found[out].reshape(4, 4, 16, 16), 50, 64).astype(np.int64)
        result += (byte if plane == 3 else byte & 255) << 8 * plane
    expected = (256 * high.astype(np.int64) + low) @ v.T.astype(np.int64)
    assert np.array_equal(result, expected + (0 if added is None else added))
