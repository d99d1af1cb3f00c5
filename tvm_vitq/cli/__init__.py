"""The command `vitq`: one verb per file; each only calls public functions and shows what they return.

Exit codes: 0 done, 1 a threshold was missed (`--min-top1`, a failed check), 2 wrong usage or an error told
as VitqError, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tvm_vitq import __version__
from tvm_vitq.cli import bench, build, demo, doctor, eval, inspect, quantize, tune
from tvm_vitq.errors import VitqError

VERBS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (demo, doctor, quantize, tune, build, eval, bench, inspect)
}
"""Verb: module with HELP, add_arguments(parser) and run(arguments) -> Outcome."""

FAILED, ERROR, INTERRUPTED = 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="vitq",
        description="Quantizes Vision Transformers and compiles them to bit-exact integer libraries.",
    )
    top.add_argument("--version", action="version", version=f"vitq {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        sub = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        asked = parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return stop.code if isinstance(stop.code, int) else ERROR
    previous, hook = signal.signal(signal.SIGTERM, _stop), sys.unraisablehook
    sys.unraisablehook = _unraisable
    try:
        # Whatever a library prints goes beside the result, which may be piped into a JSON reader.
        with contextlib.redirect_stdout(sys.stderr):
            outcome = VERBS[asked.verb].run(asked)
        print(json.dumps(outcome.data, indent=1) if asked.json else outcome.text, flush=True)
        return 0 if outcome.passed else FAILED
    except VitqError as error:
        print(f"vitq {asked.verb}: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print(f"vitq {asked.verb}: interrupted; no file was left half written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `vitq inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, previous)


def _stop(*_: object) -> None:
    """SIGTERM ends like Ctrl-C: unwinding removes the files that are not whole."""
    raise KeyboardInterrupt


def _unraisable(swallowed: Any) -> None:
    """Python drops what is raised in destructors and callbacks, of which imports run many: an interruption
    there is made again, a little later, or it would be dropped again.
    """
    if issubclass(swallowed.exc_type, KeyboardInterrupt):
        again = [threading.main_thread().ident, signal.SIGTERM]
        threading.Timer(0.1, signal.pthread_kill, again).start()
    else:
        sys.__unraisablehook__(swallowed)
