"""Where the time of a whole compiled model goes, kernel by kernel, beside what the machine can do.

python benchmarks/breakdown.py --model deit_small_patch16_224 --bits w8a8 --threads 1 2

Calls, multiply-accumulates and bytes are those that the build report says of the compiled program, times are
those of `Library.profile`. Kernels that compute equal layers on equal shapes are one row.

Two rates are measured in the same run, in turns with the model, on one thread, and count once for each thread
of the model: dot products alone (`peak_kernel`, as in kernels.py), and NumPy's copy of a buffer of half a
kernel's bytes to another, so that as many bytes are touched; it is repeated on the same two buffers, which
stay in whatever cache holds both. Times of the model are wall times, of the rates processor times: on a
machine with other work, shares are too low.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from kernels import peak_kernel, runner, seconds_per_call
from recipes import quantize, quick, synthetic

import tvm_vitq
from tvm_vitq.compiler import WEIGHTS
from tvm_vitq.frontend import import_model
from tvm_vitq.render import table
from tvm_vitq.runtime import KernelTime, Library
from tvm_vitq.schedules.isa import isa
from tvm_vitq.sweep import BASELINE

COPIED = 1 << 20
"""Bytes copied between two looks at the clock, at least: a small buffer several times."""

MACHINE = "virtual machine"
"""The row of its own functions: memory, and views that need no copy."""


@dataclass
class Row:
    """Kernels that do the same.

    calls, milliseconds, macs, bytes : of one inference.
    """

    kernel: str
    shape: str
    calls: int = 0
    macs: int = 0
    bytes: int = 0
    milliseconds: float = 0.0
    names: set[str] = field(default_factory=set)

    @property
    def buffer(self) -> int:
        """Bytes of the buffer that is copied to compare with: half of those of a call."""
        return self.bytes // self.calls // 2


def rows_of(kernels: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The kernels of a build report by what they compute, and the virtual machine's row."""
    rows: dict[tuple[str, str], Row] = {}
    for kernel in kernels:
        what = label(kernel)
        row = rows.setdefault(what, Row(*what))
        row.calls += kernel["calls"]
        row.macs += kernel["calls"] * kernel["macs"]
        row.bytes += kernel["calls"] * kernel["bytes"]
        row.names.add(kernel["name"])
    return [*rows.values(), Row(MACHINE, "")]


def label(kernel: Mapping[str, Any]) -> tuple[str, str]:
    """The layers of a kernel without the numbers of their blocks, or its name; its shape, which is in the
    name.
    """
    name, _, rest = kernel["name"].removeprefix("vitq_").partition("__")
    layers = dict.fromkeys(re.sub(r"^(.*\.)?\d+\.", "", layer) for layer in kernel["layers"])
    return ", ".join(layers) or name, rest.partition("_")[0]


