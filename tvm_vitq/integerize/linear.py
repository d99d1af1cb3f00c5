"""Integer constants of a linear layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.formats import Format, wide_format
from tvm_vitq.integerize.headroom import linear_bound, require
from tvm_vitq.numerics import WIDE_MAX, Array, Multiples, Partial

WEIGHT_MAX = 127
"""Largest magnitude of a weight's byte: kernels do without -128."""

OFFSET_CODES = 128
"""x86 dot products need unsigned codes, so kernels may add 128 to each; headroom is proved for that as
well.
"""


@dataclass(frozen=True)
class LinearConstants:
    """Operands of numerics.int_linear; see there for shapes."""

    weight: Array
    bias: Array
    multiplier: Array
    zero_point: Array
    inner: Partial | Multiples | None


def linear_constants(
    weight: Array,
    bias: Array,
    weight_scale: Array,
    weight_ends: tuple[Array, Array],
    x: Format,
    out: Format | None,
    largest: float,
    site: str,
) -> LinearConstants:
    """Quantize a layer ``y = x @ weight.T + bias``.

    Parameters
    ----------
    weight : float [N, K];  bias : float [N]
    weight_scale : float [N, G], one scale per output channel and group of K / G input channels
    weight_ends : smallest and largest code, as ``q - zero_point``, [N, G] each
    x : format of the input codes
    out : format of the output; its scale and zero point may be arrays over N. None: float32 logits
    largest : largest calibrated \\|y\\|, used for the unit of sums with scales inside

    With one scale for x and one per output channel the sum is ``dot + bias_q - zero_x * sum_k w``, and
    requantization multiplies by ``s_x s_w / s_out``. Codes of fewer than 8 bits are then stored as multiples
    of `align`, the largest power of two that keeps them in a byte, at the upper end of that: the sum gets
    that many fractions of ``s_x s_w``, and the bias is rounded to those. Otherwise see numerics.Partial.
    """
    plain = weight_scale.shape[1] == 1 and x.granularity == "tensor"
    largest_code = max(int(np.abs(end).max()) for end in weight_ends)
    align = 2 ** int(math.log2(WEIGHT_MAX / largest_code)) if plain else 1
    if plain:
        weight_scale = np.maximum(weight_scale, align * _least_unit(bias)[:, None] / x.scale)
    codes, scale = weight_codes(weight, weight_scale, weight_ends)
    w = (codes * align).astype(np.int8)
    weight_scale = weight_scale / align
    if x.granularity == "channel":
        raise VitqError(
            "input scales per channel must be folded into the weights before the layer is realized",
            where=site,
            fix="calibrate with a recipe that folds them (percentile does), or with granularity 'tensor'",
        )
    if x.offset:
        bias = bias + x.offset * (w.astype(np.float64) * scale / align).sum(1)
    out_scale = 1.0 if out is None else out.scale
    zero_point = np.zeros(1, np.int32) if out is None else np.atleast_1d(out.zero_point).astype(np.int32)
    if plain:
        unit = np.where(w.any(1), x.scale * weight_scale[:, 0], empty_unit(bias, out_scale))
        integer_bias = np.rint(bias / unit) - int(x.zero_point) * w.astype(np.int64).sum(1)
        prove(w, integer_bias, x, site)
        multiplier = (unit / out_scale).astype(np.float32)
        return LinearConstants(w, integer_bias.astype(np.int32), multiplier, zero_point, None)
    unit_sum = float(wide_format(largest).scale)
    partial = _partial(w, weight_scale, x, unit_sum, site)
    integer_bias = np.rint(bias / unit_sum)
    bound = float(np.abs(integer_bias).max()) + len(partial.multiplier) * float(WIDE_MAX)
    require(bound, site, "the sum over groups", "use larger groups, at most 127 of them")
    multiplier = np.atleast_1d(unit_sum / np.asarray(out_scale)).astype(np.float32)
    return LinearConstants(w, integer_bias.astype(np.int32), multiplier, zero_point, partial)


def weight_codes(weight: Array, scale: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    """Codes ``q - zero_point`` of a weight [N, K], and scales [N, G] as [N, K], both float64."""
    numbers = np.broadcast_arrays(scale, *ends)
    scale, low, high = (np.repeat(v, weight.shape[1] // scale.shape[1], axis=1) for v in numbers)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale > 0, np.rint(weight / scale), 0.0)
    return np.clip(codes, low, high), scale


def empty_unit(bias: Array, out_scale: Array | float) -> Array:
    """The unit of an accumulator that holds nothing but a bias."""
    return np.maximum(64 * _least_unit(bias), np.broadcast_to(out_scale, bias.shape) * 2.0**-24)


def _least_unit(bias: Array) -> Array:
    """The unit of an accumulator below which a bias would take more than a quarter of int32: a power of two.

    Only rows whose weights are negligible beside their bias are coarser than their weight scale asks for: all
    products together stay below 2**29 for up to 2**14 input channels.
    """
    return np.exp2(np.ceil(np.log2(np.maximum(np.abs(bias), 2.0**-100)))) * 2.0**-29


def prove(w: Array, bias: Array, x: Format, site: str) -> None:
    """VitqError if ``bias + sum_k w x`` could overflow, with or without the offset of codes or the bias."""
    low, high = min(x.qmin, x.qmin + OFFSET_CODES), x.qmax + OFFSET_CODES
    shifted = bias - OFFSET_CODES * w.astype(np.int64).sum(1)
    bound = max(
        linear_bound(w, bias, x.qmin, x.qmax),
        linear_bound(w, shifted, low, high),
        linear_bound(w, np.zeros_like(bias), low, high),
    )
    require(
        bound, site, "the layer", "use fewer bits for its input or weight, or a wider range for its weight"
    )


def _partial(w: Array, weight_scale: Array, x: Format, unit: float, site: str) -> Partial:
    groups = max(weight_scale.shape[1], x.scale.size if x.granularity == "group" else 1)
    depth = w.shape[1]
    inner = weight_scale.shape[1], x.scale.size if x.granularity == "group" else 1
    if depth % groups or any(groups % n for n in inner):
        raise VitqError(
            "groups of inputs and of weights do not fit each other",
            where=site,
            got=f"{depth} input channels, {inner[1]} groups of the input, {inner[0]} of the weight",
            expected="numbers of groups that divide each other and the channels",
        )
    parts = w.astype(np.int64).reshape(len(w), groups, -1)
    sums = parts.sum(-1).T
    farthest = np.maximum(x.qmax - x.zero_point, x.zero_point - x.qmin).max()
    bound = float(np.abs(parts).sum(-1).max()) * (int(farthest) + OFFSET_CODES)
    require(bound, site, "a group", "use fewer bits for its input or weight, or smaller groups")
    by_weight = np.repeat(weight_scale.T, groups // inner[0], axis=0)
    if x.granularity == "token":
        row = np.atleast_1d(x.scale)
        middle = float(np.exp(np.log(row).mean()))
        return Partial(
            (by_weight * middle / unit).astype(np.float32),
            np.zeros((groups, len(w)), np.int32),
            (row / middle).astype(np.float32),
            np.atleast_1d(x.zero_point).astype(np.int32),
            sums.astype(np.int32),
        )
    by_input = np.repeat(np.atleast_1d(x.scale), groups // inner[1])[:, None]
    zero = np.repeat(np.atleast_1d(x.zero_point), groups // inner[1])[:, None]
    return Partial((by_weight * by_input / unit).astype(np.float32), (-zero * sums).astype(np.int32))
