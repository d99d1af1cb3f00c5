"""Integer constants of a linear layer whose scales inside the sum are whole multiples."""

from __future__ import annotations

import math

import numpy as np

from tvm_vitq.formats import Format
from tvm_vitq.integerize.linear import (
    WEIGHT_MAX,
    LinearConstants,
    empty_unit,
    prove,
    weight_codes,
)
from tvm_vitq.numerics import Array, Multiples
from tvm_vitq.quantizers.multiples import WholeScales


def multiple_constants(
    weight: Array,
    bias: Array,
    weight_scale: Array,
    weight_ends: tuple[Array, Array],
    whole: WholeScales,
    x: Format,
    out: Format | None,
    site: str,
) -> LinearConstants:
    """Quantize a layer ``y = x @ weight.T + bias`` with ``s_w[n, g] s_x[g] = count[n, g] step[n]``:

        y[n] = step[n] * ( sum_g count[n, g] (dot_g - zero_x[g] sum_{k in g} w[n, k])  +  bias[n] / step[n] )

    Parameters are those of linear.linear_constants. Where every ``count * w`` fits the byte of a weight, it
    becomes the weight and the layer is a plain one; otherwise see numerics.Multiples.
    """
    codes, scale = weight_codes(weight, weight_scale, weight_ends)
    count = np.repeat(whole.count, weight.shape[1] // whole.count.shape[1], axis=1)
    if x.offset:
        bias = bias + x.offset * (codes * scale).sum(1)
    w, inner, unit = codes.astype(np.int64), None, whole.step
    largest = int(np.abs(w * count).max(initial=0))
    if largest <= WEIGHT_MAX:
        align = 2 ** int(math.log2(WEIGHT_MAX / max(largest, 1)))
        w, count, unit = w * count * align, np.ones_like(count), unit / align
    else:
        inner = Multiples(np.ascontiguousarray(whole.count.T).astype(np.int16))
    out_scale = 1.0 if out is None else out.scale
    zero_point = np.zeros(1, np.int32) if out is None else np.atleast_1d(out.zero_point).astype(np.int32)
    unit = np.where(w.any(1), unit, empty_unit(bias, out_scale))
    zero = np.repeat(np.atleast_1d(x.zero_point).astype(np.int64), weight.shape[1] // x.zero_point.size)
    integer_bias = np.rint(bias / unit) - (w * count * zero).sum(1)
    prove(w * count, integer_bias, x, site)
    multiplier = (unit / out_scale).astype(np.float32)
    return LinearConstants(w.astype(np.int8), integer_bias.astype(np.int32), multiplier, zero_point, inner)
