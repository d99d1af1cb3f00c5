"""Bounds of the quantizers that channels choose from at run time: alternation on the ranges of channels.

IGQ-ViT (Moon et al., CVPR 2024, section 3.2): every channel of every calibration image is a point (min, max);
points go to the nearest bounds, bounds to the mean of their points, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tvm
from torch import Tensor
from tvm import relax

from tvm_vitq.calibrate.executor import Hooks
from tvm_vitq.calibrate.job import Job
from tvm_vitq.errors import VitqError
from tvm_vitq.graph import data_operands, is_movement, move
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.dynamic_group import DynamicGroup
from tvm_vitq.relax_passes.sites import bindings, image_sites, tensor_arguments

ROUNDS = 40
"""Alternations at most; a few tens move the last points."""

VALUES = 2**18
"""Values of a site that squared errors are measured on."""

LEAST_STEP = 2.0**-12
"""Smallest step in units of the farther bound: zero points stay within 13 bits of the codes."""

FACTORS = (1.0, 0.8, 0.9, 1.1, 1.2, 1.35)
"""What all bounds are widened by, around their middle."""

MOVES = (0.88, 1.14)
"""What the bounds of one group are then widened by."""


@dataclass(frozen=True)
class Channels:
    """A site's channels in each image.

    tokens : of an image;  low, high : [I, C];  sample : [I, S, C], some of the tokens;
    importance : [C] of squared errors.
    """

    tokens: int
    low: Tensor
    high: Tensor
    sample: Tensor
    importance: Tensor

    def error(self, site: SiteQuantizer) -> float:
        """Mean squared error of the sample, each channel with what its own range chooses."""
        bounds = (torch.from_numpy(end) for end in DynamicGroup().bounds(site))
        group = assign(self.low, self.high, *bounds)[:, None]
        scale, zero = (torch.from_numpy(v)[group] for v in DynamicGroup().parameters(site).values())
        codes = (self.sample / scale).round_().add_(zero).clamp_(site.qmin, site.qmax)
        errors = codes.sub_(zero).mul_(scale).sub_(self.sample).square_()
        return float((errors.mean((0, 1)) * self.importance).mean())


def dynamic_sites(job: Job, every: bool) -> dict[str, int]:
    """Tokens per image of the inputs of linear layers that can have dynamic groups, by site: those that are a
    LayerNorm's output, moved at most; with `every`, all but the image itself. Those that cannot are noted.
    """
    made = {b.var.name: b.value for b in bindings(job.mod)}
    apart, image = images_apart(job.mod, job.executor.batch), image_sites(job.mod)
    found = {}
    for site, spec in job.fitted_sites("input"):
        source = made.get(site.variable)
        while is_movement(source) and len(data_operands(source)) == 1:
            source = made.get(data_operands(source)[0].name)
        if site.name in image or not (every or op_name(source) == "vitq.layer_norm"):
            continue
        tokens = math.prod(site.shape[:-1]) // job.executor.batch
        if spec.granularity != "tensor":
            job.notes[site.name] = f"no dynamic groups: this is per {spec.granularity}"
        elif site.variable not in apart:
            job.notes[site.name] = "no dynamic groups: images do not follow each other in this tensor"
        elif tokens == 1:
            job.notes[site.name] = "no dynamic groups: channels of a single token have no range"
        else:
            found[site.name] = tokens
    return found


def images_apart(mod: tvm.IRModule, batch: int) -> set[str]:
    """Variables in which each image of the batch lies in one piece, one image after the other: operators that
    compute keep that, movements are looked at.
    """
    apart = {param.name for param in mod["main"].params}
    for binding in bindings(mod):
        value = binding.value
        operands = [value] if isinstance(value, relax.Var) else tensor_arguments(value)
        if any(isinstance(v, relax.Var) and v.name not in apart for v in operands):
            continue
        if batch > 1 and is_movement(value):
            parts = [
                np.arange(math.prod(shape)).reshape(shape) * batch // math.prod(shape)
                for shape in map(shape_of, data_operands(value))
            ]
            images = move(value, *parts).reshape(-1)
            if len(images) % batch or (images != np.arange(len(images)) * batch // len(images)).any():
                continue
        apart.add(binding.var.name)
    return apart


def observe_channels(job: Job, sites: dict[str, int]) -> dict[str, Channels]:
    """Ranges and samples of the channels of some sites, in one pass over all images; `sites` : tokens."""
    observer = _Observer(job, sites)
    job.run(observer, "channels")
    readers: dict[str, list[str]] = {}
    for alias, site in job.sites.items():
        if site.role == "input":
            readers.setdefault(job.aliases.get(alias, alias), []).append(site.layer)
    found = {}
    for name, parts in observer.parts.items():
        low, high, sample = (torch.cat(p) for p in zip(*parts, strict=True))
        importance = torch.cat([job.weight(layer) for layer in readers[name]]).square().mean(0)
        found[name] = Channels(sites[name], low, high, sample, importance / importance.mean())
    return found


class _Observer(Hooks):
    def __init__(self, job: Job, sites: dict[str, int]) -> None:
        self.job, self.sites = job, sites
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {site: [] for site in sites}

    def quantize(self, site: str, x: Tensor) -> Tensor:
        if site in self.sites:
            tokens = self.sites[site]
            rows = x.reshape(-1, tokens, x.shape[-1])
            wanted = max(1, min(tokens, VALUES // (len(self.job.images) * x.shape[-1])))
            drawn = torch.randperm(tokens, generator=self.job.generator)[:wanted]
            self.parts[site].append((rows.amin(1), rows.amax(1), rows[:, drawn].clone()))
        return x


def assign(low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Nearest bounds [...] of points low, high [...]; lower, upper : float64 [G]. The first of equals."""
    best = torch.full_like(low, torch.inf, dtype=torch.float64)
    group = torch.zeros_like(low, dtype=torch.int64)
    for g, (below, above) in enumerate(zip(lower.tolist(), upper.tolist(), strict=True)):
        distance = (low.double() - below).square_() + (high.double() - above).square_()
        group[distance < best] = g
        best = torch.minimum(best, distance)
    return group


