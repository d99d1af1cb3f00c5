"""Probabilities relative to the largest of their row."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Array, Codec


class RowMaximum(Codec):
    """``q = rint(qmax * x / max(x))`` over the last axis; ``x^ = q / sum(q)``; rint ties to even.

    For rows that are positive and sum to 1, the softmax of attention: every row uses all codes, however many
    keys it is spread over, and its quantized probabilities sum to 1 again. There is nothing to calibrate: the
    scale ``max(x) / qmax`` is found at run time, where it costs nothing: the integer softmax starts from the
    row's maximum anyway.

    `decode` needs whole rows.
    """

    name = "row_maximum"

    def parameters(self, site: SiteQuantizer) -> dict[str, Array]:
        return {}

    def encode(self, x: Array, site: SiteQuantizer) -> Array:
        return np.rint(site.qmax * (x / x.max(-1, keepdims=True))).astype(np.int32)

    def decode(self, codes: Array, site: SiteQuantizer) -> Array:
        return (codes / codes.sum(-1, keepdims=True)).astype(np.float32)

    def fake_quantize(self, x: Any, site: SiteQuantizer, parameters: dict[str, Any]) -> Any:
        steps = site.qmax * (x / x.amax(-1, keepdim=True))
        codes = steps + (steps.round() - steps).detach() if steps.requires_grad else steps.round()
        return codes / codes.sum(-1, keepdim=True)
