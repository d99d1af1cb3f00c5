"""Instructions of VTA to and from bits: positions as documented, every field, any configuration."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.config import Memory, VtaConfig, config_from, read_config
from tvm_vitq.vta.machine.isa import (
    CLASSES,
    Alu,
    Finish,
    Gemm,
    Load,
    Opcode,
    Stage,
    Store,
    Unknown,
    decode,
    decode_uops,
    encode,
    encode_uops,
    indices,
    layout,
    no_op,
    stage,
)
from tvm_vitq.vta.stream.listing import listing

CONFIGS = [
    VtaConfig(),
    VtaConfig(log_block=5, log_uop_bytes=15, log_inp_bytes=16, log_wgt_bytes=20, log_acc_bytes=18),
    VtaConfig(log_uop_bytes=12, log_inp_bytes=12, log_wgt_bytes=15, log_acc_bytes=14),
]

POSITIONS = {
    Opcode.LOAD: "memory 7-9 sram 10-25 dram 26-57 rows 64-79 columns 80-95 stride 96-111 pad_top 112-115 "
    "pad_bottom 116-119 pad_left 120-123 pad_right 124-127",
    Opcode.GEMM: "reset 7-7 uop_begin 8-20 uop_end 21-34 outer 35-48 inner 49-62 dst_outer 64-74 "
    "dst_inner 75-85 src_outer 86-96 src_inner 97-107 wgt_outer 108-117 wgt_inner 118-127",
    Opcode.ALU: "reset 7-7 uop_begin 8-20 uop_end 21-34 outer 35-48 inner 49-62 dst_outer 64-74 "
    "dst_inner 75-85 src_outer 86-96 src_inner 97-107 op 108-110 use_immediate 111-111 immediate 112-127",
    Opcode.FINISH: "",
}


@pytest.mark.parametrize("opcode", POSITIONS)
def test_fields_are_where_the_default_machine_has_them(opcode):
    head = "opcode 0-2 pop_prev 3-3 pop_next 4-4 push_prev 5-5 push_next 6-6 "
    expected = [
        (name, int(low), int(high) - int(low) + 1)
        for name, low, high in re.findall(r"(\w+) (\d+)-(\d+)", head + POSITIONS[opcode])
    ]
    assert list(layout(opcode)) == expected


def test_one_instruction_by_hand():
    load = Load(memory=2, sram=5, dram=0x1234, rows=3, columns=7, stride=9, pad_left=1, push_next=True)
    word = 0 | 1 << 6 | 2 << 7 | 5 << 10 | 0x1234 << 26 | 3 << 64 | 7 << 80 | 9 << 96 | 1 << 120
    assert encode(load) == word.to_bytes(16, "little")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.text)
def test_no_field_crosses_a_word(config):
    for opcode in CLASSES:
        fields = layout(opcode, config)
        assert all(low // 64 == (low + bits - 1) // 64 for _, low, bits in fields)
        assert all(a[1] + a[2] <= b[1] for a, b in itertools.pairwise(fields))
        assert fields[-1][1] + fields[-1][2] <= 128


def random_instruction(rng: np.random.Generator, config: VtaConfig):
    opcode = int(rng.choice(list(CLASSES)))
    values = {}
    for name, _, bits in layout(opcode, config)[1:]:
        extreme = rng.integers(3)
        values[name] = int((0, (1 << bits) - 1, rng.integers(1 << bits))[extreme])
    for name in {"pop_prev", "pop_next", "push_prev", "push_next", "reset"} & set(values):
        values[name] = bool(values[name])
    if opcode == Opcode.ALU:
        use = values.pop("use_immediate")
        values["immediate"] = (values["immediate"] ^ 0x8000) - 0x8000 if use else None
    return CLASSES[opcode](**values)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.text)
def test_random_instructions_survive_their_bits(config):
    rng = np.random.default_rng(1)
    program = [random_instruction(rng, config) for _ in range(2000)]
    assert decode(encode(program, config), config) == program
    assert len(list(listing(program))) == len(program)


def test_random_words_survive_decoding_where_all_bits_mean_something():
    words = np.random.default_rng(2).integers(0, 256, (2000, 16), np.uint8)
    used = np.zeros((8, 128), bool)
    for opcode in CLASSES:
        for _, low, bits in layout(opcode):
            used[opcode, low : low + bits] = True
    for word in words:
        opcode = int(word[0]) & 7
        if opcode not in CLASSES:
            assert isinstance(decode(word.tobytes())[0], Unknown)
            continue
        bits = np.unpackbits(word, bitorder="little").astype(bool) & used[opcode]
        if opcode == Opcode.ALU and not bits[111]:
            bits[112:] = False  # an immediate that is not used
        masked = np.packbits(bits, bitorder="little").tobytes()
        assert encode(decode(masked)) == masked


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        (Load(memory=2, sram=1 << 16), "sram"),
        (Store(memory=4, stride=-1), "stride"),
        (Gemm(outer=1 << 14), "outer"),
        (Gemm(wgt_outer=1024), "wgt_outer"),
        (Alu(op=0, immediate=1 << 15), "immediate"),
    ],
)
def test_values_without_room_are_refused(instruction, name):
    with pytest.raises(VitqError, match=f"no room for {name}"):
        encode([Finish(), instruction])


def test_a_cut_stream_is_refused():
    with pytest.raises(VitqError, match="cut off"):
        decode(b"\0" * 17)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.text)
def test_micro_ops(config):
    rng = np.random.default_rng(3)
    limits = (config.depth(Memory.ACC), config.depth(Memory.INP), config.depth(Memory.WGT))
    uops = np.stack([rng.integers(0, limit, 500) for limit in limits], 1)
    assert np.array_equal(decode_uops(encode_uops(uops, config), config), uops)
    for column, limit in enumerate((limits[0], limits[0], limits[2])):
        wrong = [0, 0, 0]
        wrong[column] = limit
        with pytest.raises(VitqError, match="micro-op has no room"):
            encode_uops([wrong], config)


def test_micro_op_by_hand():
    assert encode_uops([[3, 5, 7]])[0] == 3 | 5 << 11 | 7 << 22


def test_loops_count_as_documented():
    gemm = Gemm(uop_end=2, outer=2, inner=3, dst_outer=100, dst_inner=10, src_outer=1, wgt_inner=7)
    dst, src, wgt = indices(gemm, np.array([[0, 0, 0], [1, 2, 3]]))
    expected = [
        (o * 100 + i * 10 + d, o + s, i * 7 + w)
        for o in range(2)
        for i in range(3)
        for d, s, w in ((0, 0, 0), (1, 2, 3))
    ]
    assert list(zip(dst.ravel(), src.ravel(), wgt.ravel(), strict=True)) == expected


def test_stages():
    assert [stage(Load(memory=memory)) for memory in range(6)] == [
        *(Stage.COMPUTE, Stage.LOAD, Stage.LOAD, Stage.COMPUTE, None, Stage.COMPUTE)
    ]
    assert stage(Store(memory=4)) is Stage.STORE
    assert [stage(no_op(at)) for at in Stage] == list(Stage)
    assert stage(Unknown(opcode=6)) is None


def test_listing_names_what_happens():
    lines = list(
        listing(
            [
                Load(memory=2, sram=4, dram=64, rows=2, columns=3, stride=9, push_next=True),
                Gemm(uop_begin=3, uop_end=7, inner=5, dst_inner=1, pop_prev=True),
                Alu(op=3, immediate=7),
                Alu(op=1, immediate=None),
                Unknown(opcode=7),
                Finish(),
            ]
        )
    )
    for line, text in zip(
        lines,
        (
            "load INP[4] <- dram[0x40] | 2 x 3, stride 9 | push compute",
            "gemm ACC[d] += WGT[w] INP[s] | uops 3..6 x 5 (d 1, s 0, w 0) | pop load",
            "shr ACC[d] = ACC[d] >> 7 | uops 0..0",
            "max ACC[d] = max(ACC[d], ACC[s])",
            "no instruction, opcode 7",
            "finish",
        ),
        strict=True,
    ):
        assert text in line


def test_the_configuration_file_of_the_default_machine(tmp_path):
    file = tmp_path / "vta_config.json"
    file.write_text(json.dumps(VtaConfig().to_json()))
    assert read_config(file) == VtaConfig()
    assert read_config(file).text == "1x16_i8w8a32_15_15_18_17"
    depths = [VtaConfig().depth(memory) for memory in (Memory.UOP, Memory.INP, Memory.WGT, Memory.ACC)]
    assert depths == [8192, 2048, 1024, 2048]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOG_ACC_BUFF_SIZE": 18}, "at most 2\\^11 accumulators"),
        ({"LOG_UOP_BUFF_SIZE": 16}, "LOG_UOP_BUFF_SIZE <= 15"),
        ({"LOG_WGT_BUFF_SIZE": 19}, "in 64 bits"),
        ({"LOG_INP_BUFF_SIZE": 14, "LOG_WGT_BUFF_SIZE": 19}, "in 32 bits"),
        ({"LOG_INP_BUFF_SIZE": 16, "LOG_WGT_BUFF_SIZE": 16}, "no more inputs than accumulators"),
        ({"LOG_WGT_BUFF_SIZE": 8}, "at least two elements"),
        ({"LOG_BATCH": 1}, "LOG_BATCH"),
        ({"LOG_INP_WIDTH": 4}, "inputs of 8 bits"),
        ({"LOG_BLOCK": "4"}, "LOG_BLOCK is not a small whole number"),
        ({"TARGET": "pink"}, "unknown VTA TARGET"),
        ({"LOG_BLOK": 4}, "unknown key"),
    ],
)
def test_illegal_configurations_are_refused(changes, message):
    with pytest.raises(VitqError, match=message):
        config_from({**VtaConfig().to_json(), **changes})


def test_unreadable_configurations_are_refused(tmp_path):
    with pytest.raises(VitqError, match="cannot read"):
        read_config(tmp_path / "none.json")
    file = tmp_path / "bad.json"
    for text, message in (("{", "not JSON"), ("[]", "no JSON object"), ("{}", "lacks keys")):
        file.write_text(text)
        with pytest.raises(VitqError, match=message):
            read_config(file)
