"""A VTA behind a driver: a shared library with the public C interface, such as those of boards or of
upstream's simulator.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.machine.config import PAGE, VtaConfig
from tvm_vitq.vta.runtime.device import Allocation

WAIT_CYCLES = 1 << 31
"""Polls of the done flag before a driver gives up, as upstream's run time asks for."""

LARGEST = 1 << 25
"""Bytes of one allocation: VTA_MAX_XFER."""

_POINTER, _ADDRESS = ctypes.c_void_p, ctypes.c_uint32

FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "VTADeviceAlloc": (_POINTER, []),
    "VTADeviceFree": (None, [_POINTER]),
    "VTADeviceRun": (ctypes.c_int, [_POINTER, _ADDRESS, ctypes.c_uint32, ctypes.c_uint32]),
    "VTAMemAlloc": (_POINTER, [ctypes.c_size_t, ctypes.c_int]),
    "VTAMemFree": (None, [_POINTER]),
    "VTAMemGetPhyAddr": (_ADDRESS, [_POINTER]),
    "VTAMemCopyFromHost": (None, [_POINTER, _POINTER, ctypes.c_size_t]),
    "VTAMemCopyToHost": (None, [_POINTER, _POINTER, ctypes.c_size_t]),
    "VTAFlushCache": (None, [_POINTER, _ADDRESS, ctypes.c_int]),
    "VTAInvalidateCache": (None, [_POINTER, _ADDRESS, ctypes.c_int]),
}
"""Results and arguments of the interface, for 32-bit device addresses."""


def load_driver(path: str | Path) -> ctypes.CDLL:
    """A driver library with all of `FUNCTIONS`.

    Raises
    ------
    VitqError : it cannot be loaded, or lacks a function.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise VitqError(
            "cannot load the VTA driver", where=path, got=error, fix="name a shared library of this machine"
        ) from error
    missing = [name for name in FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise VitqError(
            "VTA driver lacks functions",
            where=path,
            got=f"no {', '.join(missing)}",
            expected="the functions of upstream's driver.h, with C linkage",
        )
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Machine:
    """What all devices of one driver share: they run one stream at a time, and none once it has hung."""

    def __init__(self) -> None:
        self.lock, self.hung = threading.Lock(), False


_machines: dict[Path, _Machine] = {}
"""By path of the driver."""


class DriverDevice:
    """A machine behind a driver.

    Parameters
    ----------
    path : the driver library;  config : the machine that it drives, which it cannot tell.
    seconds : how long a run may take before it counts as hung. A machine that hangs is not used again: its
        driver may still wait for it.

    Raises
    ------
    VitqError : no driver, or it finds no machine.
    """

    def __init__(self, path: str | Path, config: VtaConfig, seconds: float = 60.0) -> None:
        self.config, self._path, self._seconds = config, str(path), seconds
        self._driver = load_driver(path)
        self._handle = self._driver.VTADeviceAlloc()
        self._machine = _machines.setdefault(Path(path).resolve(), _Machine())
        if not self._handle:
            raise VitqError("VTA driver finds no machine", where=self._path)

    def allocate(self, size: int) -> _Driven:
        """See `Device`."""
        return _Driven(self._driver, size, self._path, self._machine)

    def run(self, stream: Allocation, count: int) -> None:
        """See `Device`; in a thread, so that a driver that never returns does not keep the caller."""
        with self._machine.lock:
            self._run(stream, count)

    def _run(self, stream: Allocation, count: int) -> None:
        if self._machine.hung:
            raise VitqError(
                "VTA hung in an earlier run", where=self._path, fix="reset the board, then start anew"
            )
        codes: list[int] = []
        worker = threading.Thread(
            target=lambda: codes.append(
                self._driver.VTADeviceRun(self._handle, stream.address, count, WAIT_CYCLES)
            ),
            daemon=True,
        )
        worker.start()
        worker.join(self._seconds)
        if worker.is_alive():
            self._machine.hung = True
            raise VitqError(
                "VTA did not finish in time",
                where=self._path,
                got=f"no answer for {self._seconds:g} s to {count} instructions",
            )
        if codes != [0]:
            raise VitqError(
                "VTA driver reports an error, or that the machine did not finish",
                where=self._path,
                got=f"VTADeviceRun returned {codes[0] if codes else 'nothing'}",
                expected="0",
            )

    def close(self) -> None:
        """See `Device`."""
        if self._handle and not self._machine.hung:
            self._driver.VTADeviceFree(self._handle)
        self._handle = None


class _Driven:
    def __init__(self, driver: ctypes.CDLL, size: int, path: str, machine: _Machine) -> None:
        self._driver, self.size, self._machine = driver, size, machine
        if size > LARGEST:
            raise VitqError(
                "too large for one allocation of VTA", where=path, got=f"{size} bytes", expected=f"{LARGEST}"
            )
        self._pointer = driver.VTAMemAlloc(max(size, 1), 1)
        if not self._pointer:
            raise VitqError("no VTA memory left", where=path, got=f"{size} bytes")
        self.address = int(driver.VTAMemGetPhyAddr(self._pointer))
        if self.address % PAGE or not self.address:
            raise VitqError(
                "VTA driver gives memory that is not aligned",
                where=path,
                got=f"address {self.address:#x}",
                expected=f"a multiple of {PAGE}",
            )

    def write(self, data: Array) -> None:
        """See `Allocation`."""
        flat = np.ascontiguousarray(data).view(np.uint8).ravel()
        self._driver.VTAMemCopyFromHost(self._pointer, flat.ctypes.data, flat.nbytes)
        self._driver.VTAFlushCache(self._pointer, self.address, flat.nbytes)

    def read(self) -> Array:
        """See `Allocation`."""
        found = np.empty(self.size, np.uint8)
        self._driver.VTAInvalidateCache(self._pointer, self.address, self.size)
        self._driver.VTAMemCopyToHost(found.ctypes.data, self._pointer, self.size)
        return found

    def free(self) -> None:
        """See `Allocation`; not what a machine that hangs may still write to."""
        if self._pointer and not self._machine.hung:
            self._driver.VTAMemFree(self._pointer)
        self._pointer = None
