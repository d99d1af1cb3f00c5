"""Scales of weights in groups whose products with the inputs' scales are whole multiples of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tvm_vitq.integerize.linear import WEIGHT_MAX
from tvm_vitq.numerics import Array
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.multiples import multiples_params

GROWTH = 1.02
"""Factor by which a step that is too fine is widened until it fits."""

SUM_LIMIT = 3 * 2**20
"""Largest sum of ``count |q|`` over a row: times 2 * 255, for codes and what is taken off for their zero
point, this is three quarters of int32."""

BIAS_LIMIT = 2.0**29
"""Largest bias in steps: a quarter of int32."""

_SMALLEST = float(np.finfo(np.float32).tiny)


def whole_multiples(
    weight: Array, bias: Array, site: SiteQuantizer, inputs: Array, most: int, in_a_byte: bool
) -> SiteQuantizer:
    """The quantizer of a weight [N, K] in groups, from the whole range of each group, with

        scale[n, g] = count[n, g] * step[n] / s_x[g],     count[n, g] = 1 .. most, rounded up

    so that nothing is clipped. The step of a row is that of its widest group divided by `most`, or wider
    where the proofs of `integerize` ask for it.

    Parameters
    ----------
    bias : [N], of the layer
    site : granularity "group" of axis 0; its numbers are replaced
    inputs : scales of the layer's input, of which each holds for a number of whole groups
    in_a_byte : whether each ``count * (q - zero_point)`` shall fit the byte of a weight
    """
    groups = _Groups.of(weight, site, inputs)
    wanted = groups.wanted
    step = np.maximum(wanted.max(1) / most, np.abs(bias) / BIAS_LIMIT)
    if in_a_byte:  # a code is at most one below the end of its group in steps
        step = np.maximum(step, groups.farthest.max(1) / (WEIGHT_MAX + most))
    step = np.maximum(step, _SMALLEST * groups.inputs.max())
    # No group of an empty row has a say; its scale shall be 1.
    step = np.where(groups.empty.all(1), np.maximum(step, groups.inputs.max()), step)
    while True:
        count = np.clip(np.ceil(wanted / step[:, None] - 1e-6), 1, most)
        scale = (count * step[:, None] / groups.inputs).astype(np.float32).astype(np.float64)
        zero = groups.zero_points(scale)
        coarse = np.zeros(len(step), bool)
        if in_a_byte:
            coarse = groups.largest_code(scale, zero, count) > WEIGHT_MAX
        if not coarse.any():
            coarse = groups.largest_sum(scale, zero, count) > SUM_LIMIT
        if not coarse.any():
            break
        step = np.where(coarse, step * GROWTH, step)
    return replace(
        site,
        scale=scale.ravel().tolist(),
        zero_point=zero.astype(int).ravel().tolist(),
        params={**site.params, **multiples_params(step, count.astype(int))},
    )


@dataclass(frozen=True)
class _Groups:
    """parts : weight [N, G, K / G];  low, high : ends of the groups, [N, G];  inputs : their scales, [G]."""

    site: SiteQuantizer
    parts: Array
    low: Array
    high: Array
    inputs: Array

    @staticmethod
    def of(weight: Array, site: SiteQuantizer, inputs: Array) -> _Groups:
        count = len(site.scale) // len(weight)
        parts = weight.astype(np.float64).reshape(len(weight), count, -1)
        low, high = np.minimum(parts.min(-1), 0.0), np.maximum(parts.max(-1), 0.0)
        if site.signed:
            high = np.maximum(high, -low)
            low = -high
        return _Groups(site, parts, low, high, np.repeat(inputs.astype(np.float64), count // len(inputs)))

    @property
    def empty(self) -> Array:
        """Groups without weights, up to what is no normal float32 step."""
        return self.high - self.low <= _SMALLEST * (self.site.qmax - self.site.qmin)

    @property
    def wanted(self) -> Array:
        """Product of scales [N, G] with which the codes just cover a group."""
        steps = (self.high - self.low) / (self.site.qmax - self.site.qmin)
        return np.where(self.empty, 0.0, steps * self.inputs)

    @property
    def farthest(self) -> Array:
        """Largest magnitude in a group times the scale of its inputs, [N, G]."""
        return np.where(self.empty, 0.0, np.maximum(self.high, -self.low) * self.inputs)

    def zero_points(self, scale: Array) -> Array:
        return np.clip(np.rint(-self.low / scale), 0, self.site.qmax) * (not self.site.signed)

    def _codes(self, x: Array, scale: Array, zero: Array) -> Array:
        """``q - zero_point``."""
        return np.clip(np.rint(x / scale), self.site.qmin - zero, self.site.qmax - zero)

    def largest_code(self, scale: Array, zero: Array, count: Array) -> Array:
        """Of each row the largest ``count |q - zero_point|``, [N]: that of an end of a group."""
        ends = (np.abs(self._codes(end, scale, zero)) for end in (self.low, self.high))
        return (count * np.maximum(*ends)).max(1)

    def largest_sum(self, scale: Array, zero: Array, count: Array) -> Array:
        """Of each row the sum of all ``count |q - zero_point|``, [N]."""
        codes = self._codes(self.parts, scale[..., None], zero[..., None])
        return (np.abs(codes).sum(-1) * count).sum(1)
