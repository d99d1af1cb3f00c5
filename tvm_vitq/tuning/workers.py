"""What runs in processes of its own: building a candidate, and checking and timing it.

Workers import the kernels and TVM, nothing else; they are started once and used for many candidates. A
candidate that crashes or hangs takes its worker with it, not the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tvm_vitq import ffi
from tvm_vitq.numerics import Array
from tvm_vitq.targets import TargetProfile


@dataclass(frozen=True)
class Device:
    """Where candidates run.

    tracker : (host, port, key) of an RPC tracker; None: this machine.
    threads : of the kernels' thread pool; 0: one per core.
    repeat : timings of a candidate;  least_ms : each lasts at least this long, short enough that some of them
        are not interrupted on a busy machine.
    """

    tracker: tuple[str, int, str] | None = None
    threads: int = 0
    repeat: int = 30
    least_ms: int = 3


def build(spec: Any, profile: TargetProfile, path: str) -> str:
    """Compiles the kernel into a library at `path`."""
    import tvm

    from tvm_vitq.linker import link

    kernel = spec.kernel()
    executable = tvm.compile(tvm.IRModule({kernel.name: kernel.func}), profile.target)
    executable.export_library(path, fcompile=link)
    return path


@dataclass(frozen=True)
class Candidate:
    """A library with a kernel `name`, and the operands of a call."""

    path: str
    name: str
    operands: list[Array]


def measure(
    candidates: list[Candidate], expected: Array, device: Device, rounds: int = 1
) -> list[list[float]]:
    """Seconds of a call of each candidate, `Device.repeat` of them in each round; they take turns.

    Raises
    ------
    ValueError : a kernel does not return what is expected, bit for bit.
    """
    import tvm

    seconds: list[list[float]] = [[] for _ in candidates]
    with _opened(device) as (load, place, use_threads):
        if device.threads:
            use_threads(device.threads)
        result = tvm.runtime.tensor(np.zeros(expected.shape, expected.dtype), place)
        ready = []
        for candidate in candidates:
            library = load(candidate.path)
            arguments = [*(tvm.runtime.tensor(v, place) for v in candidate.operands), result]
            library[candidate.name](*arguments)
            differ = np.count_nonzero(result.numpy() != expected)
            if differ:
                raise ValueError(f"wrong result: {differ} of {expected.size} elements are not numerics.py's")
            clock = library.time_evaluator(
                candidate.name, place, number=1, repeat=device.repeat, min_repeat_ms=device.least_ms
            )
            ready.append((clock, arguments))
        for _ in range(rounds):
            for (clock, arguments), own in zip(ready, seconds, strict=True):
                own += [float(value) for value in clock(*arguments).results]
    return seconds


@contextlib.contextmanager
def _opened(device: Device) -> Iterator[tuple[Any, Any, Any]]:
    """How to load a library there, the device for arrays, and the setter of its thread pool."""
    import tvm
    from tvm import rpc

    if device.tracker is None:
        yield tvm.runtime.load_module, tvm.cpu(), ffi.use_threads
        return
    host, port, key = device.tracker
    session = rpc.connect_tracker(host, port).request(key, session_timeout=60)

    def load(path: str) -> Any:
        session.upload(path)
        return session.load_module(Path(path).name)

    try:
        yield load, session.cpu(), partial(session.get_function("runtime.config_threadpool"), 1)
    finally:
        session.remove("")  # what was uploaded


def start() -> None:
    """Prepares a worker: imports before the first candidate's time limit runs."""
    import tvm  # noqa: F401

    from tvm_vitq import ffi
    from tvm_vitq.schedules import space  # noqa: F401

    ffi.runtime()  # which also keeps TVM from binding this thread to a core
