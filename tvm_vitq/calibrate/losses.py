"""What a unit's output is compared by. A loss is prepared once per unit and then called with every batch;
`reconstruct` divides it by its value before training, so its unit does not matter (nor whether features are
summed or averaged).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tvm_vitq.calibrate.blocks import Unit
from tvm_vitq.calibrate.executor import Executor, Hooks

CHUNK = 64
"""Images computed at once: larger temporaries cost more to allocate than to fill."""


@dataclass(frozen=True)
class Context:
    """What is known about a unit before it is trained.

    teacher : the float model;  inputs, targets : [N, ...], what enters and leaves the unit in it;  head : the
    unit that the model ends with.
    """

    unit: Unit
    head: Unit
    teacher: Executor
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Batch:
    """One step of training.

    output, target : [n, ...] of the unit;  index : which images they are;  probs : probabilities by attention
    layer, before they are quantized.
    """

    output: Tensor
    target: Tensor
    index: Tensor
    probs: dict[str, Tensor]


Measure = Callable[[Batch], Tensor]


class Loss(ABC):
    """A frozen dataclass: its fields tell whether a saved state may be resumed."""

    @abstractmethod
    def prepare(self, context: Context) -> Measure:
        """The scalar loss of a batch, differentiable in its output and probabilities."""


@dataclass(frozen=True)
class SquaredError(Loss):
    """``mean((y^ - y)**2)``, as in BRECQ and QDrop."""

    def prepare(self, context: Context) -> Measure:
        return lambda batch: (batch.output - batch.target).square().mean()


@dataclass(frozen=True)
class Fisher(Loss):
    """``mean(F (y^ - y)**2)`` with the diagonal of the Fisher matrix at the unit's output, over all images.

    ``F = E[g**2]`` with g the gradient of the logits' log-likelihood under labels drawn from the float
    model's own prediction (BRECQ weights with squared gradients; APHQ-ViT's perturbation estimates the same
    diagonal).

    temperature : softens the prediction.
    """

    temperature: float = 1.0

    def prepare(self, context: Context) -> Measure:
        weight = torch.zeros_like(context.targets[0])
        generator = torch.Generator().manual_seed(0)
        for part in context.targets.split(CHUNK):
            leaf = part.clone().requires_grad_()
            logits = _rest(context, leaf, context.head.stop) / self.temperature
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            chosen = logits.log_softmax(-1).gather(-1, drawn).sum()
            (gradient,) = torch.autograd.grad(chosen, leaf)
            weight += gradient.square().sum(0)
        weight /= weight.mean().clamp(min=1e-30)
        return lambda batch: ((batch.output - batch.target).square() * weight).mean()


@dataclass(frozen=True)
class WithSuffix(Loss):
    """GLF-Q: ``share * global + local``, each relative to the mean square of what it compares. Global is the
    squared error of what enters the head when the unit's output runs through the float rest of the model.
    """

    share: float = 0.5

    def prepare(self, context: Context) -> Measure:
        if context.unit == context.head:
            return SquaredError().prepare(context)
        with torch.no_grad():
            parts = [_rest(context, part, context.head.start) for part in context.targets.split(CHUNK)]
        wanted = torch.cat(parts)
        by_global, by_local = (self.share / wanted.var(), 1.0 / context.targets.var())

        def measure(batch: Batch) -> Tensor:
            features = _rest(context, batch.output, context.head.start)
            far = (features - wanted[batch.index]).square().mean()
            return by_global * far + by_local * (batch.output - batch.target).square().mean()

        return measure


@dataclass(frozen=True)
class AttentionDivergence(Loss):
    """ADFQ-ViT: another loss plus ``share * KL(A || A^)`` between the attention maps of the float and the
    quantized model. The other loss is taken relative to the variance of the targets.
    """

    share: float = 0.1
    inner: Loss = SquaredError()

    def prepare(self, context: Context) -> Measure:
        inner, size = self.inner.prepare(context), context.targets.var()

        def measure(batch: Batch) -> Tensor:
            loss = inner(batch) / size
            if not batch.probs:
                return loss
            maps = _Maps()
            with torch.no_grad():
                unit = context.unit
                context.teacher.run_between(unit.start, unit.stop, context.inputs[batch.index], maps)
            for site, wanted in maps.seen.items():
                ratio = (wanted.clamp(min=1e-9) / batch.probs[site].clamp(min=1e-9)).log()
                loss = loss + self.share * (wanted * ratio).sum(-1).mean()
            return loss

        return measure


class _Maps(Hooks):
    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def probs(self, site: str, probs: Tensor) -> Tensor:
        self.seen[site] = probs
        return probs


def _rest(context: Context, output: Tensor, until: str) -> Tensor:
    return context.teacher.run_between(context.unit.stop, until, output)
