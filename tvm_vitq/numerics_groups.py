"""Linear layers whose input channels choose their scales at run time, in integers: the second part of the
arithmetic that numerics.py defines.

Each image assigns every channel of a wide tensor to one of G quantizers, by the channel's smallest and
largest value over the image's tokens. All is exact up to the codes; docs/numerics.md derives the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_vitq.numerics import Array, Output, integer_matmul, requantize


@dataclass(frozen=True)
class GroupQuantizers:
    """The quantizers that channels choose from.

    tokens : rows of an image, which are consecutive.
    low, high : int32 [G], the bounds in units of the wide tensor.
    multiplier : float32 [G], that unit over the step of the codes;  zero_point : int32 [G].
    qmin, qmax : of the codes.
    """

    tokens: int
    low: Array
    high: Array
    multiplier: Array
    zero_point: Array
    qmin: int
    qmax: int

    @property
    def codes(self) -> Output:
        return Output("int8", self.qmin, self.qmax)


def int_assign(x: Array, quantizers: GroupQuantizers) -> Array:
    """Group of every channel of a wide tensor [..., C], as int32 [images, C].

    ``argmin_g (min_c - low_g)**2 + (max_c - high_g)**2`` over the image's tokens, the first of equals. With
    |values| and |bounds| up to WIDE_MAX each square is below 2**50: exact in int64 and in float64.
    """
    rows = x.reshape(-1, quantizers.tokens, x.shape[-1])
    least, largest = rows.min(1).astype(np.int64), rows.max(1).astype(np.int64)
    below = least[..., None] - quantizers.low
    above = largest[..., None] - quantizers.high
    return (below * below + above * above).argmin(-1).astype(np.int32)


def int_group_codes(x: Array, groups: Array, quantizers: GroupQuantizers) -> Array:
    """int8 codes [images, tokens, C] of a wide tensor, each channel by the quantizer of its group."""
    rows = x.reshape(len(groups), -1, x.shape[-1])
    multiplier, zero = (v[groups][:, None] for v in (quantizers.multiplier, quantizers.zero_point))
    return requantize(rows, multiplier, zero, quantizers.codes)


def int_group_linear(
    x: Array,
    weight: Array,
    bias: Array,
    multiplier: Array,
    zero_point: Array | int,
    out: Output,
    quantizers: GroupQuantizers,
    group_multiplier: Array,
) -> Array:
    """Linear layer on a wide tensor whose channels are quantized in groups of each image's own choice.

    ``acc = bias + sum_g round(float32(sum_{c in g} (code_c - zero_g) weight_c) * group_multiplier_g)``, then
    requantized. A group without channels adds 0.

    x : wide [..., K];  weight : int8 [N, K];  bias : int32 [N];  group_multiplier : float32 [G, N];
    multiplier, zero_point as in numerics.int_linear. The caller has proved that every group's product stays
    below 2**31 and that the sum of all parts does, so that nothing is clipped on the way.
    """
    groups = int_assign(x, quantizers)
    codes = int_group_codes(x, groups, quantizers).astype(np.int16)
    acc = np.broadcast_to(bias, (*codes.shape[:2], len(bias))).astype(np.int32)
    for g, zero in enumerate(quantizers.zero_point):
        for image, chosen in enumerate(groups == g):
            centred = (codes[image][:, chosen] - np.int16(zero)).astype(np.int16)
            dot = integer_matmul(centred, weight[:, chosen].T)
            acc[image] += np.rint(dot.astype(np.float32) * group_multiplier[g]).astype(np.int32)
    return requantize(acc.reshape(*x.shape[:-1], -1), multiplier, zero_point, out)
