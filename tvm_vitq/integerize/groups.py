"""Integer constants of a linear layer whose input channels choose their quantizers at run time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.formats import Format, wide_format
from tvm_vitq.integerize.headroom import require
from tvm_vitq.integerize.linear import OFFSET_CODES
from tvm_vitq.numerics import WIDE_MAX, Array
from tvm_vitq.numerics_groups import GroupQuantizers
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.dynamic_group import DynamicGroup

FARTHEST_CODE = 2**15 - 1
"""Largest distance of a code from its zero point."""

SUM_LIMIT = 2**30
"""Bound of the sum over groups: half of int32, so that no rounding of a float32 part can pass the end."""


@dataclass(frozen=True)
class GroupLinearConstants:
    """Operands of numerics_groups.int_group_linear; see there for shapes."""

    weight: Array
    bias: Array
    multiplier: Array
    zero_point: Array
    quantizers: GroupQuantizers
    group_multiplier: Array


def group_quantizers(site: SiteQuantizer, x: Format, where: str) -> GroupQuantizers:
    """The quantizers of a site in units of the wide format `x`; VitqError if a zero point is too far away."""
    centre = 2 ** (site.bits - 1)
    low, high = (np.clip(np.rint(end / x.scale), -WIDE_MAX, WIDE_MAX) for end in DynamicGroup().bounds(site))
    zero = np.asarray(site.zero_point, np.int64) - centre
    farthest = int(np.maximum(centre - 1 - zero, zero + centre).max())
    if farthest > FARTHEST_CODE:
        raise VitqError(
            "a zero point is too far from the codes",
            where=where,
            got=f"up to {farthest} steps between them",
            expected=f"at most {FARTHEST_CODE}",
            fix="calibrate anew with the recipe igq-vit, which keeps steps wide enough",
        )
    multiplier = (x.scale / np.asarray(site.scale, np.float64)).astype(np.float32)
    low, high, zero = (v.astype(np.int32) for v in (low, high, zero))
    return GroupQuantizers(int(site.params["tokens"]), low, high, multiplier, zero, -centre, centre - 1)


def group_linear_constants(
    weight: Array,
    bias: Array,
    weight_scale: Array,
    weight_ends: tuple[Array, Array],
    input_site: SiteQuantizer,
    x: Format,
    out: Format | None,
    largest: float,
    site: str,
) -> GroupLinearConstants:
    """Quantize a layer ``y = x @ weight.T + bias`` behind a dynamic_group quantizer.

    Parameters
    ----------
    weight : float [N, K];  bias : float [N]
    weight_scale : float [N, 1]
    weight_ends : smallest and largest code, as ``q - zero_point``, [N, 1] each
    input_site : the plan's quantizer of x;  x : wide format of x
    out, largest : as in linear.linear_constants

    The parts of all groups are added in the wide unit of the output, or in a coarser one (a power of two as
    well) where the largest possible sum asks for it. For any assignment of channels, with farthest code f_g,

        |sum over g of part_g| <= sum_k |w[n,k]| max_g f_g m_g[n] + G / 2.
    """
    if weight_scale.shape[1] != 1:
        raise VitqError(
            "weights in groups of input channels do not go with groups that inputs choose at run time",
            where=site,
            fix='ask for granularity "channel" of this weight',
        )
    quantizers = group_quantizers(input_site, x, f"{site}.input")
    scale = weight_scale[:, 0]
    w = np.clip(np.rint(weight / weight_scale), *weight_ends).astype(np.int8)
    sums = np.abs(w.astype(np.int64)).sum(1)
    zero = quantizers.zero_point.astype(np.int64)
    farthest = np.maximum(quantizers.qmax - zero, zero - quantizers.qmin)
    bound = float(sums.max(initial=0)) * (int(farthest.max()) + OFFSET_CODES)
    require(bound, site, "a group", "use fewer bits for its input or weight")
    real = np.asarray(input_site.scale, np.float32).astype(np.float64)[:, None] * scale  # [G, N]
    most = sums * (farthest[:, None] * real).max(0) + np.abs(bias)
    unit = float(wide_format(largest).scale)
    while most.max() / unit + len(zero) + 1 > SUM_LIMIT:
        unit *= 2
    out_scale = 1.0 if out is None else out.scale
    zero_point = np.zeros(1, np.int32) if out is None else np.atleast_1d(out.zero_point).astype(np.int32)
    return GroupLinearConstants(
        w,
        np.rint(bias / unit).astype(np.int32),
        np.atleast_1d(unit / np.asarray(out_scale)).astype(np.float32),
        zero_point,
        quantizers,
        (real / unit).astype(np.float32),
    )
