"""`vitq build`."""

from __future__ import annotations

import argparse

from tvm_vitq.cli import options
from tvm_vitq.cli.outcome import Outcome

HELP = "compile a quantized model, or quantize and compile a model, to a library for one target"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, target, where to write, and everything that `tvm_vitq.quantize` takes."""
    parser.add_argument("model", metavar="MODEL", help=f".vitq file of `vitq quantize`, {options.MODEL_HELP}")
    parser.add_argument(
        "-t",
        "--target",
        default="llvm",
        help='"llvm" (this machine, default), "aarch64-dotprod", "x86-avx2", "vta", "vta -config=FILE.json", '
        "or TVM's classic strings: "
        '"llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76"; `vitq doctor` lists the instruction sets',
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="library to write (.so)")
    options.add_tuning_logs(parser)
    parser.add_argument(
        "--weights",
        default="packed",
        help="below 8 bits: packed (default), which kernels unpack as they go; or unpacked, once, when the "
        "library is loaded",
    )
    options.add_quantization(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """See tvm_vitq.build and tvm_vitq.compile."""
    import tvm_vitq
    from tvm_vitq.artifacts import is_artifact, open_model
    from tvm_vitq.files import check_writable
    from tvm_vitq.render import report_text

    check_writable(arguments.output)
    made = {"tuning_logs": options.tuning_logs(arguments), "weights": arguments.weights}
    if is_artifact(arguments.model):
        options.refuse_quantization(arguments)
        library = tvm_vitq.compile(open_model(arguments.model), arguments.target, **made)
    else:
        library = tvm_vitq.build(arguments.model, arguments.target, **made, **options.quantization(arguments))
    path = library.export_library(arguments.output)
    data = {**library.report, "output": str(path), "file_bytes": path.stat().st_size}
    return Outcome(data, report_text(data))
