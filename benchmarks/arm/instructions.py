"""Instructions that an AArch64 library executes for one batch, counted by a plugin of qemu."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tvm_vitq import deploy_kit, emulate, library_format
from tvm_vitq.errors import VitqError

SOURCE = Path(__file__).with_name("count_instructions.c")


def plugin(folder: Path) -> Path:
    """The plugin, compiled for the qemu that is installed."""
    said = subprocess.run([emulate.QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"version (\d+)", said)
    version = 1 if match and int(match[1]) < 9 else 2  # of the interface; qemu 9 dropped the first
    path = folder / "count.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={version}", "-o", str(path), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise VitqError("the plugin does not compile", where=str(SOURCE), got=done.stderr.strip()[-500:])
    return path


def per_batch(library: Path) -> int:
    """Instructions of a call of the library's function, one thread: a run of two calls less one of one."""
    if reason := emulate.missing():
        raise VitqError(
            "cannot emulate AArch64",
            where="this machine",
            got=reason,
            fix="apt-get install qemu-user g++-aarch64-linux-gnu",
        )
    shape = library_format.read(library).input_shape
    with tempfile.TemporaryDirectory(prefix="vitq-count-") as name:
        folder = Path(name)
        images, result = folder / "images.bin", folder / "count.txt"
        np.random.default_rng(0).normal(size=shape).astype(np.float32).tofile(images)
        counter = f"file={plugin(folder)},out={result}"
        program = str(deploy_kit.cached("aarch64") / "vitq_run")
        command = [emulate.QEMU, "-L", str(emulate.SYSROOT), "-cpu", "max", "-plugin", counter]
        command += [program, str(library), str(images), "--threads", "1"]
        counts = []
        for calls in (1, 2):
            done = subprocess.run(
                [*command, "--repeat", str(calls)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0 or not result.exists():
                raise VitqError(
                    "the emulated program failed", where=" ".join(command), got=done.stderr.strip()[-500:]
                )
            counts.append(int(result.read_text()))
            result.unlink()
        return counts[1] - counts[0]