def copy(size: int) -> tuple[Callable[[], None], int]:
    """Copies of a buffer, and the bytes that they touch together, read and written."""
    source, target, times = np.ones(size, np.uint8), np.empty(size, np.uint8), -(-COPIED // size)

    def run() -> None:
        for _ in range(times):
            np.copyto(target, source)

    return run, 2 * size * times


@dataclass(frozen=True)
class Measured:
    """Medians of all rounds.

    milliseconds : of every kernel and function; calls : of each, per inference; latency : of an inference
        without the profiler.
    peak : multiply-accumulates per second; copied : bytes per second, by size of the buffer. Of one thread.
    """

    milliseconds: dict[str, float]
    calls: dict[str, int]
    latency: float
    peak: float
    copied: dict[int, float]


def measure(library: Library, sizes: Iterable[int], rounds: int, calls: int, seconds: float) -> Measured:
    """Model and rates in turns; `calls` of the model and `seconds` for each rate in a round."""
    reference = peak_kernel(isa(library.info.target.isa))
    run_peak = runner(reference, library.info.target)
    copies = {size: copy(size) for size in sizes}
    found: list[tuple[dict[str, float], float, float, list[float]]] = []
    times: list[KernelTime] = []
    for _ in range(rounds):
        times = library.profile(repeat=calls)
        found.append(
            (
                {kernel.name: kernel.milliseconds for kernel in times},
                float(library.benchmark(repeat=calls)["median_ms"]),
                reference.macs / seconds_per_call(run_peak, seconds),
                [touched / seconds_per_call(run, seconds) for run, touched in copies.values()],
            )
        )
    profiles, latencies, peaks, rates = zip(*found, strict=True)
    return Measured(
        {kernel.name: float(np.median([p[kernel.name] for p in profiles])) for kernel in times},
        {kernel.name: kernel.calls for kernel in times},
        float(np.median(latencies)),
        float(np.median(peaks)),
        dict(zip(copies, np.median(np.array(rates), 0).tolist(), strict=True)),
    )


def timed(rows: list[Row], measured: Measured) -> list[Row]:
    """Rows with their times, the slowest first; functions of the virtual machine go to the last one."""
    owners = {name: row for row in rows for name in row.names}
    for name, milliseconds in measured.milliseconds.items():
        row = owners.get(name, rows[-1])
        row.milliseconds += milliseconds
        if row is rows[-1]:
            row.calls += measured.calls[name]
    return sorted(rows, key=lambda row: -row.milliseconds)


def summary(rows: list[Row], measured: Measured, threads: int) -> dict[str, Any]:
    """Everything as plain data; rates per second are in 10^9."""
    whole = Row("whole", "")
    for row in rows:
        whole.calls += row.calls
        whole.macs += row.macs
        whole.bytes += row.bytes
        whole.milliseconds += row.milliseconds

    def plain(row: Row) -> dict[str, Any]:
        seconds = row.milliseconds * 1e-3
        copied = None if row.macs else measured.copied.get(row.buffer if row.bytes else 0)
        return {
            "kernel": row.kernel, "shape": row.shape, "calls": row.calls, "ms": row.milliseconds,
            "share": row.milliseconds / whole.milliseconds,
            "macs": row.macs, "gmacs": row.macs / seconds * 1e-9,
            "of_peak": row.macs / seconds / (threads * measured.peak),
            "bytes": row.bytes, "gbytes": row.bytes / seconds * 1e-9,
            "of_copy": row.bytes / seconds / (threads * copied) if copied else None,
        }  # fmt: skip

    return {
        "threads": threads,
        "kernels": [plain(row) for row in rows],
        "whole": plain(whole),
        "latency_ms": measured.latency,
        "peak_gmacs_of_a_thread": measured.peak * 1e-9,
        "floor_ms": whole.macs / (threads * measured.peak) * 1e3,
    }


def percent(share: float) -> str:
    """As `render.table` aligns it."""
    return f"{100 * share:.1f} %"


def text(found: Mapping[str, Any], instruction: str) -> str:
    """One number of threads, for people."""
    headers = (
        "kernel", "shape", "calls", "ms", "share", "M MACs", "GMAC/s", "of peak", "MB", "GB/s", "of copy"
    )  # fmt: skip
    cells = []
    for row in (*found["kernels"], found["whole"]):
        macs = (f"{row['macs'] / 1e6:.2f}", f"{row['gmacs']:.1f}", percent(row["of_peak"]))
        moved = (f"{row['bytes'] / 1e6:.3f}", f"{row['gbytes']:.1f}")
        cells.append((
            row["kernel"], row["shape"], row["calls"], f"{row['ms']:.3f}", percent(row["share"]),
            *(macs if row["macs"] else ("-",) * 3), *(moved if row["bytes"] else ("-",) * 2),
            "-" if row["of_copy"] is None else percent(row["of_copy"]),
        ))  # fmt: skip
    threads, floor, latency = found["threads"], found["floor_ms"], found["latency_ms"]
    peak = f"{found['peak_gmacs_of_a_thread']:.1f} GMAC/s of {instruction} on one thread"
    if threads > 1:
        peak += f", taken {threads} times for {threads} threads"
    return "\n".join([
        f"{threads} thread{'s' if threads > 1 else ''}; peak: {peak}",
        table(headers, cells),
        f"floor, MACs / peak: {floor:.3f} ms; measured {found['whole']['ms'] / floor:.2f} times that, "
        f"{latency:.3f} ms = {latency / floor:.2f} times without the profiler",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name; random weights")
    parser.add_argument("--bits", default=BASELINE[0])
    parser.add_argument("--recipe", default=BASELINE[1], metavar="NAME")
    parser.add_argument("--weights", choices=WEIGHTS, default="packed", help="below 8 bits")
    parser.add_argument("--target", default="llvm", help="a target that this machine runs (default: llvm)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--images", type=int, default=4, help="synthetic images for calibration")
    parser.add_argument("--rounds", type=int, default=15, help="of model and rates in turns")
    parser.add_argument("--calls", type=int, default=5, help="of the model per round")
    parser.add_argument("--seconds", type=float, default=0.02, help="for each rate per round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = import_model(options.model, batch=options.batch)
    quantized = quantize(model, options.bits, quick(options.recipe), synthetic(model, options.images))
    library = tvm_vitq.compile(quantized, options.target, weights=options.weights)
    instruction = isa(library.info.target.isa).instruction
    about = {key: getattr(options, key) for key in ("model", "batch", "bits", "recipe", "weights")}
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in about.items()), f"({library.info.target})")
    found = []
    for threads in options.threads:
        library.num_threads = threads
        rows = rows_of(library.report["kernels"])
        sizes = sorted({row.buffer for row in rows if row.bytes and not row.macs})
        measured = measure(library, sizes, options.rounds, options.calls, options.seconds)
        found.append(summary(timed(rows, measured), measured, threads))
        if not options.json:
            print("\n" + text(found[-1], instruction), flush=True)
    if options.json:
        data = {**about, "target": str(library.info.target), "instruction": instruction, "threads": found}
        print(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
