"""Programs of several launches: saved, loaded, placed on devices."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.assembler import Assembler, Buffer
from tvm_vitq.vta.blocks import Matrix, pack, unpack
from tvm_vitq.vta.config import VtaConfig
from tvm_vitq.vta.device import SimulatedDevice
from tvm_vitq.vta.matmul import Epilogue, Product, Tile
from tvm_vitq.vta.program import PlacedProgram, Program

CONFIG = VtaConfig()
RNG = np.random.default_rng(0)
X, W1, W2 = (RNG.integers(-128, 128, shape).astype(np.int8) for shape in ((40, 64), (48, 64), (32, 48)))


def two_launches() -> Program:
    """(x w1.T >> 8) in one launch, its result times w2.T >> 8 in the next."""
    x, middle, y = (
        Buffer("x", 3 * 4 * 256),
        Buffer("middle", 3 * 3 * 256, written=False),
        Buffer("y", 3 * 2 * 256, written=False),
    )
    streams = {}
    for name, left, weight, right, out in (
        ("first", Matrix(x, 3, 4), W1, (3, 4), Matrix(middle, 3, 3)),
        ("second", Matrix(middle, 3, 3), W2, (2, 3), Matrix(y, 3, 2)),
    ):
        packed = pack(weight)
        constants = Buffer(name, packed.size, contents=packed.view(np.uint8).ravel())
        assembler = Assembler(CONFIG)
        epilogue = Epilogue(None, np.full(len(weight), 8))
        tile = Tile(1, 2, left.columns)
        Product(assembler, [left], Matrix(constants, *right), [out], epilogue, tile, 40, name).emit()
        streams[name] = assembler.finish()
    return Program(CONFIG, streams)


def expected() -> np.ndarray:
    middle = np.clip(X.astype(int) @ W1.T.astype(int) >> 8, -128, 127)
    return np.clip(middle @ W2.T.astype(int) >> 8, -128, 127)


def buffer(program: Program, name: str) -> Buffer:
    return next(found for found in program.buffers if found.name == name)


@pytest.mark.parametrize("saved", [False, True])
def test_a_program_runs_before_and_after_it_was_saved(saved):
    program = two_launches()
    if saved:
        program = Program.from_bytes(program.to_bytes())
    placed = PlacedProgram(program, SimulatedDevice(CONFIG, megabytes=8))
    for scale in (1, -1):
        placed.run("first", {buffer(program, "x"): pack((X * scale).astype(np.int8))})
        placed.run("second", {})
    found = placed.read(buffer(program, "y")).view(np.int8).reshape(3, 2, 16, 16)
    placed.run("first", {buffer(program, "x"): pack(X)})
    placed.run("second", {})
    again = placed.read(buffer(program, "y")).view(np.int8).reshape(3, 2, 16, 16)
    assert np.array_equal(unpack(again, 40, 32), expected()) and not np.array_equal(again, found)
    assert placed.cycles("first").total > 0
    placed.close()


def test_the_same_program_makes_the_same_file():
    assert two_launches().to_bytes() == two_launches().to_bytes()


def test_launches_must_follow_those_whose_results_they_read():
    program = two_launches()
    program.streams = dict(reversed(program.streams.items()))
    with pytest.raises(VitqError, match=r"(?s)not sound.*where: second.*uninitialized"):
        PlacedProgram(program, SimulatedDevice(CONFIG, megabytes=8))


def test_a_program_for_another_machine_is_refused():
    other = VtaConfig(log_inp_bytes=14)
    with pytest.raises(VitqError, match="for another VTA"):
        PlacedProgram(two_launches(), SimulatedDevice(other, megabytes=8))


def test_damaged_files_are_refused():
    data = two_launches().to_bytes()
    for damaged in (b"", b"text", data[:1000], data[: len(data) // 2]):
        with pytest.raises(VitqError, match="damaged"):
            Program.from_bytes(damaged, "file.so")
