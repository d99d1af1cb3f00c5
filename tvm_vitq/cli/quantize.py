"""`vitq quantize`."""

from __future__ import annotations

import argparse

from tvm_vitq.cli import options
from tvm_vitq.cli.outcome import Outcome

HELP = "quantize a model after training; writes a .vitq file that builds for any target"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, where to write, and everything that `tvm_vitq.quantize` takes."""
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="model to write (.vitq)")
    parser.add_argument("--plan", metavar="FILE", help="also write the plan, every quantizer, as JSON")
    options.add_quantization(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """See tvm_vitq.quantize."""
    import tvm_vitq
    from tvm_vitq.files import check_writable
    from tvm_vitq.render import report_text
    from tvm_vitq.report import quantized_report

    for path in filter(None, (arguments.output, arguments.plan)):
        check_writable(path)
    quantized = tvm_vitq.quantize(arguments.model, **options.quantization(arguments))
    quantized.save(arguments.output)
    if arguments.plan:
        quantized.plan.save(arguments.plan)
    data = {**quantized_report(quantized), "output": arguments.output, "plan": arguments.plan}
    return Outcome(data, report_text(data))
