"""TVM's runtime without its compiler and without torch.

`import tvm` maps a 260 MB compiler, and `import tvm_ffi` imports torch where it is installed: seconds, for a
process that only wants to run a library. This loads the two runtime libraries (5 MB) and nothing else.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from tvm_vitq import settings
from tvm_vitq.errors import VitqError

RUNTIME_LIBRARIES = ("tvm_runtime", "tvm_runtime_extra")
_loaded: list[ctypes.CDLL] = []
_lock = threading.Lock()
_pool = threading.local()


def runtime() -> ModuleType:
    """The module `tvm_ffi`, with TVM's runtime functions registered.

    Raises
    ------
    VitqError : apache-tvm is not installed.
    """
    with _lock:
        if "tvm_ffi" not in sys.modules and "torch" not in sys.modules:
            with _without_torch():
                import tvm_ffi
        else:
            import tvm_ffi
        if not _loaded:
            # Its default moves the thread that calls a kernel on one thread to core 0, and leaves it there.
            os.putenv(settings.BIND.name, str(settings.BIND.value))
            folder = library_folder()
            # Global symbols, as tvm itself loads them: libraries name no dependencies and find these.
            _loaded.extend(
                ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in RUNTIME_LIBRARIES
            )
            carry_errors()
    return tvm_ffi


def carry_errors() -> None:
    """Lets VitqError and KeyboardInterrupt pass through C++: what a pass, a type inference or an instrument
    raises arrives as itself at whoever called TVM, where it would be a RuntimeError otherwise.
    """
    from tvm_ffi import register_error

    for error in (VitqError, KeyboardInterrupt):
        register_error(error)


def library_folder() -> Path:
    """Where apache-tvm keeps its shared libraries; found without importing it."""
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        raise VitqError("TVM is not installed", where="package apache-tvm", fix="pip install apache-tvm")
    return Path(spec.origin).parent / "lib"


def use_threads(count: int) -> None:
    """Gives the calling thread a pool of `count` threads in TVM; TVM keeps one pool per calling thread.

    `runtime.config_threadpool` can only narrow a pool whose size TVM fixed when it first ran something, to
    half of the logical CPUs on x86 whether or not these are hyper-threads. So the C++ functions that TVM has
    for this are called by their mangled names; the version pin of apache-tvm keeps them valid.
    """
    runtime()
    if getattr(_pool, "count", 0) == count:
        return
    with _lock:
        _loaded[0]["_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"](ctypes.c_int(count))
        _loaded[0]["_ZN3tvm7runtime9threading15ResetThreadPoolEv"]()
    _pool.count = count


class _RefuseTorch:
    """Import finder that makes torch look absent, for one thread only."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name == "torch" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError("torch is not needed to run a compiled library", name="torch")


@contextmanager
def _without_torch() -> Iterator[None]:
    finder = _RefuseTorch()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
