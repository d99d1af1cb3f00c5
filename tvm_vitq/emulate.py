"""Runs AArch64 libraries on an x86 machine: vitq_run under qemu's user-mode emulation.

Emulation proves results, bit for bit; it says nothing about speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tvm_vitq import deploy_kit, library_format
from tvm_vitq.errors import VitqError

QEMU = "qemu-aarch64"
SYSROOT = Path("/usr/aarch64-linux-gnu")
"""Where Debian's g++-aarch64-linux-gnu puts the C and C++ libraries of AArch64."""

CPU_OF_ISA = {"neon": "cortex-a72", "dotprod": "cortex-a76", "i8mm": "max"}
"""An emulated CPU for each AArch64 instruction set that has it and none of the later ones ("max" has all)."""


def missing() -> str | None:
    """Why AArch64 cannot be emulated here, None if it can."""
    lacking = [tool for tool in (QEMU, deploy_kit.COMPILERS["aarch64"]) if shutil.which(tool) is None]
    if not SYSROOT.is_dir():
        lacking.append(str(SYSROOT))
    return f"not installed: {', '.join(lacking)}" if lacking else None


def run_aarch64(
    library: str | os.PathLike[str],
    x: np.ndarray,
    *,
    cpu: str = "max",
    threads: int = 1,
    timeout: float | None = None,
) -> np.ndarray:
    """Logits of an exported AArch64 library, computed by an emulated CPU.

    Parameters
    ----------
    library : file written by `export_library`.
    x : (k·N, 3, H, W) float32, N being the library's batch: k batches run one after the other in one process.
    cpu : CPU model of qemu: "cortex-a53", "cortex-a72" (NEON), "cortex-a76", "neoverse-n1" (dotprod), "max".
    threads : threads of the emulated program.
    timeout : seconds after which the emulation is stopped; None waits.

    Returns
    -------
    (k·N, classes) float32.

    Raises
    ------
    VitqError : qemu or the cross compiler is missing; the library or the input is refused; a time-out.
    """
    if reason := missing():
        raise VitqError(
            "cannot emulate AArch64",
            where="this machine",
            got=reason,
            fix="apt-get install qemu-user g++-aarch64-linux-gnu",
        )
    info = library_format.read(library)
    if info.target.arch != "aarch64":
        raise VitqError("library is not for AArch64", where=library, got=info.target.key)
    images = np.ascontiguousarray(x)
    if images.dtype != np.float32 or images.shape[1:] != info.input_shape[1:] or images.ndim != 4:
        raise VitqError(
            "input has the wrong dtype or shape",
            where="input",
            got=f"{images.dtype} {images.shape}",
            expected=f"float32 (k·{info.input_shape[0]}, {', '.join(map(str, info.input_shape[1:]))})",
        )
    kit = deploy_kit.cached("aarch64")
    with tempfile.TemporaryDirectory(prefix="vitq-emulate-") as folder:
        source, result = Path(folder, "images.bin"), Path(folder, "logits.bin")
        images.tofile(source)
        program = [str(kit / "vitq_run"), str(library), str(source), "--output", str(result)]
        command = [QEMU, "-L", str(SYSROOT), "-cpu", cpu, *program, "--threads", str(threads)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise VitqError("emulation took too long", where=library, got=f"{timeout} s") from None
        if done.returncode != 0:
            raise VitqError(
                "the emulated program failed",
                where=f"{QEMU} -cpu {cpu}",
                got=done.stderr.strip()[-2000:] or f"exit code {done.returncode}",
            )
        return np.fromfile(result, dtype=np.float32).reshape(len(images), info.classes)
