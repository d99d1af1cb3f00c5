"""CPU features: LLVM's names, the kernel's names, and what this machine has.

A compiled library may only run where every instruction that LLVM was free to choose exists. What it was
free to choose is known at build time under LLVM's names; what a machine has is known at load time under
the Linux kernel's names (`/proc/cpuinfo`, `getauxval`). The tables below translate. They hold the features
that LLVM uses by itself for ordinary integer and float code; those reachable through dedicated intrinsics
only (AES, SHA, AMX) are left out, so a library is not refused for an instruction it cannot contain.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from tvm_vitq.errors import VitqError

ELF_MACHINE = {"x86_64": 62, "aarch64": 183}
"""ELF `e_machine` of each architecture: EM_X86_64, EM_AARCH64 (System V ABI)."""

_SAME_X86 = (
    "sse2 ssse3 sse4a popcnt bmi2 movbe fma f16c avx avx2 xop fma4 tbm gfni"
    " avx512f avx512bw avx512cd avx512dq avx512vl avx512ifma avx512vbmi"
).split()

KERNEL_NAME: dict[str, dict[str, str]] = {
    "x86_64": {
        **{name: name for name in _SAME_X86},
        "sse3": "pni",
        "sse4.1": "sse4_1",
        "sse4.2": "sse4_2",
        "lzcnt": "abm",
        "bmi": "bmi1",
        "avx512vnni": "avx512_vnni",
        "avx512vbmi2": "avx512_vbmi2",
        "avx512bitalg": "avx512_bitalg",
        "avx512vpopcntdq": "avx512_vpopcntdq",
        "avx512bf16": "avx512_bf16",
        "avx512fp16": "avx512_fp16",
        "avxvnni": "avx_vnni",
        "avxvnniint8": "avx_vnni_int8",
        "avxvnniint16": "avx_vnni_int16",
        "avxifma": "avx_ifma",
        "avxneconvert": "avx_ne_convert",
    },
    "aarch64": {
        "fp-armv8": "fp",
        "neon": "asimd",
        "crc": "crc32",
        "lse": "atomics",
        "fullfp16": "asimdhp",
        "rdm": "asimdrdm",
        "jsconv": "jscvt",
        "complxnum": "fcma",
        "rcpc": "lrcpc",
        "dotprod": "asimddp",
        "fp16fml": "asimdfhm",
        "flagm": "flagm",
        "altnzcv": "flagm2",
        "fptoint": "frint",
        "sve": "sve",
        "sve2": "sve2",
        "i8mm": "i8mm",
        "bf16": "bf16",
        "mops": "mops",
        "cssc": "cssc",
    },
}
"""LLVM feature name -> flag in `/proc/cpuinfo`, per architecture."""


@dataclass(frozen=True)
class HostCpu:
    """This machine: `arch` ("x86_64" or "aarch64"), `flags` and `name` of its first core, as the kernel has
    them.
    """

    arch: str
    flags: frozenset[str]
    name: str = ""

    @property
    def llvm_features(self) -> frozenset[str]:
        """The features of the table that this machine has, under LLVM's names."""
        return frozenset(name for name, flag in KERNEL_NAME[self.arch].items() if flag in self.flags)


def canonical_arch(name: str) -> str | None:
    """`x86_64` or `aarch64` for any of the usual spellings, None for other architectures."""
    spellings = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
    return spellings.get(name.lower())


def kernel_flags(arch: str, llvm_features: frozenset[str]) -> tuple[str, ...]:
    """The kernel's names of those LLVM features that code may depend on, sorted; raises nothing."""
    table = KERNEL_NAME[arch]
    return tuple(sorted({table[name] for name in llvm_features if name in table}))


def usable_cores() -> int:
    """Cores that this process may use: one per set of hardware threads, within mask and quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {
        _first_line(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or n for n in allowed
    }
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), limit))


def _first_line(path: str) -> str:
    """Of a small file of the kernel, empty where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


@functools.lru_cache(maxsize=1)
def host() -> HostCpu:
    """The machine this process runs on; VitqError where it is neither x86-64 nor AArch64 Linux."""
    arch = canonical_arch(platform.machine())
    cpuinfo = Path("/proc/cpuinfo")
    if arch is None or platform.system() != "Linux" or not cpuinfo.exists():
        raise VitqError(
            "compiled libraries run on x86-64 and AArch64 Linux only",
            where="this machine",
            got=f"{platform.machine()} {platform.system()}",
            fix="give target= explicitly and copy the exported library to a machine that it is for",
        )
    text = cpuinfo.read_text()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    name = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", text, re.MULTILINE)
    return HostCpu(arch, frozenset(match[1].split() if match else ()), name[1].strip() if name else arch)
