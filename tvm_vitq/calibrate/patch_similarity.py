"""Calibration images made from the model itself, where no image may be had: PSAQ-ViT (Li et al., ECCV 2022).

Attention separates the objects of a natural image, so its outputs at two patches are either alike or not; on
noise all are alike. Images are therefore changed until, in every attention layer, the cosine similarities of
patches are spread widely and the model sees something in particular:

    minimize   - sum over layers H(similarities) + cross entropy with a drawn class + 0.05 TV

H is the differential entropy ``-integral f log f`` of a Gaussian kernel density estimate f of all
similarities of an image, TV the mean absolute difference of neighbouring pixels. Starting point is an image
of `synthesize`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch import Tensor

from tvm_vitq.calibrate.executor import Executor, Hooks
from tvm_vitq.calibrate.synthesize import synthesize
from tvm_vitq.errors import VitqError

NAME = "patch-similarity"
"""What asks for such images where only text can."""

BANDWIDTH = 0.05
"""Standard deviation of the kernels; similarities lie in -1 .. 1."""

POINTS = 64
"""At which the density is evaluated; the step between two is below the bandwidth."""

TOKENS = 64
"""Compared per image and layer at most, each with each: of more, evenly spread ones."""

SMOOTHNESS = 0.05
"""Weight of TV, as in the paper."""

CHUNK = 8
"""Images optimized at once."""


@dataclass(frozen=True)
class PatchSimilarity:
    """Asks for calibration images made from the model: ``quantize(model, calibration=PatchSimilarity())``.

    Parameters
    ----------
    images : how many;  iterations : steps of Adam for each;  rate : its learning rate, in units of the
        normalized image.
    """

    images: int = 32
    iterations: int = 100
    rate: float = 0.05

    def __post_init__(self) -> None:
        for name in ("images", "iterations"):
            value = getattr(self, name)
            if value < 1:
                raise VitqError("must be 1 or more", where=f"{name} of PatchSimilarity", got=value)

    def make(
        self, mod: tvm.IRModule, preprocessing: Mapping[str, Any] | None, seed: int, show_progress: bool
    ) -> Tensor:
        """Normalized float32 images [images, 3, H, W] for a canonical module whose result are logits; the
        same seed gives the same images. VitqError if the model has no attention.
        """
        from tqdm import tqdm

        executor = Executor(mod)
        attentions = frozenset(step.name for step in executor.steps if step.op == "vitq.attention")
        if not attentions:
            raise VitqError(
                "images cannot be made from a model without attention",
                where="calibration",
                fix="give images, or no calibration data at all: plain synthetic images are used then",
            )
        images = synthesize(self.images, executor.input_shape[1:], preprocessing, seed)
        generator = torch.Generator().manual_seed(seed)
        parts = images.split(max(CHUNK // executor.batch, 1) * executor.batch)
        with tqdm(
            total=len(parts) * self.iterations, desc="images", disable=not show_progress, leave=False
        ) as bar:
            return torch.cat([self._improve(executor, attentions, part, generator, bar) for part in parts])

    def _improve(
        self,
        executor: Executor,
        attentions: frozenset[str],
        start: Tensor,
        generator: torch.Generator,
        bar: Any,
    ) -> Tensor:
        images = start.clone().requires_grad_()
        low, high = (f(start.flatten(2), -1)[:, :, None, None] for f in (torch.amin, torch.amax))
        optimizer = torch.optim.Adam([images], self.rate)
        wanted: Tensor | None = None
        for _ in range(self.iterations):
            spread = _Spread(attentions, executor.batch)
            logits = executor.run(images, spread)
            if wanted is None:
                wanted = torch.randint(logits.shape[-1], (len(images),), generator=generator)
            seen = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            rough = sum(images.diff(dim=axis).abs().mean((1, 2, 3)).sum() for axis in (-1, -2))
            loss = seen - spread.entropy + SMOOTHNESS * rough
            (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
            with torch.no_grad():
                images.copy_(images.clamp(low, high))
            bar.update(1)
        return images.detach()


class _Spread(Hooks):
    """Sums, over images and attention layers, the entropy of similarities between patches."""

    def __init__(self, attentions: frozenset[str], batch: int) -> None:
        self.attentions, self.batch = attentions, batch
        self.entropy = torch.zeros(())

    def value(self, name: str, x: Tensor) -> Tensor:
        if name not in self.attentions:
            return x
        tokens = x.movedim(-3, -2).flatten(-2).flatten(0, 1)  # [windows, tokens, channels]
        unit = torch.nn.functional.normalize(tokens[:, :: math.ceil(tokens.shape[1] / TOKENS)], dim=-1)
        pairs = torch.triu_indices(unit.shape[1], unit.shape[1], 1)
        alike = (unit @ unit.mT)[:, pairs[0], pairs[1]].reshape(len(x) * self.batch, -1, 1)
        points = torch.linspace(-1, 1, POINTS)
        kernels = (-0.5 * ((alike - points) / BANDWIDTH).square()).exp()
        density = kernels.mean(1) / (BANDWIDTH * math.sqrt(2 * math.pi))
        self.entropy = self.entropy - torch.trapezoid(torch.xlogy(density, density + 1e-12), points).sum()
        return x
