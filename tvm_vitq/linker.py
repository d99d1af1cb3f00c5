"""Links TVM's object files into a shared object, for any target, with nothing from the system.

The linker is LLD out of the ziglang wheel. The objects are linked against nothing: the few functions they
call (memcpy, TVM's runtime, rarely the math library) are already in the process that loads the library,
because TVM's runtime depends on them. So no C library of the target is needed and one file serves all.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tvm_vitq.errors import VitqError

_OPTIONS = ("-shared", "--gc-sections", "-z", "noexecstack", "--build-id=none", "--hash-style=gnu")


def zig(*arguments: str, what: str) -> None:
    """Runs a tool of the ziglang wheel; `what` names the step for the error message."""
    if importlib.util.find_spec("ziglang") is None:
        raise VitqError("the linker is not installed", where=what, fix="pip install ziglang")
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise VitqError(f"{what} failed", got=done.stderr.strip()[-2000:] or f"exit code {done.returncode}")


def link(output: str, objects: Sequence[str], options: Any = None) -> None:
    """`fcompile` of TVM's `export_library`; the architecture is that of the objects."""
    if options:
        raise VitqError("the linker takes no options", where="export_library", got=options)
    zig("ld.lld", *_OPTIONS, "-o", output, *objects, what="linking the library")


def export(executable: Any, output: Path, fcompile: Callable[..., None] = link) -> None:
    """Links a `tvm.relax.VMExecutable` (constants included) into `output`."""
    executable.export_library(str(output), fcompile=fcompile)
