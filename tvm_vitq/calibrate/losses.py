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
    layer, before they are quantized;  progress : share of the steps that are done, None where the unit is
    only measured.
    """

    output: Tensor
    target: Tensor
    index: Tensor
    probs: dict[str, Tensor]
    progress: float | None = None


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
class PerturbationHessian(Loss):
    """APHQ-ViT's average perturbation Hessian: ``mean(H (y^ - y)**2)``, ``H = E|g(y + d) - g(y - d)|`` over
    all images, with g the gradient of the divergence KL(model || model from there on) at the unit's output.

    Each element of d is `epsilon` or minus that, at random: one sign for all channels, as in the released
    code, is a constant that the next LayerNorm removes.

    temperature : softens both predictions.
    """

    epsilon: float = 1e-3
    temperature: float = 20.0

    def prepare(self, context: Context) -> Measure:
        weight = torch.zeros_like(context.targets[0])
        generator = torch.Generator().manual_seed(0)
        for part in context.targets.split(CHUNK):
            shift = self.epsilon * (2.0 * torch.randint(2, part.shape, generator=generator) - 1.0)
            ends = [divergence_gradient(context, part + d, part, self.temperature) for d in (shift, -shift)]
            weight += (ends[0] - ends[1]).abs().sum(0)
        weight /= weight.mean().clamp(min=1e-30)
        return lambda batch: ((batch.output - batch.target).square() * weight).mean()


@dataclass(frozen=True)
class LowRankFisher(Loss):
    """FIMA-Q: the Fisher matrix at the unit's output as a diagonal plus `rank` rows, collected in training.

    At the start of every rank-th part of the steps, g = E|dKL / dy^|, the gradient of the divergence from the
    float prediction, and d = E|y^ - y|, means over the images of the step, become rows of G and D. With
    ``D D^T = B`` and e = |y^ - y| of one image, the loss is

        low_rank * mean(e G^T B^-1 G e^T) / its first value + diagonal * mean(e**2 mean(G)) / its first value.

    A unit that is only measured counts by the diagonal term with the first row, which is that of the
    untrained unit.

    temperature : softens both predictions;  ridge : added to B, relative to its diagonal: rows resemble each
    other.
    """

    rank: int = 5
    low_rank: float = 1.0
    diagonal: float = 1.0
    temperature: float = 20.0
    ridge: float = 1e-2

    def prepare(self, context: Context) -> Measure:
        return _LowRankFisher(context, self)


class _LowRankFisher:
    def __init__(self, context: Context, settings: LowRankFisher) -> None:
        self.context, self.settings = context, settings
        self.gradients: list[Tensor] = []
        self.errors: list[Tensor] = []
        self.first: dict[str, Tensor] = {}

    def __call__(self, batch: Batch) -> Tensor:
        settings, rows, progress = self.settings, len(self.gradients), batch.progress
        if not rows or (progress is not None and rows < settings.rank and progress * settings.rank >= rows):
            self.collect(batch)
        error = (batch.output - batch.target).abs().flatten(1)
        if progress is None:
            whole = settings.low_rank + settings.diagonal
            return whole * self.relative("measured", (error.square() * self.gradients[0]).mean())
        gradients, errors = torch.stack(self.gradients), torch.stack(self.errors)
        products = errors @ errors.T
        products.diagonal().mul_(1 + settings.ridge)
        along = error @ gradients.T
        low_rank = (along * torch.linalg.solve(products, along.T).T).sum(1).mean()
        diagonal = (error.square() * gradients.mean(0)).mean()
        return settings.low_rank * self.relative("low rank", low_rank) + settings.diagonal * self.relative(
            "diagonal", diagonal
        )

    def collect(self, batch: Batch) -> None:
        gradient = divergence_gradient(self.context, batch.output, batch.target, self.settings.temperature)
        self.gradients.append(gradient.abs().mean(0).flatten())
        self.errors.append((batch.output - batch.target).detach().abs().mean(0).flatten())

    def relative(self, name: str, value: Tensor) -> Tensor:
        return value / self.first.setdefault(name, value.detach().clamp(min=1e-30))


def divergence_gradient(context: Context, output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The gradient, at each image's unit output, of the divergence of its prediction from that of the float
    target.
    """
    with torch.no_grad():
        wanted = (_rest(context, target, context.head.stop) / temperature).softmax(-1)
    with torch.enable_grad():
        leaf = output.detach().clone().requires_grad_()
        found = (_rest(context, leaf, context.head.stop) / temperature).log_softmax(-1)
        (gradient,) = torch.autograd.grad(-(wanted * found).sum(), leaf)
    return gradient


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
