"""`vitq demo`."""

from __future__ import annotations

import argparse

from tvm_vitq.cli.outcome import Outcome

HELP = "quantize, compile and evaluate the reference models, for this machine and for AArch64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much is done."""
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="test images (default: 2000)")
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="MODEL:BITS",
        help="what is built, such as vit:w8a8 swin:w4a8 (default: vit, vit_outlier and swin at w8a8)",
    )
    parser.add_argument("--no-emulation", action="store_true", help="only cross-compile for AArch64")


def run(arguments: argparse.Namespace) -> Outcome:
    """See tvm_vitq.demo."""
    from tvm_vitq.demo import DEFAULT_ROWS, parse_row, run_demo

    rows = [parse_row(text) for text in arguments.rows] if arguments.rows else DEFAULT_ROWS
    result = run_demo(rows, images=arguments.images, emulation=not arguments.no_emulation)
    return Outcome(result.to_json(), str(result), result.exact)
