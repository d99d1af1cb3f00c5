"""Tensors of the host as a launch takes and leaves them: blocked, and a matrix for each byte of a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from tvm_vitq.numerics import Array
from tvm_vitq.vta.stream.assembler import Buffer
from tvm_vitq.vta.stream.blocks import Matrix, pack, unpack
from tvm_vitq.vta.stream.digits import DIGITS, digits


@dataclass(frozen=True)
class Operand:
    """A tensor ``[count, rows, columns]`` in device memory: `count` blocked matrices one behind the other, in
    one buffer for each byte of a value, the lowest first.

    dtype : of the host: int8, or what several bytes make: uint16 of two, int32 of up to four, the highest
        with its sign. Of an input, int32 are values of rows, see `of_rows`, or digits, see `of_digits`.
    order : the tensor's columns in the order in which memory has them; () is their own.
    """

    planes: tuple[Buffer, ...]
    count: int
    rows: int
    columns: int
    dtype: str
    order: tuple[int, ...] = ()

    @classmethod
    def made(
        cls,
        name: str,
        shape: tuple[int, int, int],
        dtype: str,
        block: int,
        planes: int = 1,
        written: bool = True,
    ) -> Operand:
        """With buffers of its own, which the host writes, or the device."""
        count, rows, columns = shape
        size = count * math.prod(-(-n // block) for n in (rows, columns)) * block**2
        names = [name] if planes == 1 else [f"{name} byte {n}" for n in range(planes)]
        return cls(tuple(Buffer(each, size, written=written) for each in names), *shape, dtype)

    @classmethod
    def of_rows(cls, name: str, count: int, rows: int, block: int) -> Operand:
        """A value of each row of `count` matrices, int32 [count, rows]: accumulators of it in all channels,
        0 behind the last row.
        """
        size = count * -(-rows // block) * block * 4 * block
        return cls((Buffer(name, size),), count, rows, 1, "int32")

    @classmethod
    def of_digits(cls, name: str, shape: tuple[int, int, int], block: int, order: tuple[int, ...]) -> Operand:
        """int32 values that are added to results, as `digits.digits`."""
        return replace(cls.made(name, shape, "int32", block, DIGITS), order=order)

    def matrices(self, number: int, block: int) -> list[Matrix]:
        """Matrix `number` of each plane."""
        rows, columns = -(-self.rows // block), -(-self.columns // block)
        return [Matrix(plane, rows, columns, first=number * rows * columns) for plane in self.planes]

    def packed(self, tensor: Array, block: int) -> list[Array]:
        """A tensor as the bytes of its buffers."""
        if len(self.planes) == DIGITS and self.order:
            ordered = np.asarray(tensor).reshape(self.count, self.rows, self.columns)[..., list(self.order)]
            return [self._blocked(digit, block) for digit in digits(ordered)]
        if self.dtype == "int32":
            values = np.asarray(tensor, np.int32).reshape(self.count, self.rows)
            full = np.pad(values, [(0, 0), (0, -self.rows % block)])
            return [np.repeat(full.ravel(), block)]
        return [self._blocked(np.asarray(tensor, np.int8), block)]

    def _blocked(self, codes: Array, block: int) -> Array:
        matrices = codes.reshape(self.count, self.rows, self.columns)
        return np.stack([pack(matrix, block) for matrix in matrices])

    def unpacked(self, planes: list[Array], block: int) -> Array:
        """The tensor that the bytes of the buffers make, ``[count, rows, columns]``."""
        shape = (self.count, -(-self.rows // block), -(-self.columns // block), block, block)
        result = np.zeros((self.count, self.rows, self.columns), np.int32)
        for number, plane in enumerate(planes):
            signed = number == len(planes) - 1 and self.dtype != "uint16"
            blocks = plane.view(np.int8 if signed else np.uint8).reshape(shape)
            for matrix, into in zip(blocks, result, strict=True):
                into += unpack(matrix, self.rows, self.columns).astype(np.int32) << 8 * number
        if self.order:
            ordered = np.empty_like(result)
            ordered[..., list(self.order)] = result
            result = ordered
        return result.astype(self.dtype)
