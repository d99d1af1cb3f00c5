"""Programs of several launches: saved, loaded, placed on devices."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.runtime.device import SimulatedDevice
from tvm_vitq.vta.runtime.program import PlacedProgram, Program
from tvm_vitq.vta.stream.assembler import Assembler, Buffer
from tvm_vitq.vta.stream.blocks import Matrix, pack
from tvm_vitq.vta.stream.epilogue import Epilogue
from tvm_vitq.vta.stream.launch import Launch
from tvm_vitq.vta.stream.matmul import Product
from tvm_vitq.vta.stream.operand import Operand
from tvm_vitq.vta.stream.tiles import Tile

CONFIG = VtaConfig()
RNG = np.random.default_rng(0)
X, W1, W2 = (RNG.integers(-128, 128, shape).astype(np.int8) for shape in ((40, 64), (48, 64), (32, 48)))


def two_launches() -> Program:
    """(x w1.T >> 8) in one launch, its result times w2.T in the next, as codes and as 4 bytes."""
    x = Operand.made("x", (1, 40, 64), "int8", 16)
    middle = Operand.made("middle", (1, 40, 48), "int8", 16, written=False)
    y = Operand.made("y", (1, 40, 32), "int8", 16, written=False)
    sums = Operand.made("sums", (1, 40, 32), "int32", 16, planes=4, written=False)
    launches = {}
    eight, all_bytes = np.full(48, 8), Epilogue(None, np.zeros(32, int), None, None, planes=4)
    for name, left, weight, made in (
        ("first", x, W1, [(middle, Epilogue(None, eight))]),
        ("second", middle, W2, [(y, Epilogue(None, eight[:32])), (sums, all_bytes)]),
    ):
        packed = pack(weight)
        constants = Buffer(name, packed.size, contents=packed.view(np.uint8).ravel())
        right = Matrix(constants, *packed.shape[:2])
        assembler = Assembler(CONFIG)
        for out, epilogue in made:
            outs, tile = out.matrices(0, 16), Tile(1, 2, right.columns)
            Product(assembler, left.matrices(0, 16), right, outs, epilogue, tile, 40, name).emit()
        inputs = [x] if name == "first" else []
        launches[name] = Launch(assembler.finish(), inputs, [out for out, _ in made], 0)
    return Program(CONFIG, launches)


@pytest.mark.parametrize("saved", [False, True])
def test_a_program_runs_before_and_after_it_was_saved(saved):
    program = two_launches()
    if saved:
        program = Program.from_bytes(program.to_bytes())
    placed = PlacedProgram(program, SimulatedDevice(CONFIG, size=8 << 20))
    for x in (X, -(X // 2), X):
        (middle,) = placed.run("first", x)
        y, sums = placed.run("second")
        expected = np.clip(x.astype(int) @ W1.T.astype(int) >> 8, -128, 127)
        assert middle.dtype == y.dtype == np.int8 and sums.dtype == np.int32
        assert np.array_equal(middle[0], expected)
        assert np.array_equal(sums[0], expected @ W2.T.astype(int))
        assert np.array_equal(y[0], np.clip(sums[0] >> 8, -128, 127))
    assert placed.cycles("first").total > 0
    placed.close()


def test_tensors_of_several_matrices_and_bytes():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 4096, (3, 20, 33)).astype(np.uint16)
    operand = Operand.made("index", (3, 20, 33), "uint16", 16, planes=2)
    planes = [
        np.stack([pack((part >> shift & 255).astype(np.uint8).view(np.int8)) for part in values])
        for shift in (0, 8)
    ]
    assert [plane.size for plane in planes] == [buffer.size for buffer in operand.planes]
    found = operand.unpacked([plane.view(np.uint8) for plane in planes], 16)
    assert found.dtype == np.uint16 and np.array_equal(found, values)
    assert operand.matrices(2, 16)[1].block(1, 2) == 2 * 6 + 5
    codes = rng.integers(-128, 128, (3, 20, 33)).astype(np.int8)
    operand = Operand.made("codes", (3, 20, 33), "int8", 16)
    (packed,) = operand.packed(codes, 16)
    assert np.array_equal(operand.unpacked([packed.view(np.uint8)], 16), codes)


def test_the_same_program_makes_the_same_file():
    assert two_launches().to_bytes() == two_launches().to_bytes()


def test_launches_must_follow_those_whose_results_they_read():
    program = two_launches()
    program.launches = dict(reversed(program.launches.items()))
    with pytest.raises(VitqError, match=r"(?s)not sound.*where: second.*uninitialized"):
        PlacedProgram(program, SimulatedDevice(CONFIG, size=8 << 20))


def test_a_program_for_another_machine_is_refused():
    other = VtaConfig(log_inp_bytes=14)
    with pytest.raises(VitqError, match="for another VTA"):
        PlacedProgram(two_launches(), SimulatedDevice(other, size=8 << 20))


def test_damaged_files_are_refused():
    data = two_launches().to_bytes()
    for damaged in (b"", b"text", data[:1000], data[: len(data) // 2]):
        with pytest.raises(VitqError, match="damaged"):
            Program.from_bytes(damaged, "file.so")


def test_memory_is_given_back_when_there_is_too_little():
    """What was allocated before is free again."""
    freed = []

    class Small(SimulatedDevice):
        def allocate(self, size):
            memory = super().allocate(size)
            memory.free = lambda: freed.append(memory.address)
            return memory

    program = two_launches()
    with pytest.raises(VitqError, match="no VTA memory left"):
        PlacedProgram(program, Small(CONFIG, program.memory - 1))
    assert len(freed) == len(set(freed)) > 2
    PlacedProgram(program, Small(CONFIG, program.memory))
