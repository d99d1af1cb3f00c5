"""`vitq doctor`."""

from __future__ import annotations

import argparse

from tvm_vitq.cli.outcome import Outcome

HELP = "show versions, instruction sets, tools and settings, and what is missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None beyond --json."""


def run(arguments: argparse.Namespace) -> Outcome:
    """See tvm_vitq.doctor."""
    from tvm_vitq.doctor import diagnose

    found = diagnose()
    return Outcome(found.to_json(), str(found), found.healthy)
