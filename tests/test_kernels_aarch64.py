"""Kernels of the AArch64 instruction sets on emulated CPUs: every element equals numerics."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from kernel_cases import CODES, LINEARS, WIDE, attention_case, book, layer_norm_case, linear_case
from kernel_library import Case, export_cases, split_results

from tvm_vitq import emulate, targets
from tvm_vitq.numerics import Output
from tvm_vitq.numerics_attention import Probabilities
from tvm_vitq.schedules.isa import isa
from tvm_vitq.schedules.linear import Linear

BOOKS = {
    # name: shape, book, additive terms
    "book_3_bits": ((1, 1, 3, 37, 20, 23), book(8, 37, 200), ()),
    "book_4_bits": ((1, 2, 21, 21, 32, 32), book(16, 21), ()),
    "book_row": ((1, 2, 21, 21, 32, 24), book(17, 21, relative=True), ()),
    "book_windows": ((4, 2, 9, 9, 16, 24), book(16, 9, 255, least=1), ((1, 2, 9), (2, 1, 9))),
    "book_6_bits": ((1, 2, 19, 19, 16, 16), book(64, 19, zero=77), ()),
    "book_8_bits": ((1, 1, 5, 50, 16, 16), book(256, 50, 251, relative=True), ()),
    "book_extreme": ((1, 1, 4, 16, 32, 16), book(16, 16, 2**16 - 1, least=2**16 - 1), ()),
}


def book_case(name: str, target: str, shape: tuple, probs: Probabilities, additive: tuple) -> Case:
    extreme = "extreme" in name
    return attention_case(name, target, shape, probs=probs, out=WIDE, additive=additive, extreme=extreme)


def make_cases(target: str) -> list[Case]:
    cases = [linear_case(name, target, *case) for name, case in LINEARS.items()]
    cases.append(linear_case("extreme", target, (3, 16, 128), {"out": WIDE}, extreme=True))
    norms = {"norm": (5, 192, CODES), "norm_tail": (3, 50, CODES), "norm_wide": (2, 17, WIDE)}
    cases += [layer_norm_case(name, *shape) for name, shape in norms.items()]
    cases.append(attention_case("attention", target, (1, 2, 21, 21, 32, 32)))
    cases.append(attention_case("attention_tile", target, (1, 1, 30, 30, 64, 64)))
    cases.append(attention_case("attention_tails", target, (1, 1, 3, 37, 20, 23), bits=4))
    cases.append(attention_case("attention_extreme", target, (1, 1, 4, 16, 32, 16), extreme=True))
    cases.append(attention_case("row_maximum", target, (1, 2, 21, 21, 32, 24), step=None))
    cases.append(attention_case("windows", target, (4, 2, 9, 9, 16, 24), additive=((1, 2, 9), (2, 1, 9))))
    cases += [book_case(name, target, *case) for name, case in BOOKS.items()]
    cases.append(attention_case("sigmoid", target, (1, 1, 5, 19, 16, 16), kind="sigmoid"))
    return cases


NAMES = [case.name for case in make_cases("neon")]
ISAS = list(emulate.CPU_OF_ISA)


@pytest.fixture(scope="module", params=ISAS)
def results(request, run_under_qemu, tmp_path_factory):
    """(expected, computed) by case, all kernels of one instruction set."""
    cases = make_cases(request.param)
    path = export_cases(cases, request.param, tmp_path_factory.mktemp("kernels") / "kernels.so")
    flat = run_under_qemu(path, np.zeros((1, 3, 1, 1), np.float32), cpu=emulate.CPU_OF_ISA[request.param])
    return {case.name: case.expected for case in cases}, split_results(cases, flat)


@pytest.mark.parametrize("name", NAMES)
def test_equals_numerics(results, name):
    expected, computed = results
    assert len(np.unique(expected[name])) > 1 or expected[name].size == 1 or "extreme" in name
    np.testing.assert_array_equal(computed[name], expected[name].astype(np.float32))


@pytest.mark.parametrize("target", ISAS)
def test_loop_is_the_instruction_and_does_not_spill(target):
    """The default tile fits the registers: no iteration of the innermost loop touches the stack."""
    check_loops(f"aarch64-{target}", m=60, out=CODES, zero_point="scalar")


@pytest.mark.parametrize("core", ["cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "neoverse-n2"])
def test_loops_scheduled_for_a_core_do_not_spill(core):
    """... nor where LLVM orders instructions for one core, with tiles of both heights, with table lookups."""
    target = f"llvm -mtriple=aarch64-linux-gnu -mcpu={core}"
    check_loops(target, m=197, out=CODES, zero_point="scalar")
    check_loops(target, m=197, out=Output("uint16", 0, 4095), lookup="int8")


def check_loops(target: str, m: int, **options) -> None:
    profile = targets.parse(target)
    kernel = Linear(profile.isa, m, n=192, k=384, **options).kernel()
    executable = tvm.compile(tvm.IRModule({kernel.name: kernel.func}), profile.target)
    lines = executable.mod.inspect_source("asm").splitlines()
    loops = innermost_loops(lines, isa(profile.isa).instruction)
    assert loops
    for loop in loops:
        assert not [line for line in loop if "[sp" in line]


def innermost_loops(lines: list[str], instruction: str) -> list[list[str]]:
    """Bodies of innermost loops that use the instruction: from a label to the branch back to it."""
    label = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L\w+):", line))}
    bodies = []
    for i, line in enumerate(lines):
        match = re.match(r"\s+(?:b\.\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)
        if match and label.get(match[1], i) < i:
            body = lines[label[match[1]] + 1 : i]
            if not any(re.match(r"\.L", line) for line in body) and instruction in " ".join(body):
                bodies.append(body)
    return bodies
