"""The quantized part of a model in front of what is fitted next."""

from __future__ import annotations

import torch
from torch import Tensor

from tvm_vitq.calibrate.simulate import FakeQuantize
from tvm_vitq.plan import SiteQuantizer


class Quantized(FakeQuantize):
    """Quantizes activations as the plan will, but not weights: in the constants they already are.

    Attributes
    ----------
    ranges : largest magnitude of every variable that came by;  maps : the last probabilities of every
        attention, before quantization.
    """

    def __init__(self, quantizers: dict[str, SiteQuantizer]) -> None:
        super().__init__({name: q for name, q in quantizers.items() if not name.endswith(".weight")})
        self.ranges: dict[str, float] = {}
        self.maps: dict[str, Tensor] = {}

    def value(self, name: str, x: Tensor) -> Tensor:
        if x.is_floating_point():
            self.ranges[name] = max(float(x.abs().max()), self.ranges.get(name, 0.0))
        return x

    def probs(self, site: str, probs: Tensor) -> Tensor:
        self.maps[site] = probs
        return super().probs(site, probs)

    def widen(self, ranges: dict[str, float]) -> None:
        """Raise ranges to what came by."""
        for name, largest in self.ranges.items():
            ranges[name] = max(largest, ranges.get(name, 0.0))


class Taking(Quantized):
    """Keeps one variable as rows [tokens, channels]; quantizes only if there are quantizers."""

    def __init__(self, variable: str, quantizers: dict[str, SiteQuantizer] | None) -> None:
        super().__init__(quantizers or {})
        self.variable, self.rows = variable, torch.empty(0)

    def value(self, name: str, x: Tensor) -> Tensor:
        if name == self.variable:
            self.rows = x.flatten(0, -2)
        return x
