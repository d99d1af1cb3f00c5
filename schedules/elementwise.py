"""Elementwise integer operators as kernels of their own, for tensors of any shape.

Most elementwise work is fused into the kernels that produce its operands; these are for what stands alone: the input
image, gates of GLU layers, functions between two data movements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_vitq.numerics import INDEX_BITS, WIDE_MAX, Output
from tvm_vitq.schedules import packing, tir
from tvm_vitq.schedules.kernel import Argument, Kernel, kernel_name
from tvm_vitq.schedules.requantize import requantize, zero_lanes
from tvm_vitq.schedules.tir import LANES, TB, Expr

Array = npt.NDArray

CHUNK = 4096
"""Elements of one task."""


@dataclass(frozen=True)
class Elementwise:
    """Common part: `shape` is the shape of the result, `out` its conversion."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def operands(self) -> tuple[Argument, ...]:
        """Arguments before the result."""
        raise NotImplementedError

    def result_dtype(self) -> str:
        """Type of the result."""
        raise NotImplementedError

    def label(self) -> tuple[str, list[str], str]:
        """(operator, operand tokens, suffix) of the kernel's name."""
        raise NotImplementedError

    def prepare(self, buffers: list[Expr], lanes: int) -> object:
        """Values used by every element; emitted once per task."""
        return None

    def element(self, buffers: list[Expr], at: Expr, lanes: int, prepared: object) -> Expr:
        """The result's lanes at flat index `at`."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name of the kernel; equal names are equal functions."""
        op, tokens, suffix = self.label()
        return kernel_name(op, self.result_dtype(), tokens, [], self.shape, suffix)

    def arguments(self) -> tuple[Argument, ...]:
        """All arguments in order."""
        return (*self.operands(), Argument("out", self.shape, self.result_dtype(), "output"))

    def kernel(self) -> Kernel:
        """Generates the function: chunks in parallel, whole vectors, then single elements."""
        arguments = self.arguments()

        def emit() -> None:
            buffers = [tir.argument(a.name, a.shape, a.dtype) for a in arguments]
            *inputs, out = (tir.flat(b, a.shape, a.dtype) for b, a in zip(buffers, arguments, strict=True))
            with TB.parallel(0, tir.ceildiv(self.size, CHUNK)) as task:
                start = tir.let(task * CHUNK)
                count = tir.let(tir.minimum(CHUNK, self.size - start) // LANES) if self.size % CHUNK else CHUNK // LANES
                self._run(inputs, out, start, count, LANES)
                if self.size % LANES:
                    with tir.when(start + count * LANES < tir.minimum(start + CHUNK, self.size)):
                        self._run(inputs, out, start + count * LANES, self.size % LANES, 1)

        return Kernel(self.name, tir.prim_func(self.name, emit), arguments)

    def _run(self, inputs: list[Expr], out: Expr, start: Expr, count: Expr, lanes: int) -> None:
        prepared = self.prepare(inputs, lanes)
        with TB.serial(0, count) as i:
            at = tir.let(start + i * lanes)
            tir.store(out, self.element(inputs, at, lanes, prepared), at, lanes)


def _scalar(buffer: Expr, lanes: int) -> Expr:
    value = tir.load(buffer, 0, 1)
    return tir.let(tir.splat(value, lanes) if lanes > 1 else value)


def _int32(buffer: Expr, at: Expr, lanes: int) -> Expr:
    value = tir.load(buffer, at, lanes)
    return value if str(buffer.dtype) == "int32" else tir.cast(value, "int32", lanes)


def _convert(value: Expr, multiplier: Expr, zero: object, out: Output, lanes: int) -> Expr:
    value = requantize(value, multiplier, zero, out, lanes)  # type: ignore[arg-type]
    return value if out.dtype in ("int32", "float32") else tir.cast(value, out.dtype, lanes)


def _range(out: Output) -> str:
    clip = "" if out.dtype == "float32" else f"{out.qmin}to{out.qmax}".replace("-", "m")
    return clip + ("_shift" if out.kind == "shift" else "")


def _scaling(out: Output) -> tuple[Argument, ...]:
    return (
        Argument("multiplier", (1,), packing.multiplier_dtype(out), "constant"),
        Argument("zero_point", (1,), "int32", "constant"),
    )


def _pack_scaling(multiplier: Array | float, zero_point: Array | int, out: Output) -> list[Array]:
    return [packing.pack_multiplier(multiplier, 1, out)[:1], np.asarray(zero_point, np.int32).reshape(1)]


@dataclass(frozen=True)
class Quantize(Elementwise):
    """numerics.int_quantize of a float32 tensor. Arguments: x, inverse_scale, zero_point, out."""

    out: Output

    def operands(self) -> tuple[Argument, ...]:
        scale = Argument("inverse_scale", (1,), "float32", "constant")
        zero = Argument("zero_point", (1,), "int32", "constant")
        return (Argument("x", self.shape, "float32", "input"), scale, zero)

    def pack(self, inverse_scale: float, zero_point: Array | int) -> list[Array]:
        """inverse_scale and zero_point."""
        return [np.asarray(inverse_scale, np.float32).reshape(1), np.asarray(zero_point, np.int32).reshape(1)]

    def result_dtype(self) -> str:
        return self.out.dtype

    def label(self) -> tuple[str, list[str], str]:
        return "quantize", ["float32"], _range(self.out)

    def prepare(self, buffers: list[Expr], lanes: int) -> object:
        return _scalar(buffers[1], lanes), zero_lanes(_scalar(buffers[2], lanes), self.out, lanes)

    def element(self, buffers: list[Expr], at: Expr, lanes: int, prepared: object) -> Expr:
        scale, zero = prepared  # type: ignore[misc]
        scaled = tir.load(buffers[0], at, lanes) * scale
        # numerics converts x to float32, which it already is; the rest is requantize's.
        value = tir.rint(tir.minimum(tir.maximum(scaled, zero.low), zero.high), lanes) + zero.value
        return value if self.out.dtype == "int32" else tir.cast(value, self.out.dtype, lanes)


@dataclass(frozen=True)
class Requantize(Elementwise):
    """numerics.requantize of an integer tensor. Arguments: x, multiplier, zero_point, out."""

    dtype: str
    out: Output

    def operands(self) -> tuple[Argument, ...]:
        return (Argument("x", self.shape, self.dtype, "input"), *_scaling(self.out))

    def pack(self, multiplier: Array | float, zero_point: Array | int = 0) -> list[Array]:
        """multiplier and zero_point."""
        return _pack_scaling(multiplier, zero_point, self.out)

    def result_dtype(self) -> str:
        return self.out.dtype

    def label(self) -> tuple[str, list[str], str]:
        return "requantize", [self.dtype], _range(self.out)

    def prepare(self, buffers: list[Expr], lanes: int) -> object:
        return _scalar(buffers[1], lanes), zero_lanes(_scalar(buffers[2], lanes), self.out, lanes)

    def element(self, buffers: list[Expr], at: Expr, lanes: int, prepared: object) -> Expr:
        return _convert(_int32(buffers[0], at, lanes), *prepared, self.out, lanes)  # type: ignore[misc]


@dataclass(frozen=True)
class Multiply(Elementwise):
    """numerics.int_multiply of two integer tensors. Arguments: a, b, multiplier, zero_point, out."""

    a_dtype: str
    b_dtype: str
    out: Output

    def operands(self) -> tuple[Argument, ...]:
        a = Argument("a", self.shape, self.a_dtype, "input")
        return (a, Argument("b", self.shape, self.b_dtype, "input"), *_scaling(self.out))

    def pack(self, multiplier: Array | float, zero_point: Array | int = 0) -> list[Array]:
        """multiplier and zero_point."""
        return _pack_scaling(multiplier, zero_point, self.out)

    def result_dtype(self) -> str:
        return self.out.dtype

    def label(self) -> tuple[str, list[str], str]:
        return "multiply", [self.a_dtype, self.b_dtype], _range(self.out)

    def prepare(self, buffers: list[Expr], lanes: int) -> object:
        return _scalar(buffers[2], lanes), zero_lanes(_scalar(buffers[3], lanes), self.out, lanes)

    def element(self, buffers: list[Expr], at: Expr, lanes: int, prepared: object) -> Expr:
        product = _int32(buffers[0], at, lanes) * _int32(buffers[1], at, lanes)
        return _convert(product, *prepared, self.out, lanes)  # type: ignore[misc]


@dataclass(frozen=True)
class Add(Elementwise):
    """numerics.int_add of two wide tensors. Arguments: a, b, out."""

    def operands(self) -> tuple[Argument, ...]:
        return Argument("a", self.shape, "int32", "input"), Argument("b", self.shape, "int32", "input")

    def result_dtype(self) -> str:
        return "int32"

    def label(self) -> tuple[str, list[str], str]:
        return "add", ["int32", "int32"], ""

    def element(self, buffers: list[Expr], at: Expr, lanes: int, prepared: object) -> Expr:
        total = tir.load(buffers[0], at, lanes) + tir.load(buffers[1], at, lanes)
        return tir.clip(total, -WIDE_MAX, WIDE_MAX, "int32", lanes)


@dataclass(frozen=True)
class Dequantize(Elementwise):
    """numerics.int_dequantize. Arguments: x, scale, zero_point, out."""

    dtype: str

    def operands(self) -> tuple[Argument, ...]:
        scale, zero = Argument("scale", (1,), "float32", "constant"), Argument("zero_point", (1,), "int32", "constant")
        return (Argument("x", self.shape, self.dtype, "input"), scale, zero)

    def pack(self, scale: Array | float, zero_point: Array | int) -> list[Array]:
        """scale and zero_point."""
        return [np.asarray(scale, np.float32).reshape(1), np.asarray(zero_point, np.int32).reshape(1)]

    def result_dtype(self) -> str:
        return "float32"

    def label(self) -> tuple[str, list[str], str]:
        return "dequantize", [self.dtype], ""

    def prepare(self, buffers: list[Expr], lanes: int) -> object:
        return _scalar(buffers[1], lanes), _scalar(buffers[2], lanes)

    def element(self, buffers: list[Expr], at: Expr, lanes: int, prepared: object) -> Expr:
        scale, zero = prepared  # type: ignore[misc]
        return tir.cast(_int32(buffers[0], at, lanes) - zero, "float32", lanes) * scale


@dataclass(frozen=True)
class Lookup(Elementwise):
    """numerics.int_lookup of a tensor of table indices. Arguments: index, table, out."""

    dtype: str

    def operands(self) -> tuple[Argument, ...]:
        table = Argument("table", (2**INDEX_BITS,), self.dtype, "input")
        return (Argument("index", self.shape, "uint16", "input"), table)

    def result_dtype(self) -> str:
        return self.dtype

    def label(self) -> tuple[str, list[str], str]:
        return "lookup", ["uint16"], ""

    def element(self, buffers: list[Expr], at: Expr, lanes: int, prepared: object) -> Expr:
        return tir.load(buffers[1], tir.cast(tir.load(buffers[0], at, 1), "int32", 1), 1)

    def _run(self, inputs: list[Expr], out: Expr, start: Expr, count: Expr, lanes: int) -> None:
        with TB.serial(0, count * lanes) as i:  # scalar loads are as fast as any gather
            tir.store(out, self.element(inputs, start + i, 1, None), start + i, 1)
