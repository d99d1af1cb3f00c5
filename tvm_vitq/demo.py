"""The demonstration: reference models quantized, compiled for two architectures and evaluated, in one table.

Each row is worked on by a process of its own, as many at once as there are cores; latencies are measured at
the end, when nothing else runs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_vitq.errors import VitqError
from tvm_vitq.render import fields, size, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from tvm_vitq.quantized_model import QuantizedModel

AARCH64 = "aarch64-dotprod"
EMULATED_IMAGES = 16
EMULATION_SECONDS = 60.0

DEFAULT_ROWS = (("vit", "w8a8"), ("vit_outlier", "w8a8"), ("swin", "w8a8"))


@dataclass
class Row:
    """One model at one width, plain data.

    float_, reference, compiled : images classified correctly out of `images` by the float model, the integer
        model in NumPy, and the library for this machine.
    equal_logits : logits of the compiled library equal in every bit to the reference's, out of `logits`.
    aarch64_equal, aarch64_logits : the same under emulation, on fewer images; None if it did not run.
    bytes_here, bytes_aarch64 : sizes of the library files. coverage : share of MACs that are integer.
    """

    model: str
    bits: str
    images: int
    float_: int
    reference: int
    compiled: int
    equal_logits: int
    logits: int
    coverage: float
    isa: str
    bytes_here: int
    bytes_aarch64: int
    aarch64_equal: int | None
    aarch64_logits: int | None
    aarch64_note: str
    seconds: float
    latency_ms: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every logit that was compared is equal."""
        return self.equal_logits == self.logits and self.aarch64_equal == self.aarch64_logits


@dataclass
class Result:
    """All rows and what they were measured on."""

    rows: list[Row]
    isa: str
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether every logit of every row that was compared is equal."""
        return all(row.exact for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "exact": self.exact}

    def __str__(self) -> str:
        header = (
            "model",
            "bits",
            "float",
            "reference",
            "compiled",
            "equal logits",
            f"{AARCH64} equal",
            "integer MACs",
            "library",
            "aarch64",
            "latency",
        )
        rows = [
            (
                row.model,
                row.bits,
                *(
                    f"{100 * correct / row.images:.2f} %"
                    for correct in (row.float_, row.reference, row.compiled)
                ),
                f"{row.equal_logits}/{row.logits}",
                "-" if row.aarch64_equal is None else f"{row.aarch64_equal}/{row.aarch64_logits}",
                f"{100 * row.coverage:.1f} %",
                size(row.bytes_here),
                size(row.bytes_aarch64),
                f"{row.latency_ms:.3f} ms",
            )
            for row in self.rows
        ]
        notes = sorted({row.aarch64_note for row in self.rows if row.aarch64_note})
        facts = {
            "accuracy": f"top-1 on {self.rows[0].images} test images; reference: the integer model in NumPy",
            "compiled": f"for {self.isa} (this machine) and, cross-compiled, for {AARCH64}",
            "latency": "median of one image, 1 thread, this machine",
            "took": f"{self.seconds:.0f} s",
        }
        return "\n".join([table(header, rows), "", fields(facts), *(f"{AARCH64}: {note}" for note in notes)])


def parse_row(text: str) -> tuple[str, str]:
    """("vit", "w8a8") from "vit:w8a8"; VitqError for anything else."""
    from tvm_vitq.refmodels import names

    model, colon, bits = text.partition(":")
    if not colon or model not in names():
        raise VitqError("no such row", got=text, expected=f"MODEL:BITS, MODEL one of {', '.join(names())}")
    return model, bits


def run_demo(
    rows: Sequence[tuple[str, str]] = DEFAULT_ROWS, *, images: int = 2000, emulation: bool = True
) -> Result:
    """Quantize, compile and evaluate reference models.

    Parameters
    ----------
    rows : (model, bits), model one of `tvm_vitq.refmodels.names()`.
    images : test images, at most all there are.
    emulation : run the AArch64 libraries under qemu where that is possible.

    Raises
    ------
    VitqError : unknown model or bits; `images` out of range; data files missing.
    """
    from tqdm import tqdm

    from tvm_vitq import cpu, refmodels
    from tvm_vitq.site_rules import parse_bits

    available = refmodels.meta()["images"]["test"]["count"]
    if not 1 <= images <= available:
        raise VitqError("no such number of test images", got=images, expected=f"1 to {available}")
    for _, bits in rows:
        parse_bits(bits)
    start = time.perf_counter()
    emulator = _emulator() if emulation else "emulation was not asked for"
    with tempfile.TemporaryDirectory(prefix="vitq-demo-") as folder:
        jobs = [_Job(n, model, bits, images, emulator, folder) for n, (model, bits) in enumerate(rows)]
        jobs.sort(key=lambda job: not job.model.startswith("swin"))  # the longest work first
        workers = min(cpu.usable_cores(), len(jobs))
        with _environment(folder), multiprocessing.get_context("spawn").Pool(workers, _start_worker) as pool:
            progress = tqdm(pool.imap_unordered(_row, jobs), total=len(jobs), desc="models", leave=False)
            done = dict(progress)
            pool.close()
            pool.join()  # lets the workers tidy up; leaving the block would stop them
        result = [done[n] for n in range(len(rows))]
        for number, row in enumerate(result):
            row.latency_ms = _latency(_library(folder, number))
    return Result(result, result[0].isa, time.perf_counter() - start)


@dataclass(frozen=True)
class _Job:
    """What one row's process is told."""

    number: int
    model: str
    bits: str
    images: int
    emulator: str
    folder: str


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Of the child processes: one thread each, as they are as many as cores; their files in `folder`."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VITQ_NUM_THREADS")
    changed = {**dict.fromkeys(threads, "1"), "TMPDIR": folder}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle, and standard output is the result's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr


