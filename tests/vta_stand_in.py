"""A driver of VTA for tests: the C stand-in, whose machine is the simulator or what a test gives it."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
from vta_programs import CONFIG

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.simulator import Simulator

SOURCE = Path(__file__).with_name("vta_stand_in.c")
MEMORY = 1 << 26
MACHINE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32)


def build(library: Path, *broken: str) -> Path:
    """The stand-in, broken in a way; where several are in use, each needs a file of its own."""
    flags = [f"-D{name}" for name in broken]
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", *flags, str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def give_machine(library: Path, machine) -> ctypes.CDLL:
    """Hands a function over to the stand-in, which is to be kept as long as it may be called."""
    stand_in = ctypes.CDLL(str(library))
    stand_in.kept = MACHINE(machine)
    stand_in.StandInMachine(stand_in.kept)
    return stand_in


def simulated(library: Path) -> ctypes.CDLL:
    """A stand-in with the simulator as its machine."""
    stand_in = ctypes.CDLL(str(library))
    stand_in.StandInMemory.restype = ctypes.POINTER(ctypes.c_uint8)
    memory = np.ctypeslib.as_array(stand_in.StandInMemory(), (MEMORY,))
    simulator = Simulator(CONFIG, memory)

    def run(address: int, count: int) -> int:
        try:
            simulator.run(address, count)
        except VitqError:
            return 1
        return 0

    return give_machine(library, run)
