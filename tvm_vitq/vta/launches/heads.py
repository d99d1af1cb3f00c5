"""Self-attention as VTA has it: heads of whole blocks of channels, v transposed."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_vitq.numerics import Array
from tvm_vitq.vta.stream.blocks import Matrix
from tvm_vitq.vta.stream.operand import Operand


@dataclass(frozen=True)
class Heads:
    """Sizes of self-attention.

    batch, heads, tokens : of images, heads, tokens;  width : channels of a head, of q, k and v alike.
    block : see `VtaConfig`.
    """

    batch: int
    heads: int
    tokens: int
    width: int
    block: int

    @property
    def wide(self) -> int:
        """Channels of a head, filled up to whole blocks with some that are 0."""
        return -(-self.width // self.block) * self.block

    @property
    def channels(self) -> int:
        """Of q, of k, of v, as VTA has them."""
        return self.heads * self.wide


@dataclass(frozen=True)
class Values:
    """v transposed, int8 [batch, channels, tokens], as `scores.Scores` leaves it on the device.

    order : its channels in the order in which memory has them.
    """

    operand: Operand
    order: Array

    def head(self, image: int, head: int, heads: Heads) -> Matrix:
        """That of a head."""
        (matrix,) = self.operand.matrices(image, heads.block)
        return rows_of(matrix, head * heads.wide, heads.wide, heads.block)


def rows_of(matrix: Matrix, start: int, height: int, block: int) -> Matrix:
    """Some rows, which begin and end with blocks."""
    return matrix.part(slice(start // block, (start + height) // block), slice(0, matrix.columns))


def columns_of(matrix: Matrix, start: int, width: int, block: int) -> Matrix:
    """Some columns, which begin and end with blocks."""
    return matrix.part(slice(0, matrix.rows), slice(start // block, (start + width) // block))