def alternate(low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, float]:
    """Points to their nearest bounds, bounds to the mean of their points, until nothing changes; bounds
    without points stay. Returns bounds and the mean squared distance.
    """
    low, high = low.flatten().double(), high.flatten().double()
    before = None
    for _ in range(ROUNDS):
        group = assign(low, high, lower, upper)
        if before is not None and torch.equal(group, before):
            break
        before = group
        count = torch.bincount(group, minlength=len(lower))
        lower, upper = (
            torch.where(
                count > 0,
                torch.zeros_like(old).index_add_(0, group, end) / count.clamp(min=1),
                old,
            )
            for end, old in ((low, lower), (high, upper))
        )
    distance = (low - lower[group]).square() + (high - upper[group]).square()
    return lower, upper, float(distance.mean())


def starts(low: Tensor, high: Tensor, groups: int) -> list[tuple[Tensor, Tensor]]:
    """Bounds to start from: means of equally many points in order of width; points at quantiles of the
    logarithm of the width; points far from each other.
    """
    low, high = low.flatten().double(), high.flatten().double()
    width = high - low
    order = width.argsort(stable=True)
    parts = [p for p in order.tensor_split(groups)]
    found = [
        tuple(torch.stack([end[p].mean() if len(p) else end.mean() for p in parts]) for end in (low, high))
    ]
    logarithm = width.clamp(min=1e-9).log()
    wanted = torch.linspace(float(logarithm.min()), float(logarithm.max()), groups, dtype=torch.float64)
    nearest = torch.searchsorted(logarithm[order], wanted).clamp(max=len(order) - 1)
    found.append((low[order[nearest]], high[order[nearest]]))
    chosen = [order[len(order) // 2]]
    distance = torch.full_like(low, torch.inf)
    for _ in range(groups - 1):
        last = chosen[-1]
        distance = torch.minimum(distance, (low - low[last]).square() + (high - high[last]).square())
        chosen.append(distance.argmax())
    index = torch.stack(chosen)
    found.append((low[index], high[index]))
    return found  # type: ignore[return-value]


def quantizer_of(bits: int, tokens: int, lower: Tensor, upper: Tensor) -> SiteQuantizer:
    """The dynamic_group quantizer with these bounds, as nearly as whole zero points allow."""
    farther = torch.maximum(lower.abs(), upper.abs())
    step = torch.maximum((upper - lower) / (2**bits - 1), farther * LEAST_STEP).clamp(min=1e-12)
    scale = step.float().double()
    middle = (lower + upper) / 2
    zero = torch.round((2**bits - 1) / 2 - middle / scale)
    return SiteQuantizer(
        bits, scale.tolist(), [int(z) for z in zero], DynamicGroup.name, granularity="instance", dynamic=True,
        params={"tokens": tokens},
    )  # fmt: skip


def fit_groups(
    channels: Channels, bits: int, groups: int, factors: Sequence[float] = FACTORS
) -> SiteQuantizer:
    """The quantizers of a site: of all starts the bounds with the smallest squared error; then all of them,
    and one after the other, wider or narrower while that lowers the error further.
    """
    if groups < 1:
        raise VitqError("groups must be 1 or more", where="groups", got=groups)
    points = channels.low, channels.high
    tried = []
    for start in starts(*points, groups):
        lower, upper, _ = alternate(*points, *start)
        tried += [widened(lower, upper, torch.full_like(lower, f)) for f in factors]
    sites = [quantizer_of(bits, channels.tokens, *bounds) for bounds in tried]
    errors = [channels.error(site) for site in sites]
    best = int(np.argmin(errors))
    (lower, upper), site, error = tried[best], sites[best], errors[best]
    for step in MOVES:
        for g in range(groups):
            factor = torch.ones_like(lower)
            factor[g] = step
            bounds = widened(lower, upper, factor)
            other = quantizer_of(bits, channels.tokens, *bounds)
            lowered = channels.error(other)
            if lowered < error:
                (lower, upper), site, error = bounds, other, lowered
    return site


def widened(lower: Tensor, upper: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds `factor` times as wide, around their middle."""
    middle, half = (lower + upper) / 2, (upper - lower) / 2 * factor
    return middle - half, middle + half
