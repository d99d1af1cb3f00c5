"""Integer constants of LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.formats import Format
from tvm_vitq.integerize.headroom import INT32_MAX
from tvm_vitq.numerics import NORM_BITS, NORM_MAX, WIDE_MAX, Array


@dataclass(frozen=True)
class LayerNormConstants:
    """Operands of numerics.int_layer_norm."""

    gain: Array
    offset: Array
    shift: int
    epsilon: int


LARGEST_GAIN = 2.0**9
"""Of outputs with scales for groups of channels. All channels share a shift, which the largest gain limits:
``|n| 2**-6`` steps at worst, n the normalized value."""


def gain_fits(gamma: Array, out: Format) -> bool:
    """Whether no channel's step is so fine that the gains of the others would have too few bits."""
    scale, _ = out.broadcast([len(gamma)])
    return bool(np.abs(gamma / scale).max() <= LARGEST_GAIN)


def layer_norm_constants(
    gamma: Array, beta: Array, eps: float, x: Format, out: Format, site: str
) -> LayerNormConstants:
    """``gain = gamma / s_out * 2**(shift - NORM_BITS)``, ``offset = (beta / s_out + zero) * 2**shift +
    half``.

    The shift is the largest for which ``NORM_MAX * |gain| + |offset|`` fits int32, so the gains carry as many
    bits as there is room for: at least 13 for the widest channel of an 8-bit output. The output may have
    scales for groups of channels.
    """
    channels = len(gamma)
    epsilon = max(1, round(channels * eps / float(x.scale) ** 2))
    if channels * (2 * WIDE_MAX) ** 2 + epsilon >= 2**63:
        raise VitqError(
            "LayerNorm is too wide for its 64-bit sum of squares",
            where=site,
            got=f"{channels} channels, eps {eps:g}",
            expected="at most 8192 channels, and an eps that is small against the variances",
        )
    scale, zero = out.broadcast([channels])
    slope = np.abs(gamma / scale)
    level = np.abs(beta / scale + zero)
    for shift in range(30, 0, -1):
        gain = np.rint(gamma / scale * 2.0 ** (shift - NORM_BITS))
        offset = np.rint((beta / scale + zero) * 2.0**shift + 2.0 ** (shift - 1))
        if (NORM_MAX * np.abs(gain) + np.abs(offset)).max() <= INT32_MAX:
            return LayerNormConstants(gain.astype(np.int32), offset.astype(np.int32), shift, epsilon)
    raise VitqError(
        "the affine part of LayerNorm does not fit int32",
        where=site,
        got=f"gamma / step up to {slope.max():.4g}, beta / step up to {level.max():.4g}",
        fix="use fewer bits or a wider range for the output quantizer of this layer",
    )
