"""Compiled libraries: run, measure, export, load.

Loading needs TVM's runtime and NumPy only, neither the compiler nor torch (see ffi.py). A library is always
a file: a freshly compiled one is linked into a temporary folder when first run or exported, so there is one
way to load.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tvm_vitq import cpu, ffi, library_format, linker, settings
from tvm_vitq.errors import VitqError
from tvm_vitq.library_format import LOAD, LibraryInfo
from tvm_vitq.vta.runtime import host
from tvm_vitq.vta.runtime.program import Program

ALIGNMENT = 64
"""Bytes: TVM's vector loads assume it of every tensor (kAllocAlignment), NumPy promises only 16."""

CODE_BYTES = 8 << 20
"""More than the code of any model takes while it is linked."""

_ELSEWHERE = "free some space, or set TMPDIR to another folder"

_CPU, _POOLED = 1, 2  # kDLCPU; AllocatorType::kPooled


class KernelTime(NamedTuple):
    """Share of one kernel, or of one function of the runtime, in a call of a library.

    name : as in the build report's table of kernels.
    calls : per call of the library; milliseconds : of all of them together.
    """

    name: str
    calls: int
    milliseconds: float


class Library:
    """A compiled model. Call it with images, get logits.

    Made by `tvm_vitq.compile`, `tvm_vitq.build` or `load_library`. Calls from several threads are serialized.

    Attributes
    ----------
    info : model, target, shapes and versions (`LibraryInfo`).
    report : the build report, plain data.
    executable : the `tvm.relax.VMExecutable` of a freshly compiled library, None of a loaded one.
    program : the launches of VTA, None without it.
    num_threads : threads per call; 0 leaves it to VITQ_NUM_THREADS, then to the target's -num-cores, then
        takes one per usable core. May be assigned at any time. Results do not depend on it.
    """

    def __init__(
        self,
        info: LibraryInfo,
        *,
        file: Path | None = None,
        executable: Any = None,
        program: Program | None = None,
        num_threads: int = 0,
    ) -> None:
        if (file is None) == (executable is None):
            raise ValueError("a library is made from a file or from an executable")
        self.info = info
        self.executable = executable
        self.num_threads = _checked_threads(num_threads)
        self._file = file
        self._program = program
        self._accelerator: host.Accelerator | None = None
        self._main: Callable[[Any], Any] | None = None
        self._vm: Any = None
        self._lock = threading.RLock()

    @property
    def report(self) -> Mapping[str, Any]:
        """The build report: integer coverage, kernels, sizes, warnings."""
        return self.info.report

    @property
    def program(self) -> Program | None:
        """The launches of VTA, read now if they were not yet; None without it."""
        if self._program is None and self.info.target.vta and self._file is not None:
            self._program = Program.from_bytes(library_format.read_program(self._file), self._file)
        return self._program

    def __call__(self, x: Any) -> np.ndarray:
        """Logits of a batch.

        Parameters
        ----------
        x : (N, 3, H, W) float32, NumPy array or CPU torch tensor, normalized; exactly the shape of the build.

        Returns
        -------
        (N, classes) float32.

        Raises
        ------
        VitqError : wrong type, shape or dtype; NaN or infinity; a library for another machine.
        """
        images = self._checked_input(x)
        with self._lock:
            main = self._loaded()
            ffi.use_threads(self._threads())
            result = main(ffi.runtime().from_dlpack(images))
            # A copy: the runtime's allocator takes the memory back with the next call.
            return np.array(np.from_dlpack(result), dtype=np.float32)

    def benchmark(
        self, x: Any = None, *, repeat: int | None = None, min_seconds: float = 1.0
    ) -> dict[str, float | int]:
        """Latency of one call by wall clock, input already in memory.

        Parameters
        ----------
        x : a batch as for a call; random images if None.
        repeat : number of timed runs; None runs for `min_seconds` and at least 10 times. Three runs before
            them are not counted.

        Returns
        -------
        median_ms, mean_ms, min_ms, p10_ms, p90_ms, images_per_second (from the median), runs, batch, threads.

        Raises
        ------
        VitqError : as a call does; repeat below 1.
        """
        if repeat is not None and repeat < 1:
            raise VitqError("repeat is too small", where="benchmark", got=repeat, expected="1 or more")
        images = self._checked_input(self._random_images() if x is None else x)
        with self._lock:
            main = self._loaded()
            threads = self._threads()
            ffi.use_threads(threads)
            tensor = ffi.runtime().from_dlpack(images)
            for _ in range(3):
                main(tensor)
            seconds: list[float] = []
            end = time.perf_counter() + min_seconds
            while len(seconds) < (repeat or 10) or (repeat is None and time.perf_counter() < end):
                start = time.perf_counter()
                main(tensor)
                seconds.append(time.perf_counter() - start)
        low, median, high = (1e3 * float(value) for value in np.percentile(seconds, [10, 50, 90]))
        return {
            "median_ms": median,
            "mean_ms": 1e3 * float(np.mean(seconds)),
            "min_ms": 1e3 * min(seconds),
            "p10_ms": low,
            "p90_ms": high,
            "images_per_second": 1e3 * self.info.input_shape[0] / median,
            "runs": len(seconds),
            "batch": self.info.input_shape[0],
            "threads": threads,
        }

    def profile(self, x: Any = None, *, repeat: int = 20) -> list[KernelTime]:
        """Time of every kernel within a call, by wall clock, the slowest first.

        The virtual machine reports each call; that costs a few microseconds per kernel, which are not counted
        here and which `benchmark` does not have.

        Parameters
        ----------
        x : a batch as for a call; random images if None.
        repeat : calls measured; three before them are not.

        Raises
        ------
        VitqError : as a call does; repeat below 1.
        """
        if repeat < 1:
            raise VitqError("repeat is too small", where="profile", got=repeat, expected="1 or more")
        images = self._checked_input(self._random_images() if x is None else x)
        seconds: dict[str, float] = {}
        calls: dict[str, int] = {}
        start = 0.0

        def instrument(_function: Any, name: str, before: bool, *_rest: Any) -> int:
            nonlocal start
            if before:
                start = time.perf_counter()
            else:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
                calls[name] = calls.get(name, 0) + 1
            return 0  # VMInstrumentReturnKind::kNoOp

        with self._lock:
            main = self._loaded()
            ffi.use_threads(self._threads())
            tensor = ffi.runtime().from_dlpack(images)
            for _ in range(3):
                main(tensor)
            self._vm["set_instrument"](ffi.runtime().convert(instrument))
            try:
                for _ in range(repeat):
                    main(tensor)
            finally:
                # The machine has no call to remove an instrument; a new one, made when next called, has none.
                self._main = self._vm = None
        times = [KernelTime(name, calls[name] // repeat, 1e3 * seconds[name] / repeat) for name in seconds]
        return sorted(times, key=lambda kernel: -kernel.milliseconds)

    def export_library(self, path: str | os.PathLike[str]) -> Path:
        """Writes the library as one file, whole or not at all, for `load_library` and runtime/vitq_run.cc.

        Raises
        ------
        VitqError : the file cannot be written, or linking failed.
        """
        with self._lock:
            source = self._linked()
        target = Path(path)
        if target.exists() and target.samefile(source):
            return target
        with library_format.written_whole(target) as part:
            shutil.copyfile(source, part)
        return target

    def _check_room(self, folder: str) -> None:
        """LLVM ends the process when it cannot write an object file, so the room is checked before: for
        objects, bare library and library.
        """
        need = 3 * int(self.report.get("weight_bytes", 0)) + CODE_BYTES
        free = shutil.disk_usage(folder).free
        if free < need:
            raise VitqError(
                "too little space in the folder for temporary files",
                where=folder,
                got=f"{free} bytes",
                expected=f"{need} bytes",
                fix=_ELSEWHERE,
            )

    def __repr__(self) -> str:
        return f"<Library {self.info.model} {self.info.input_shape} for {self.info.target.key}>"

    def _random_images(self) -> np.ndarray:
        return np.random.default_rng(0).standard_normal(self.info.input_shape, dtype=np.float32)

    def _threads(self) -> int:
        asked = self.num_threads or _checked_threads(settings.THREADS.value) or self.info.target.threads
        return asked or cpu.usable_cores()

    def _checked_input(self, x: Any) -> np.ndarray:
        """`x` as a contiguous, aligned float32 array of the library's shape."""
        expected = f"float32 {self.info.input_shape}"
        if hasattr(x, "detach") and hasattr(x, "cpu"):  # torch, which need not be installed
            try:
                x = x.detach().cpu().numpy()
            except (TypeError, RuntimeError) as error:  # bfloat16, meta tensors
                raise VitqError(
                    "input cannot be read as an array",
                    where="input",
                    got=error,
                    expected=expected,
                    fix="convert the tensor: x.float()",
                ) from error
        if not isinstance(x, np.ndarray):
            raise VitqError(
                "input has the wrong type",
                where="input",
                got=type(x).__name__,
                expected=f"array of {expected}",
            )
        if x.dtype != np.float32:
            fix = "normalize the images, then convert: x.astype(numpy.float32)"
            raise VitqError(
                "input has the wrong dtype", where="input", got=x.dtype, expected=expected, fix=fix
            )
        if x.shape != self.info.input_shape:
            batched = x.ndim == 4 and x.shape[1:] == self.info.input_shape[1:]
            raise VitqError(
                "input has the wrong shape",
                where="input",
                got=x.shape,
                expected=self.info.input_shape,
                fix="the batch size is fixed at build: split or pad the batch, or build with another batch="
                if batched
                else "resize and crop the images to the shape that the library was built for",
            )
        aligned = _aligned(x.shape)
        np.copyto(aligned, x)
        if not np.isfinite(aligned).all():
            bad = int(np.size(aligned) - np.isfinite(aligned).sum())
            raise VitqError(
                "input has NaN or infinity",
                where="input",
                got=f"{bad} such values",
                expected=expected,
                fix="check how the images are read and normalized",
            )
        return aligned

    def _linked(self) -> Path:
        """The library's file, linked now if it was not yet."""
        if self._file is None:
            try:
                self._check_room(tempfile.gettempdir())
                folder = Path(tempfile.mkdtemp(prefix="tvm-vitq-"))
                # A finalizer rather than __del__: it also runs when the interpreter exits.
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                linker.export(self.executable, folder / "bare.so")
                launches = b"" if self._program is None else self._program.to_bytes()
                library_format.write(folder / "library.so", folder / "bare.so", self.info, launches)
                (folder / "bare.so").unlink()
            except OSError as error:
                raise VitqError(
                    "cannot link the library in the folder for temporary files",
                    where=tempfile.tempdir,
                    got=error.strerror,
                    fix=_ELSEWHERE,
                ) from error
            self._file = folder / "library.so"
        return self._file

    def _loaded(self) -> Callable[[Any], Any]:
        """The function "main" of the library's virtual machine, loaded now if it was not yet."""
        if self._main is None:
            library_format.check_runs_here(self.info, self.info.model if self.executable else self._file)
            module = ffi.load_module(self._linked())
            running = self._attached()
            self._vm = module["vm_load_executable"]()
            self._vm["vm_initialization"](_CPU, 0, _POOLED)
            main, weights = self._vm["main"], self._load_weights()

            def call(x: Any) -> Any:
                with running():
                    return main(x, *weights)

            self._main = call
        return self._main

    def _attached(self) -> Callable[[], AbstractContextManager[None]]:
        """What a call runs in: VTA's launches go to this library's machine."""
        if self._accelerator is None and self.program is not None:
            driver = settings.VTA_DRIVER.value or self.info.target.driver
            self._accelerator = host.Accelerator(self.program, driver)
        return self._accelerator.running if self._accelerator else nullcontext

    def _load_weights(self) -> list[Any]:
        """What `main` takes behind its input: weights that were unpacked for this process."""
        try:
            load = self._vm[LOAD]
        except AttributeError:
            return []
        return list(load())


def load_library(path: str | os.PathLike[str], *, num_threads: int = 0) -> Library:
    """Loads a file written by `export_library`; needs neither torch nor TVM's compiler.

    Parameters
    ----------
    path : the file.
    num_threads : threads per call, see `Library`.

    Raises
    ------
    VitqError : no such file; truncated, damaged or foreign; of another format version; for another CPU.
    """
    file = Path(path)
    info = library_format.read(file)
    library_format.check_runs_here(info, file)
    return Library(info, file=file, num_threads=num_threads)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialized float32 array whose data lie on a multiple of ALIGNMENT."""
    count = int(np.prod(shape)) * 4
    raw = np.empty(count + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count].view(np.float32).reshape(shape)


def _checked_threads(count: int) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise VitqError(
            "number of threads is not a whole number of 0 or more",
            where=f"num_threads or {settings.THREADS.name}",
            got=count,
            expected="0 (one per core) or a count",
        )
    return count
