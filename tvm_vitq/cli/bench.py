"""`vitq bench`."""

from __future__ import annotations

import argparse
from typing import Any

from tvm_vitq.cli import options
from tvm_vitq.cli.outcome import Outcome

HELP = "latency of a library on this machine: percentiles, and the time of every kernel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The library and how it is measured."""
    parser.add_argument("library", metavar="LIBRARY", help="compiled library (.so)")
    options.add_threads(parser)
    parser.add_argument("--repeat", type=int, help="timed runs (default: as many as fit in 1 s, at least 10)")
    parser.add_argument("--max-ms", type=float, metavar="MS", help="fail if the median is above")


def run(arguments: argparse.Namespace) -> Outcome:
    """See Library.benchmark and Library.profile."""
    import tvm_vitq
    from tvm_vitq import settings
    from tvm_vitq.render import bench_text

    library = tvm_vitq.load_library(arguments.library, num_threads=arguments.threads)
    latency = library.benchmark(repeat=arguments.repeat)
    kernels = [kernel._asdict() for kernel in library.profile(repeat=min(arguments.repeat or 20, 100))]
    instructions = {kernel["name"]: kernel["instruction"] for kernel in library.report.get("kernels", ())}
    for kernel in kernels:
        kernel["instruction"] = instructions.get(kernel["name"], "")
    about = {"library": arguments.library, "model": library.info.model}
    if library.info.target.vta and not (settings.VTA_DRIVER.value or library.info.target.driver):
        about["note"] = "VTA was simulated: these are no latencies; `vitq inspect` has the cycles of a call"
    data: dict[str, Any] = {**about, **latency, "kernels": kernels}
    return Outcome(data, bench_text(data), not arguments.max_ms or latency["median_ms"] <= arguments.max_ms)
