"""Weights under training: how they depend on what is trained, and the codes that come out of it.

Rounding that minimizes the error of a layer's output is not rounding to nearest: errors of weights that see
correlated inputs can cancel. AdaRound (Nagel et al. 2020) learns for each weight whether it goes down or up,

    w^ = s clip(floor(w / s) + h(V), -m, m),    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1),

from ``h(V) = w / s - floor(w / s)`` on, with the penalty ``sum(1 - |2 h(V) - 1|**beta)`` that drives h to 0
or 1 as beta falls from 20 to 2. `StraightThrough` trains the weights themselves through the rounding (LSQ,
I&S-ViT, GLF-Q). Both count in steps s, so one learning rate fits all layers and widths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.granularity import blocked_shape, fit_shape
from tvm_vitq.quantizers.uniform import integer_range

STRETCH = 0.1
"""How far h's sigmoid reaches beyond 0 and 1, so that it gets there."""


class Weight(ABC):
    """The [N, K] weight of one layer while its unit is trained.

    Parameters
    ----------
    weight : float, before quantization.
    quantizer : its uniform quantizer, per tensor, channel or group; its numbers stay.

    Attributes
    ----------
    trained : what the optimizer changes;  rate : its learning rate.
    """

    rate: float = 0.0

    def __init__(self, weight: Tensor, quantizer: SiteQuantizer) -> None:
        if quantizer.codec != "uniform":
            raise VitqError("weights are trained on uniform quantizers", where="codec", got=quantizer.codec)
        self.shape = weight.shape
        ends = (torch.from_numpy(end).float() for end in integer_range(quantizer))
        self.low, self.high = (fit_shape(end, quantizer, weight.shape) for end in ends)
        self.scale = fit_shape(torch.tensor(quantizer.scale), quantizer, weight.shape)
        self.steps = weight.detach().reshape(blocked_shape(quantizer, weight.shape)) / self.scale
        self.trained: list[Tensor] = []

    @abstractmethod
    def value(self) -> Tensor:
        """The weight that training uses, differentiable."""

    @abstractmethod
    def codes(self) -> Tensor:
        """The result, whole ``q - zero_point`` within the quantizer's range, in its blocked view."""

    def penalty(self, beta: float) -> Tensor:
        """What is added to the loss, about 1 per undecided weight."""
        return torch.zeros(())

    def hardened(self) -> Tensor:
        """float32 [N, K] ``scale * codes``: its nearest codes are exactly these."""
        with torch.no_grad():
            return self._real(self.codes())

    def _real(self, codes: Tensor) -> Tensor:
        return (codes * self.scale).reshape(self.shape)


class Nearest(Weight):
    """Rounded to nearest and not trained."""

    def value(self) -> Tensor:
        return self.hardened()

    def codes(self) -> Tensor:
        return self.steps.round().clamp(self.low, self.high)


class AdaRound(Weight):
    """Learned rounding; see above."""

    rate = 2e-2

    def __init__(self, weight: Tensor, quantizer: SiteQuantizer) -> None:
        super().__init__(weight, quantizer)
        self.floor = self.steps.floor()
        fraction = (self.steps - self.floor + STRETCH) / (1 + 2 * STRETCH)
        self.logits = torch.logit(fraction).requires_grad_()
        self.trained = [self.logits]

    def up(self) -> Tensor:
        """h(V): the share of a step that is added to the floor."""
        return (self.logits.sigmoid() * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)

    def value(self) -> Tensor:
        return self._real((self.floor + self.up()).clamp(self.low, self.high))

    def codes(self) -> Tensor:
        return (self.floor + (self.logits >= 0)).clamp(self.low, self.high)

    def penalty(self, beta: float) -> Tensor:
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()


class StraightThrough(Weight):
    """Trained as a float weight, rounded to nearest; gradients pass the rounding and stop at the clipping."""

    rate = 1e-2

    def __init__(self, weight: Tensor, quantizer: SiteQuantizer) -> None:
        super().__init__(weight, quantizer)
        self.moved = torch.zeros_like(self.steps, requires_grad=True)
        self.trained = [self.moved]

    def value(self) -> Tensor:
        steps = self.steps + self.moved
        rounded = steps + (steps.round() - steps).detach()
        return self._real(rounded.clamp(self.low, self.high))

    def codes(self) -> Tensor:
        return (self.steps + self.moved).round().clamp(self.low, self.high)


class Unquantized(StraightThrough):
    """Trained and left in float: a stage that fits to quantized activations before weights are quantized."""

    def value(self) -> Tensor:
        return self._real(self.steps + self.moved)

    def codes(self) -> Tensor:
        return self.steps + self.moved
