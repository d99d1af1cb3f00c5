"""A VTA that runs streams: device memory and a machine. Here the simulator; `driver` has real ones."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.machine.config import PAGE, VtaConfig
from tvm_vitq.vta.machine.simulator import Simulator


class Allocation(Protocol):
    """Device memory.

    address : for instructions;  size : bytes.
    """

    address: int
    size: int

    def write(self, data: Array) -> None:
        """Host to device, from the beginning; `data` is any contiguous array of at most `size` bytes."""

    def read(self) -> Array:
        """Device to host, uint8 [size]."""

    def free(self) -> None:
        """Gives it back."""


class Device(Protocol):
    """Runs streams, one at a time."""

    config: VtaConfig

    def allocate(self, size: int) -> Allocation:
        """Device memory, aligned to a page. VitqError: there is none left."""

    def run(self, stream: Allocation, count: int) -> None:
        """Runs `count` instructions and returns when they are done. VitqError: they failed."""

    def close(self) -> None:
        """Gives the machine back."""


class SimulatedDevice:
    """The simulator as a device.

    Parameters
    ----------
    config : the machine.
    size : bytes of device memory; what is not used costs nothing.
    """

    def __init__(self, config: VtaConfig, size: int) -> None:
        self.config = config
        self._memory: Array = np.zeros(PAGE + size, np.uint8)
        self._simulator = Simulator(config, self._memory)
        self._end = PAGE

    def allocate(self, size: int) -> _Simulated:
        """See `Device`."""
        start = self._end
        end = start + -(-max(size, 1) // PAGE) * PAGE
        if end > len(self._memory):
            raise VitqError(
                "no VTA memory left", got=f"{size} bytes", expected=f"at most {len(self._memory) - start}"
            )
        self._end = end
        return _Simulated(self._memory[start : start + size], start)

    def run(self, stream: Allocation, count: int) -> None:
        """See `Device`."""
        self._simulator.run(stream.address, count)

    def close(self) -> None:
        """See `Device`."""


class _Simulated:
    def __init__(self, memory: Array, address: int) -> None:
        self._memory, self.address, self.size = memory, address, len(memory)

    def write(self, data: Array) -> None:
        """See `Allocation`."""
        flat = np.ascontiguousarray(data).view(np.uint8).ravel()
        self._memory[: len(flat)] = flat

    def read(self) -> Array:
        """See `Allocation`."""
        return self._memory.copy()

    def free(self) -> None:
        """Memory of the simulator lives as long as it."""
