"""Matrices as VTA has them: blocked, ``[rows / 16][columns / 16][16][16]``.

The same bytes are inputs (16 elements a block, one a row), weights (one element a block, ``[output
channel][input channel]``) and results, so that what one product writes is any operand of the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_vitq.numerics import Array
from tvm_vitq.vta.stream.assembler import Buffer


@dataclass(frozen=True)
class Matrix:
    """A blocked matrix in device memory, or a part of one.

    rows, columns : of blocks.
    first : block at which it starts;  pitch : blocks from one row of blocks to the next.
    """

    buffer: Buffer
    rows: int
    columns: int
    first: int = 0
    pitch: int = 0

    def block(self, row: int, column: int) -> int:
        """Where a block is, in blocks."""
        return self.first + row * self.stride + column

    @property
    def stride(self) -> int:
        """`pitch`, or the matrix' own columns."""
        return self.pitch or self.columns

    def part(self, rows: slice, columns: slice) -> Matrix:
        """Some of its blocks."""
        first = self.block(rows.start, columns.start)
        size = (rows.stop - rows.start, columns.stop - columns.start)
        return Matrix(self.buffer, *size, first=first, pitch=self.stride)


def pack(matrix: Array, block: int = 16) -> Array:
    """Blocked int8 ``[rows / 16, columns / 16, 16, 16]`` of int8 [rows, columns], filled up with zeros."""
    rows, columns = (-(-size // block) for size in matrix.shape)
    full = np.zeros((rows * block, columns * block), np.int8)
    full[: matrix.shape[0], : matrix.shape[1]] = matrix
    return np.ascontiguousarray(full.reshape(rows, block, columns, block).transpose(0, 2, 1, 3))


def constant_matrix(name: str, values: Array, block: int = 16) -> Matrix:
    """int8 [rows, columns] as a blocked matrix in a buffer of its own."""
    packed = pack(values, block)
    return Matrix(Buffer(name, packed.size, contents=packed.view(np.uint8).ravel()), *packed.shape[:2])


def unpack(blocks: Array, rows: int, columns: int) -> Array:
    """The inverse of `pack`."""
    height, width, block, _ = blocks.shape
    return blocks.transpose(0, 2, 1, 3).reshape(height * block, width * block)[:rows, :columns]


def bias_as_products(bias: Array, block: int = 16) -> tuple[Array, Array] | None:
    """An input int8 [16] and weights int8 [N / 16, 16, 16] whose products are the bias: ``weights @ input``.
    One cycle for each accumulator, where an addition takes two. None for a bias beyond 15 * 127 * 127.
    """
    large, digits = 127, block - 1
    count = -(-len(bias) // block) * block
    values = filled(np.asarray(bias, np.int64), count)
    whole = (values + large // 2) // large
    if np.abs(whole).max() > digits * large:
        return None
    weights = np.zeros((count, block), np.int64)
    weights[:, -1] = values - whole * large
    for digit in range(digits):
        weights[:, digit] = np.clip(whole, -large, large)
        whole = whole - weights[:, digit]
    vector = np.array([large] * digits + [1], np.int8)
    return vector, weights.astype(np.int8).reshape(-1, block, block)


def filled(values: Array, count: int) -> Array:
    """Values of channels, with zeros for those that only fill up the last block."""
    return np.concatenate([values, np.zeros(count - len(values), values.dtype)])
