"""Integer formats of tensors: what number an integer stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import INDEX_BITS, WIDE_MAX, Array
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import codec_of
from tvm_vitq.quantizers.codebook import GRID, Codebook

WIDE_TARGET_BITS = 21
"""The largest calibrated value of a wide tensor is put just below 2**21, which leaves a factor of 8 before
the limit 2**24 for inputs that exceed the calibration set."""

WIDE_SMALLEST = 2.0**-10
"""Tensors that stay below this are treated as if they reached it: finer units than 2**-30 serve nobody, and
LayerNorm's epsilon, which is counted in squared units, would outgrow int64."""

GATE_MAX = 2**15 - 1
"""Largest value of the operands of an elementwise product: the product of two fits int32."""


@dataclass(frozen=True, eq=False)
class Format:
    """``real = scale * (integer - zero_point) + offset`` for integers in qmin..qmax of the given dtype.

    `scale` and `zero_point` are numbers, or arrays that lie along the axis which `granularity` names:
    "tensor", "channel" (last axis), "group" (equal parts of the last axis), "token" (axis before it), "head"
    (axis 1 of [B, H, T, D]). Only codebooks have an `offset`; linear layers move it to their bias.
    """

    dtype: str
    scale: Array
    zero_point: Array
    qmin: int
    qmax: int
    granularity: str = "tensor"
    offset: float = 0.0

    @property
    def key(self) -> tuple:
        """Equal for formats that store equal values as equal integers."""
        return (
            self.dtype,
            self.scale.tobytes(),
            self.zero_point.tobytes(),
            self.qmin,
            self.qmax,
            self.granularity,
            self.offset,
        )

    @property
    def largest(self) -> float:
        """The largest real number that it holds, anywhere."""
        return float(np.max(self.scale * (self.qmax - self.zero_point))) + self.offset

    @property
    def is_wide(self) -> bool:
        return self.dtype == "int32"

    def broadcast(self, shape: list[int]) -> tuple[Array, Array]:
        """Scale and zero point shaped so that they broadcast over a tensor of `shape`."""
        return tuple(_along(v, self.granularity, shape) for v in (self.scale, self.zero_point))  # type: ignore[return-value]

    def encode(self, real: Array) -> Array:
        """Integers of a float tensor, in float64 arithmetic: for constants and tables at build time."""
        scale, zero = self.broadcast(list(np.shape(real)))
        codes = np.rint(np.asarray(real, np.float64) / scale) + zero
        return np.clip(codes, self.qmin, self.qmax).astype(self.dtype)


@dataclass(frozen=True, eq=False)
class CodebookFormat(Format):
    """Integer levels of a codebook: only those in `values` occur.

    ``integer = values[number of thresholds <= real]``; thresholds : float64 [M - 1], values : int [M], both
    ascending.
    """

    thresholds: Array = field(default_factory=lambda: np.empty(0))
    values: Array = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def key(self) -> tuple:
        return (*super().key, self.thresholds.tobytes(), self.values.tobytes())

    def encode(self, real: Array) -> Array:
        return self.values[np.searchsorted(self.thresholds, real, side="right")].astype(self.dtype)

    def index(self, power_of_two: bool) -> Format:
        """Positions in a table over the range in which the levels differ."""
        margin = (self.thresholds[-1] - self.thresholds[0]) / 64
        return index_format(self.thresholds[0] - margin, self.thresholds[-1] + margin, power_of_two)


def _along(value: Array, granularity: str, shape: list[int]) -> Array:
    if value.size == 1:
        return value.reshape(())
    if granularity == "channel":
        return value
    if granularity == "group":
        return np.repeat(value, shape[-1] // value.size)
    if granularity == "token":
        return value[:, None]
    if granularity == "head":
        return value[:, None, None]
    raise VitqError("unknown granularity", got=granularity, expected="tensor, channel, group, token or head")


def scalar_format(dtype: str, scale: float, zero_point: int, qmin: int, qmax: int) -> Format:
    return Format(dtype, np.array(scale, np.float64), np.array(zero_point, np.int32), qmin, qmax)


def wide_format(largest: float) -> Format:
    """Fixed point with the finest power-of-two unit that keeps `largest` below 2**WIDE_TARGET_BITS."""
    exponent = WIDE_TARGET_BITS - math.frexp(max(largest, WIDE_SMALLEST))[1]
    return scalar_format("int32", 2.0**-exponent, 0, -WIDE_MAX, WIDE_MAX)


def power_of_two_above(step: float) -> float:
    """The smallest power of two that is not below `step`."""
    mantissa, exponent = math.frexp(step)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))


def gate_format(largest: float, power_of_two: bool = False) -> Format:
    """16-bit fixed point for a factor of an elementwise product."""
    step = max(largest, 1e-6) / GATE_MAX
    return scalar_format("int16", power_of_two_above(step) if power_of_two else step, 0, -GATE_MAX, GATE_MAX)


def index_format(low: float, high: float, power_of_two: bool = False) -> Format:
    """Positions in a function table over [low, high]; 0 is one of the tabulated arguments when it lies
    inside.
    """
    step = (high - low) / (2**INDEX_BITS - 1)
    step = power_of_two_above(step) if power_of_two else step
    return scalar_format("uint16", step, round(-low / step), 0, 2**INDEX_BITS - 1)


def codes_format(
    bits: int,
    scale: list[float],
    zero_point: list[int],
    granularity: str,
    limits: tuple[int, int] | None = None,
) -> Format:
    """Centred codes of an unsigned b-bit quantizer: ``q - 2**(bits-1)``; `limits` of q if not those of b
    bits.
    """
    centre = 2 ** (bits - 1)
    low, high = limits or (0, 2 * centre - 1)
    zero = np.asarray(zero_point, np.int32) - centre
    values = np.asarray(scale, np.float64)
    if values.size == 1:
        values, zero, granularity = values.reshape(()), zero.reshape(()), "tensor"
    return Format("int8", values, zero, low - centre, high - centre, granularity)


def codebook_format(site: SiteQuantizer, where: str) -> CodebookFormat:
    """The integer levels of a codebook quantizer as signed bytes; VitqError if they span more than a byte."""
    codec = codec_of(site)
    assert isinstance(codec, Codebook)  # by the caller's choice
    thresholds, values = codec.integers(site)
    if values[-1] - values[0] > 255:
        raise VitqError(
            "the levels of a codebook span more than a byte",
            where=where,
            got=f"{values[0]} to {values[-1]}",
            expected="at most 255 apart",
            fix=f'a smaller params["grid"], such as {GRID}',
        )
    zero_point = int(-128 - values[0])
    grid, shift = codec.grid_and_shift(site)
    scale = float(site.scale[0])
    return CodebookFormat(
        "int8", np.array(scale / grid), np.array(zero_point, np.int32),
        -128, int(values[-1]) + zero_point, "tensor", -shift, scale * thresholds - shift, values + zero_point,
    )  # fmt: skip
