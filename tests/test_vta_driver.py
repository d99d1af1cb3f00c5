"""Machines behind VTA's C interface: a stand-in for one that computes, and ones that fail."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from vta_programs import CONFIG, product
from vta_stand_in import MEMORY, build, give_machine, simulated

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.isa import Finish, Load, Store, encode
from tvm_vitq.vta.runtime.device import Device, SimulatedDevice
from tvm_vitq.vta.runtime.driver import LARGEST, DriverDevice, load_driver


@pytest.fixture
def built(tmp_path):
    """Builds the stand-in, broken in a way; each time a library of its own."""
    numbers = itertools.count()
    return lambda *broken: build(tmp_path / f"libvta{next(numbers)}.so", *broken)


def run_product(device: Device) -> np.ndarray:
    """The product of `vta_programs` with its memory wherever the device has it."""
    made = product()
    whole = device.allocate(len(made.memory))
    base = whole.address
    moved = []
    for entry in made.program:
        if isinstance(entry, (Load, Store)) and entry.columns:
            entry = replace(entry, dram=entry.dram + base // CONFIG.element_bytes(entry.memory))
        moved.append(entry)
    whole.write(made.memory)
    stream = device.allocate(16 * len(moved))
    stream.write(np.frombuffer(encode(moved), np.uint8))
    device.run(stream, len(moved))
    made.memory[:] = whole.read()
    assert np.array_equal(made.result(), made.expected)
    whole.free()
    stream.free()
    device.close()
    return made.result()


def test_the_simulator_is_a_device():
    run_product(SimulatedDevice(CONFIG, size=16 << 20))


def test_a_driver_gives_the_same(built):
    library = built()
    stand_in = simulated(library)
    run_product(DriverDevice(library, CONFIG))
    assert stand_in.StandInFlushed() >= len(product().memory) <= stand_in.StandInInvalidated()


def test_memory_runs_out(built):
    with pytest.raises(VitqError, match="no VTA memory left"):
        SimulatedDevice(CONFIG, size=1 << 20).allocate((1 << 20) + 1)
    device = DriverDevice(built(), CONFIG)
    with pytest.raises(VitqError, match="no VTA memory left"):
        for _ in range(MEMORY // LARGEST + 1):
            device.allocate(LARGEST)
    with pytest.raises(VitqError, match="too large for one allocation"):
        device.allocate(LARGEST + 1)
    with pytest.raises(VitqError, match="no VTA memory left"):
        DriverDevice(built("NO_MEMORY"), CONFIG).allocate(1)


def test_drivers_that_are_none(built, tmp_path):
    with pytest.raises(VitqError, match="cannot load the VTA driver"):
        load_driver(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(VitqError, match="cannot load the VTA driver"):
        load_driver(tmp_path / "text.so")
    with pytest.raises(VitqError, match=r"(?s)lacks functions.*no VTADeviceRun\n"):
        load_driver(built("LACKS_RUN"))
    with pytest.raises(VitqError, match="finds no machine"):
        DriverDevice(built("NO_MACHINE"), CONFIG)
    with pytest.raises(VitqError, match="not aligned"):
        DriverDevice(built("UNALIGNED"), CONFIG).allocate(16)


def some_stream(device: Device):
    stream = device.allocate(16)
    stream.write(np.frombuffer(encode(Finish()), np.uint8))
    return stream


def test_a_machine_that_reports_an_error(built):
    library = built()
    kept = give_machine(library, lambda address, count: 7)
    device = DriverDevice(library, CONFIG)
    for _ in range(2):
        with pytest.raises(VitqError, match="VTADeviceRun returned 7"):
            device.run(some_stream(device), 1)
    del kept


def test_a_machine_that_hangs_is_left_alone(built):
    library = built()
    kept = give_machine(library, lambda address, count: time.sleep(2) or 0)
    device = DriverDevice(library, CONFIG, seconds=0.1)
    with pytest.raises(VitqError, match=r"no answer for 0\.1 s to 1 instructions"):
        device.run(some_stream(device), 1)
    with pytest.raises(VitqError, match="hung in an earlier run"):
        device.run(some_stream(device), 1)
    device.close()
    time.sleep(2.2)  # until the stand-in has returned into a library that is still there
    del kept


def test_devices_of_one_driver_take_turns(built):
    """They are one machine; and when it has hung, it has for all of them."""
    library = built()
    running, most = 0, 0

    def machine(address: int, count: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.1)
        running -= 1
        return 0

    kept = give_machine(library, machine)
    devices = [DriverDevice(library, CONFIG) for _ in range(2)]
    streams = [some_stream(device) for device in devices]
    threads = [
        threading.Thread(target=device.run, args=(stream, 1))
        for device, stream in zip(devices, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept and most == 1
    kept = give_machine(library, lambda address, count: time.sleep(2) or 0)
    with pytest.raises(VitqError, match="did not finish in time"):
        DriverDevice(library, CONFIG, seconds=0.1).run(streams[0], 1)
    with pytest.raises(VitqError, match="hung in an earlier run"):
        devices[1].run(streams[1], 1)
