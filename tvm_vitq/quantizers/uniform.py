"""Uniform quantizer, asymmetric or symmetric."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Array, Codec
from tvm_vitq.quantizers.granularity import blocked_shape, fit_shape


class Uniform(Codec):
    """``q = clip(rint(x / scale) + zero_point, qmin, qmax)``, ``x^ = scale * (q - zero_point)``; rint ties
    to even.

    Unsigned codes have a zero point (asymmetric): those of activations, and of weights below 8 bits, where
    the signed byte of a kernel holds ``q - zero_point``. Weights of 8 bits are signed with zero point 0
    (symmetric).
    """

    name = "uniform"

    def limits(self, site: SiteQuantizer) -> tuple[int, int]:
        """Smallest and largest code."""
        return site.qmin, site.qmax

    def parameters(self, site: SiteQuantizer) -> dict[str, Array]:
        return {
            "scale": np.array(site.scale, np.float32),
            "zero_point": np.array(site.zero_point, np.float32),
        }

    def encode(self, x: Array, site: SiteQuantizer) -> Array:
        scale, zero = (fit_shape(v, site, x.shape) for v in self.parameters(site).values())
        blocked = np.asarray(x, np.float32).reshape(blocked_shape(site, x.shape))
        codes = np.clip(np.rint(blocked / scale) + zero, *self.limits(site))
        return codes.astype(np.int32).reshape(x.shape)

    def decode(self, codes: Array, site: SiteQuantizer) -> Array:
        scale, zero = (fit_shape(v, site, codes.shape) for v in self.parameters(site).values())
        blocked = codes.astype(np.float32).reshape(blocked_shape(site, codes.shape))
        return ((blocked - zero) * scale).astype(np.float32).reshape(codes.shape)

    def fake_quantize(self, x: Any, site: SiteQuantizer, parameters: dict[str, Any]) -> Any:
        scale = fit_shape(parameters["scale"], site, x.shape)
        zero = fit_shape(parameters["zero_point"], site, x.shape)
        steps = x.reshape(blocked_shape(site, x.shape)) / scale
        rounded = steps + (steps.round() - steps).detach() if steps.requires_grad else steps.round()
        codes = (rounded + zero).clamp(*self.limits(site))
        return ((codes - zero) * scale).reshape(x.shape)


def integer_range(site: SiteQuantizer) -> tuple[Array, Array]:
    """Smallest and largest ``q - zero_point``, int64 [P]: what an integer stands for in units of its
    scale.
    """
    first, last = Uniform().limits(site)
    zero = np.array(site.zero_point, np.int64)
    return first - zero, last - zero


def affine_from_range(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """float32 scale and int zero point of an asymmetric quantizer that covers ``[low, high]`` and 0.

    ``scale = (high - low) / (2**bits - 1)``, ``zero_point = rint(-low / scale)``; zero is representable, so
    the range is widened to hold it. An empty range (a constant zero) gets scale 1.
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    scale = (high - low) / (2**bits - 1)
    scale = np.where(scale > _TINY, scale, 1.0).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 2**bits - 1).astype(np.int64)
    return scale, zero


def symmetric_from_max(largest: Array, bits: int) -> Array:
    """float32 scale of a symmetric quantizer that covers ``[-largest, largest]``: ``largest / (2**(bits-1) -
    1)``.
    """
    scale = np.asarray(largest, np.float64) / (2 ** (bits - 1) - 1)
    return np.where(scale > _TINY, scale, 1.0).astype(np.float32)


_TINY = float(np.finfo(np.float32).tiny)
"""Smaller steps are no normal float32 numbers, and their inverses overflow."""
