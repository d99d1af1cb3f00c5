"""What the ALU makes of the sums of a product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tvm_vitq.numerics import Array
from tvm_vitq.vta.stream.assembler import Buffer


@dataclass(frozen=True)
class Rows:
    """A value for each row of a product, which the host gives for each run: accumulators of a buffer, from
    `first` on, that hold it in all channels.
    """

    buffer: Buffer
    first: int


@dataclass(frozen=True)
class Epilogue:
    """What happens to sums: ``clip((sum + bias) >> shift, low, high)``, as int8 or in several bytes.

    left : int32 [N], the same in each block of channels, of products to which digits are added, see
        `residual`: ``((sum << left) + v) >> shift``. Else None.

    bias : int32 [N], `Rows` (then `by_rows`) or None;  shift : int32 [N], 0 to 31.
    bias_is_product : whether a bias may be one, where it is small enough (`blocks.bias_as_products`).
    by_rows : whether these belong to rows of the result, [M], as where weights are the left operand.
    low, high : 16-bit limits, or None.
    planes : bytes of the result that are stored, the lowest first, each as a matrix of its own.
    """

    bias: Array | Rows | None
    shift: Array
    low: int | None = -128
    high: int | None = 127
    planes: int = 1
    by_rows: bool = False
    left: Array | None = None
    bias_is_product: bool = True

    def of_channels(self, chosen: Array | slice) -> Epilogue:
        """That of some channels, in this order."""
        bias = self.bias[chosen] if isinstance(self.bias, np.ndarray) else self.bias
        left = None if self.left is None else self.left[chosen]
        return replace(self, bias=bias, shift=self.shift[chosen], left=left)
