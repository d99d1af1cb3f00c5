"""Runs a kernel on this machine, for each instruction set that it has."""

from __future__ import annotations

import numpy as np
import tvm
from kernel_library import Case

from tvm_vitq import targets

EVERY = ("avx512vnni", "avxvnni", "avx2", "x86_64")


def profile_of(isa: str) -> targets.TargetProfile:
    """The oldest machine with the instruction set; 256-bit VNNI also exists as a part of AVX-512."""
    profile = targets.parse(f"x86-{isa}" if isa != "x86_64" else "x86-64")
    if isa == "avxvnni" and profile.missing_here():
        profile = targets.parse("x86-avx512vnni")
    return profile


ISAS = tuple(isa for isa in EVERY if not profile_of(isa).missing_here())
"""Instruction sets that this machine can run."""


def run(case: Case, isa: str) -> np.ndarray:
    """What the compiled kernel returns."""
    kernel = case.spec.kernel()
    executable = tvm.compile(tvm.IRModule({kernel.name: kernel.func}), profile_of(isa).target)
    out = kernel.arguments[-1]
    result = tvm.runtime.tensor(np.zeros(out.shape, out.dtype))
    executable[kernel.name](*(tvm.runtime.tensor(v) for v in case.operands()), result)
    return result.numpy()


def check(case: Case, isa: str) -> None:
    """The kernel returns what numerics returns, and that is not the same everywhere."""
    assert len(np.unique(case.expected)) > 1 or case.expected.size == 1 or "extreme" in case.name
    np.testing.assert_array_equal(run(case, isa), case.expected)
