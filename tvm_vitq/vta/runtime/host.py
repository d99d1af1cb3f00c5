"""The host's side of a compiled model: the packed function by which TVM's virtual machine runs launches."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tvm_vitq import ffi
from tvm_vitq.numerics import Array
from tvm_vitq.vta.runtime.device import Device, SimulatedDevice
from tvm_vitq.vta.runtime.driver import DriverDevice
from tvm_vitq.vta.runtime.program import PlacedProgram, Program

LAUNCH = "vitq.vta.launch"
"""The packed function that runs a launch: its number, inputs, results."""

_calling = threading.local()
"""`accelerator`, the one of the library that this thread calls."""


class Accelerator:
    """A library's program on its device. To be made before a virtual machine that launches.

    Parameters
    ----------
    program : what the library launches, by number.
    driver : a shared library, see `driver.DriverDevice`; empty: the simulator.

    Raises
    ------
    VitqError : a driver that cannot be used, no memory, a stream that is not sound.
    """

    def __init__(self, program: Program, driver: str = "") -> None:
        self._names = list(program.launches)
        self._inputs = {name: len(launch.inputs) for name, launch in program.launches.items()}
        device = _device(program, driver)
        try:
            self._placed = PlacedProgram(program, device)
        except BaseException:
            device.close()
            raise
        weakref.finalize(self, _close, self._placed, device)
        ffi.runtime().register_global_func(LAUNCH, _launch, override=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Launches of this thread are this program's."""
        before = getattr(_calling, "accelerator", None)
        _calling.accelerator = self
        try:
            yield
        finally:
            _calling.accelerator = before

    def launch(self, number: int, tensors: list[Array]) -> None:
        """Runs a launch; the last tensors are its results, in memory that this writes."""
        name = self._names[number]
        count = self._inputs[name]
        for out, result in zip(tensors[count:], self._placed.run(name, *tensors[:count]), strict=True):
            np.copyto(_writable(out), result.reshape(out.shape))


def _launch(number: Any, *tensors: Any) -> None:
    arrays = [np.from_dlpack(tensor) for tensor in tensors]
    _calling.accelerator.launch(int(np.from_dlpack(number)), arrays)


def _device(program: Program, driver: str) -> Device:
    if driver:
        return DriverDevice(driver, program.config)
    return SimulatedDevice(program.config, program.memory)


def _close(placed: PlacedProgram, device: Device) -> None:
    placed.close()
    device.close()


def _writable(array: Array) -> Array:
    """The same memory; NumPy gives what DLPack lends read-only."""
    memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    return np.frombuffer(memoryview(memory), array.dtype).reshape(array.shape)
