"""The kernels of dynamic groups on emulated AArch64 CPUs: what is defined equals numerics."""

from __future__ import annotations

import numpy as np
import pytest
from group_cases import LINEARS, codes_case, group_linear_case, table_case, written
from kernel_library import Case, export_cases, split_results

from tvm_vitq import emulate

TABLES = ("tails", "more_groups_than_channels", "lookup_deep")


def make_cases(target: str) -> list[Case]:
    cases = [group_linear_case(name, target, *case) for name, case in LINEARS.items()]
    for name in TABLES:
        cases.append(table_case(f"table_{name}", target, LINEARS[name][0]))
        cases.append(codes_case(f"codes_{name}", target, LINEARS[name][0]))
    return cases


def meant(case: Case, result: np.ndarray) -> np.ndarray:
    """The part of a result that the kernel defines."""
    if case.name.startswith("table_"):
        exact = written(case.spec.layout)[: case.spec.layout.positions]
        small = np.concatenate([exact, case.spec.layout.starts + np.arange(case.spec.groups + 1)])
        return result[:, small]  # the bits of multipliers are no whole numbers that float32 holds
    if case.name.startswith("codes_"):
        layout, table = case.spec.layout, case.inputs[1]
        rows = result.reshape(len(table), -1, layout.positions)
        orders = table[:, : layout.positions]
        return np.stack([image[:, p < layout.k] for image, p in zip(rows, orders, strict=True)])
    return result


@pytest.fixture(scope="module", params=list(emulate.CPU_OF_ISA))
def results(request, run_under_qemu, tmp_path_factory):
    """(cases, computed) by case, all kernels of one instruction set."""
    cases = make_cases(request.param)
    path = export_cases(cases, request.param, tmp_path_factory.mktemp("kernels") / "kernels.so")
    flat = run_under_qemu(path, np.zeros((1, 3, 1, 1), np.float32), cpu=emulate.CPU_OF_ISA[request.param])
    return {case.name: case for case in cases}, split_results(cases, flat)


@pytest.mark.parametrize("name", [case.name for case in make_cases("neon")])
def test_equals_numerics(results, name):
    cases, computed = results
    case = cases[name]
    np.testing.assert_array_equal(meant(case, computed[name]), meant(case, case.expected).astype(np.float32))
