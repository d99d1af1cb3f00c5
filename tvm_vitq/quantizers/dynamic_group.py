"""Groups of channels that each image chooses anew."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Array, Codec


class DynamicGroup(Codec):
    """IGQ-ViT's quantizer of activations (Moon et al., CVPR 2024): G uniform quantizers with bounds

        l_g = -scale_g zero_g,    u_g = scale_g (2**bits - 1 - zero_g)

    and, for each image by itself, each channel with the quantizer whose bounds are nearest to the channel's
    smallest and largest value over the image's tokens,

        g(c) = argmin_g (min_c - l_g)**2 + (max_c - u_g)**2,    the first of equals.

    Zero points are any whole numbers: bounds need not hold 0. ``params["tokens"]`` consecutive rows are an
    image. The choice of groups passes no gradient.

    The codes of `encode` carry their group above the bits, ``q + 2**bits * g``: they decode by themselves.
    """

    name = "dynamic_group"

    def parameters(self, site: SiteQuantizer) -> dict[str, Array]:
        return {
            "scale": np.array(site.scale, np.float32),
            "zero_point": np.array(site.zero_point, np.float32),
        }

    def bounds(self, site: SiteQuantizer) -> tuple[Array, Array]:
        """l and u, float64 [G] each."""
        scale = np.array(site.scale, np.float32).astype(np.float64)
        zero = np.array(site.zero_point, np.float64)
        return -scale * zero, scale * (site.qmax - zero)

    def groups(self, x: Array, site: SiteQuantizer) -> Array:
        """The group of every channel, int64 [images, 1, C], of x with any axes in front of the channels."""
        rows = x.reshape(-1, tokens_of(site, x.size // x.shape[-1]), x.shape[-1]).astype(np.float64)
        ends = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
        distance = sum(
            np.square(end[..., None] - bound) for end, bound in zip(ends, self.bounds(site), strict=True)
        )
        return distance.argmin(-1)

    def encode(self, x: Array, site: SiteQuantizer) -> Array:
        x = np.asarray(x, np.float32)
        group = self.groups(x, site)
        scale, zero = (v[group] for v in self.parameters(site).values())
        rows = x.reshape(len(group), -1, x.shape[-1])
        codes = np.clip(np.rint(rows / scale) + zero, site.qmin, site.qmax).astype(np.int32)
        return (codes + (group << site.bits).astype(np.int32)).reshape(x.shape)

    def decode(self, codes: Array, site: SiteQuantizer) -> Array:
        group = codes >> site.bits
        scale, zero = (v[group] for v in self.parameters(site).values())
        return (((codes & site.qmax).astype(np.float32) - zero) * scale).astype(np.float32)

    def fake_quantize(self, x: Any, site: SiteQuantizer, parameters: dict[str, Any]) -> Any:
        rows = x.reshape(-1, tokens_of(site, x.numel() // x.shape[-1]), x.shape[-1])
        low, high = (end.detach().double() for end in (rows.amin(1, True), rows.amax(1, True)))
        scale, zero = parameters["scale"], parameters["zero_point"]
        wide_scale, wide_zero = scale.detach().double(), zero.detach().double()
        distance = (low[..., None] + wide_scale * wide_zero).square()
        distance = distance + (high[..., None] - wide_scale * (site.qmax - wide_zero)).square()
        group = distance.argmin(-1)
        scale, zero = scale[group], zero[group]
        steps = rows / scale
        rounded = steps + (steps.round() - steps).detach() if steps.requires_grad else steps.round()
        codes = (rounded + zero).clamp(site.qmin, site.qmax)
        return ((codes - zero) * scale).reshape(x.shape)


def tokens_of(site: SiteQuantizer, rows: int) -> int:
    """Rows of an image; VitqError if they do not divide the tensor's `rows`."""
    tokens = site.params.get("tokens")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1 or rows % tokens:
        raise VitqError(
            "the rows of an image do not divide the tensor's",
            where='params["tokens"]',
            got=tokens,
            expected=f"a divisor of {rows}",
        )
    return tokens
