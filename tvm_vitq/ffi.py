"""TVM's runtime without its compiler and without torch.

`import tvm` maps a 260 MB compiler, and `import tvm_ffi` imports torch where it is installed: seconds, for a
process that only wants to run a library. This loads the two runtime libraries (5 MB) and nothing else.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tvm_vitq import cpu, settings
from tvm_vitq.errors import VitqError

RUNTIME_LIBRARIES = ("tvm_runtime", "tvm_runtime_extra")
_loaded: list[ctypes.CDLL] = []
_files: dict[Path, tuple[int, int]] = {}
"""Device and inode of the file that was first loaded from a path."""
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
            for setting in (settings.BIND, settings.SPIN):
                os.putenv(setting.name, str(setting.value))
            folder = library_folder()
            # Global symbols, as tvm itself loads them: libraries name no dependencies and find these.
            _loaded.extend(
                ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in RUNTIME_LIBRARIES
            )
            carry_errors()
    return tvm_ffi


def load_module(file: Path) -> Any:
    """The module in a shared object.

    The dynamic loader takes a file under a path that it knows for the one that it has loaded from there. One
    that has been written anew since gets a path of its own.

    Raises
    ------
    VitqError : no such file; no room for a path of its own.
    """
    path = file.resolve()
    try:
        status = path.stat()
        identity = status.st_dev, status.st_ino
        if _files.setdefault(path, identity) == identity:
            return runtime().load_module(str(path))
        with tempfile.TemporaryDirectory(prefix="tvm-vitq-") as folder:
            link = Path(folder) / path.name
            link.symlink_to(path)
            return runtime().load_module(str(link))
    except OSError as error:
        raise VitqError("cannot load the library", where=file, got=error.strerror or error) from error


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

    A pool never grows, so it is made for all usable cores, or for the first count if that is more, and
    `runtime.config_threadpool` says how many work. That function makes TVM ask the system for the number of
    CPUs in front of every parallel loop, until it is told again. A pool that is there already, since this
    thread ran something before, is made anew if it is smaller: to end its threads takes long on a busy
    machine. What TVM does not register is called by its mangled name; the version pin of apache-tvm keeps
    these valid.

    Raises
    ------
    VitqError : the pool of this thread is smaller.
    """
    registered = runtime().get_global_func
    if getattr(_pool, "count", 0) == count:
        return
    by_number = 1  # TVM's AffinityMode kBig: the number decides
    with _lock:
        configure, working = registered("runtime.config_threadpool"), registered("runtime.NumThreads")
        expect = _loaded[0]["_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"]
        if not hasattr(_pool, "count"):
            size = max(count, cpu.usable_cores())
            expect(ctypes.c_int(size))
            if working() < size:  # asking makes the pool
                _loaded[0]["_ZN3tvm7runtime9threading15ResetThreadPoolEv"]()
        _pool.count = 0
        configure(by_number, count)
        expect(ctypes.c_int(count))
    if working() != count:
        raise VitqError(
            "too many threads",
            where="num_threads",
            got=count,
            expected=f"at most {working()}, the size of TVM's pool for this thread, which cannot grow",
            fix="begin with the largest number, or call from a new thread",
        )
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
