"""`vitq inspect`."""

from __future__ import annotations

import argparse

from tvm_vitq.cli.outcome import Outcome

HELP = "show what is in a quantized model, a compiled library or a plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file."""
    parser.add_argument("file", metavar="FILE", help="quantized model (.vitq), library (.so) or plan (.json)")


def run(arguments: argparse.Namespace) -> Outcome:
    """See tvm_vitq.artifacts.describe."""
    from tvm_vitq.artifacts import describe

    data, text = describe(arguments.file)
    return Outcome(data, text)
