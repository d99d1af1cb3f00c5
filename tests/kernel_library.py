"""One library of many kernels on constant operands, so that one run on an emulated CPU proves them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_vitq import targets
from tvm_vitq.library_format import LibraryInfo
from tvm_vitq.runtime import Library

IMAGE = (1, 3, 1, 1)
"""Shape of the input, which nothing depends on."""


@dataclass(frozen=True)
class Case:
    """A kernel, its operands in the order of its arguments, and what numerics says that it returns.

    inputs, constants : arrays for the arguments of these roles.
    expected : within +-2**24, where float32 is exact.
    """

    name: str
    spec: Any
    inputs: list[np.ndarray]
    constants: list[np.ndarray]
    expected: np.ndarray

    def operands(self) -> list[np.ndarray]:
        """Inputs and constants as the kernel takes them, checked against its arguments."""
        values = {"input": iter(self.inputs), "constant": iter(self.constants)}
        result = []
        for argument in self.spec.arguments()[:-1]:
            value = np.ascontiguousarray(next(values[argument.role]))
            assert (value.shape, str(value.dtype)) == (argument.shape, argument.dtype), argument
            result.append(value)
        assert all(next(rest, None) is None for rest in values.values())
        return result


def compile_cases(cases: list[Case], isa: str) -> tuple[tvm.relax.VMExecutable, int]:
    """A program float32 IMAGE -> (1, total): all results one after the other, and their total size."""
    block = relax.BlockBuilder()
    functions = {}
    for case in cases:
        kernel = case.spec.kernel()
        if kernel.name not in functions:
            functions[kernel.name] = block.add_func(kernel.func, kernel.name)
    x = relax.Var("x", relax.TensorType(IMAGE, "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            parts = []
            for case in cases:
                out = case.spec.arguments()[-1]
                operands = [relax.const(v, str(v.dtype)) for v in case.operands()]
                type_ = relax.TensorType(out.shape, out.dtype)
                result = block.emit(relax.call_tir(functions[case.spec.name], operands, type_))
                numbers = result if out.dtype == "float32" else block.emit(relax.op.astype(result, "float32"))
                parts.append(block.emit(relax.op.reshape(numbers, (1, case.expected.size))))
            total = block.emit_output(relax.op.concat(parts, axis=1))
        block.emit_func_output(total)
    executable = tvm.compile(block.get(), targets.parse(f"aarch64-{isa}").target)
    return executable, sum(case.expected.size for case in cases)


def export_cases(cases: list[Case], isa: str, path: Path) -> Path:
    """The program as a library file."""
    executable, size = compile_cases(cases, isa)
    info = LibraryInfo("kernels", targets.parse(f"aarch64-{isa}"), IMAGE, size)
    return Library(info, executable=executable).export_library(path)


def split_results(cases: list[Case], flat: np.ndarray) -> dict[str, np.ndarray]:
    """Name of the case -> its result, in the shape of what is expected."""
    ends = np.cumsum([case.expected.size for case in cases])
    pieces = np.split(flat.ravel(), ends[:-1])
    return {case.name: piece.reshape(case.expected.shape) for case, piece in zip(cases, pieces, strict=True)}