def _library(folder: str, number: int) -> Path:
    return Path(folder, f"{number}.so")


def _emulator() -> str:
    """Why AArch64 libraries only get compiled, empty if they are run; makes the runtime that they need."""
    from tvm_vitq import deploy_kit, emulate

    reason = emulate.missing()
    if reason:
        return reason
    try:
        deploy_kit.cached("aarch64")
    except VitqError as error:
        return error.what
    return ""


def _row(job: _Job) -> tuple[int, Row]:
    """One row, in a process of its own; leaves the library for this machine in the folder."""
    import tvm_vitq
    from tvm_vitq import refmodels
    from tvm_vitq.comparison import equal_bits
    from tvm_vitq.evaluation import evaluate

    start = time.perf_counter()
    model, images = job.model, job.images
    library = _library(job.folder, job.number)
    x, y = refmodels.test_set()
    x, y = x[:images], y[:images]
    real = evaluate(refmodels.load_model(model), (x, y))
    quantized = tvm_vitq.quantize(
        f"refmodel:{model}", job.bits, calibration=refmodels.calibration_images(), progress=False
    )
    reference = evaluate(quantized, (x, y))
    here = tvm_vitq.compile(quantized, "llvm")
    here.export_library(library)
    compiled = evaluate(here, (x, y))
    size_aarch64, equal, note = _aarch64(quantized, x, reference.logits, job.emulator)
    row = Row(
        model=model,
        bits=job.bits,
        images=images,
        float_=real.correct,
        reference=reference.correct,
        compiled=compiled.correct,
        equal_logits=equal_bits(compiled.logits, reference.logits),
        logits=reference.logits.size,
        coverage=here.report["integer_coverage"],
        isa=here.info.target.key,
        bytes_here=library.stat().st_size,
        bytes_aarch64=size_aarch64,
        aarch64_equal=equal,
        aarch64_logits=None if equal is None else reference.logits[:EMULATED_IMAGES].size,
        aarch64_note=note,
        seconds=time.perf_counter() - start,
    )
    return job.number, row


def _aarch64(
    quantized: QuantizedModel, x: np.ndarray, reference: np.ndarray, emulator: str
) -> tuple[int, int | None, str]:
    """Bytes of the AArch64 library, logits equal to the reference's under emulation, and a note on how."""
    import tvm_vitq
    from tvm_vitq import emulate
    from tvm_vitq.comparison import equal_bits

    with tempfile.TemporaryDirectory(prefix="vitq-demo-") as folder:
        path = tvm_vitq.compile(quantized, AARCH64).export_library(Path(folder, "aarch64.so"))
        count = path.stat().st_size
        if emulator:
            return count, None, f"only cross-compiled: {emulator}"
        cpu = emulate.CPU_OF_ISA["dotprod"]
        try:
            logits = emulate.run_aarch64(path, x[:EMULATED_IMAGES], cpu=cpu, timeout=EMULATION_SECONDS)
        except VitqError as error:
            return count, None, f"compiled, but not run: {error.what}"
        equal = equal_bits(logits, reference[:EMULATED_IMAGES])
        return count, equal, f"run by qemu as {cpu}, {len(logits)} images"


def _latency(path: Path) -> float:
    import tvm_vitq

    return float(tvm_vitq.load_library(path, num_threads=1).benchmark(repeat=300)["median_ms"])
