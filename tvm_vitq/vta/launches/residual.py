"""The residual sum behind a linear layer, on the ALU: what a layer adds to the stream, and the stream.

Sums of channel n count in ``2**k`` units of the stream. The largest k of a block of channels, if positive,
shifts its sums to the left; what was too much for a channel, ``s = left - k``, shifts the total to the right:

    ``(((w x) << left) + v) >> s``,   ``v = (stream << s) + ((bias + half) << left)``

with ``half = 2**(-k - 1)`` of channels with k < 0, else 0. The host makes v, of which VTA gets `digits`. The
total's saturation is the host's: immediates of 16 bits cannot limit 25.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import WIDE_MAX, Array, Output
from tvm_vitq.vta.launches.linear import LARGEST_SUM, Conversion
from tvm_vitq.vta.stream.digits import LARGEST, LOW_BITS
from tvm_vitq.vta.stream.epilogue import Epilogue
from tvm_vitq.vta.stream.requantization import LARGEST_SHIFT

EXACT_FLOATS = 2**24
"""Integers below are float32."""


@dataclass(frozen=True)
class Residual:
    """A layer whose result is the new stream.

    conversion : its epilogue.
    scale, constant : int32 [N]; ``v = stream * scale + constant``.
    """

    conversion: Conversion
    scale: Array
    constant: Array

    @classmethod
    def of(
        cls, weight: Array, bias: Array, multiplier: Array, out: Output, block: int, largest: int = 128
    ) -> Residual:
        """Of int8 weights [N, K] and codes of at most `largest` in magnitude.

        Raises
        ------
        VitqError : shifts do not give the result, or it could saturate before the stream is added.
        """
        count = len(bias)
        exponent = np.log2(np.broadcast_to(np.asarray(multiplier, np.float64), count))
        k = np.round(exponent).astype(np.int64)
        if out.dtype != "int32" or (out.qmin, out.qmax) != (-WIDE_MAX, WIDE_MAX):
            raise VitqError("the layer's result is no residual stream", got=out)
        if (k != exponent).any():
            raise VitqError("the residual sum has real multipliers")
        sums = largest * np.abs(weight.astype(np.int64)).sum(1) + np.abs(bias.astype(np.int64))
        if out.kind == "multiply" and ((k < 0).any() or sums.max() >= EXACT_FLOATS):
            raise VitqError("sums of the layer are rounded to even")
        added = sums * 2.0**k
        if added.max() > WIDE_MAX:
            raise VitqError("the layer may saturate before the residual sum does")
        order = np.argsort(k, kind="stable")
        left = np.zeros(count, np.int64)
        for start in range(0, count, block):
            own = order[start : start + block]
            left[own] = max(int(k[own].max()), 0)
        right = left - k
        if left.max() >= LOW_BITS or right.max() > LARGEST_SHIFT:
            raise VitqError("the residual sum does not fit 32 bits", got=f"shifts {k.min()} to {k.max()}")
        half = np.where(k < 0, np.int64(1) << np.maximum(-k - 1, 0), 0)
        constant = (bias.astype(np.int64) + half) << left
        largest_v = (WIDE_MAX << right) + np.abs(constant)
        total = largest_v + (sums << left)
        if largest_v.max() > LARGEST or total.max() > LARGEST_SUM:
            raise VitqError("the residual sum does not fit 32 bits", got=f"shifts {k.min()} to {k.max()}")
        epilogue = Epilogue(None, right, None, None, planes=4, left=left)
        made = Conversion(epilogue, "int32", True, tuple(order.tolist()))
        return cls(made, (1 << right).astype(np.int32), constant.astype(np.int32))
