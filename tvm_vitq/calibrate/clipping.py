"""Learned ranges of LayerNorm channels: the dual clipping of RepQuant (Li et al. 2024).

Each channel c of a LayerNorm output has two factors between 0 and 1 that pull in the ends of its range,

    high_c = sigmoid(u_c) max_c,    low_c = sigmoid(l_c) min_c,

and with them a step and a zero point of its own. u and l are trained by gradients that pass the rounding, on
the squared error of what the float linear layers make of the quantized output. So a range is as wide as the
weights behind it ask for, which no statistic of the channel alone tells.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvm_vitq.calibrate.job import Cost, Job
from tvm_vitq.calibrate.reparameterize import Fold, Range
from tvm_vitq.calibrate.resume import Fitted, Store
from tvm_vitq.calibrate.samples import LinearSample, record

CLOSEST = 0.999
"""Largest factor that training starts from, where the sigmoid still has a slope."""

LEAST = 0.02
"""Smallest factor that training starts from."""

SMALLEST_STEP = 1e-12
"""Of a constant channel."""


@dataclass(frozen=True)
class Clipping:
    """How ranges are trained.

    iterations : per LayerNorm;  rows, batch : tokens kept per LayerNorm and used per step;  rate : of u and
    l, falling with a cosine.
    """

    iterations: int = 200
    rows: int = 2048
    batch: int = 512
    rate: float = 0.1


def learn_ranges(
    job: Job,
    folds: list[Fold],
    ranges: Mapping[str, Range],
    settings: Clipping,
    label: str = "clipping",
) -> dict[str, Range]:
    """Better ranges, by LayerNorm, of those given; a LayerNorm whose error did not fall keeps its own.

    The module's linear layers are still those of the float model. Adds to the job's costs.

    label : of this step, names its files in ``job.work``; a LayerNorm found there is not trained again.

    Raises
    ------
    VitqError : ``job.work`` holds files of another calibration.
    """
    began, store = time.monotonic(), Store(job, label, settings, folds)
    samples = record(job, len(job.images), rows=settings.rows)
    bar = job.progress(range(len(folds) * settings.iterations), label)
    found, trained = {}, 0
    for number, fold in enumerate(folds):
        known = store.load(number)
        if known is not None:
            found[fold.layer] = known.constants["low"], known.constants["high"]
            bar.update(settings.iterations)
            continue
        layers = [samples.linear[layer] for site in fold.sites for layer in samples.readers[site]]
        seen = [job.channel_ranges[fold.variables[job.sites[site].variable or ""]] for site in fold.sites]
        lows, highs = zip(*seen, strict=True)
        extremes = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
        seed = zlib.crc32(f"{job.seed} {label} {fold.layer}".encode())
        clipping = _Clipping(extremes, job.specs[fold.sites[0]].bits, layers)
        low, high = found[fold.layer] = clipping.learn(ranges[fold.layer], settings, seed, bar)
        store.save(number, Fitted({"low": low, "high": high}, {}))
        trained += settings.iterations
    bar.close()
    job.costs[label] = Cost(trained, time.monotonic() - began)
    return found


class _Clipping:
    """One LayerNorm; `extremes` are min and max of its channels, `layers` what reads them."""

    def __init__(self, extremes: Range, bits: int, layers: list[LinearSample]) -> None:
        self.extremes, self.layers = extremes, layers
        self.codes = 2**bits - 1

    def learn(self, start: Range, settings: Clipping, seed: int, bar: Any) -> Range:
        if not settings.iterations:
            return start
        logits = [_factor(s, e).logit().requires_grad_() for s, e in zip(start, self.extremes, strict=True)]
        optimizer = torch.optim.Adam(logits, settings.rate)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
        generator = torch.Generator().manual_seed(seed)
        before = float(self.error(start))
        for _ in range(settings.iterations):
            loss = self.error(self.range_of(logits), settings.batch, generator) / max(before, 1e-30)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            bar.update(1)
        with torch.no_grad():
            learned = self.range_of(logits)
            return learned if float(self.error(learned)) < before else start

    def range_of(self, logits: list[Tensor]) -> Range:
        low, high = (u.sigmoid() * end for u, end in zip(logits, self.extremes, strict=True))
        return low, high

    def error(
        self, ends: Range, batch: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared error of the layers' outputs, over all rows or a random batch of them."""
        total = torch.zeros(())
        for layer in self.layers:
            x = layer.x
            if batch is not None and batch < len(x):
                x = x[torch.randperm(len(x), generator=generator)[:batch]]
            total = total + ((self.quantized(x, ends) - x) @ layer.weight.T).square().mean()
        return total

    def quantized(self, x: Tensor, ends: Range) -> Tensor:
        """x behind one quantizer per channel, with gradients of its ends."""
        low, high = ends
        step = ((high - low) / self.codes).clamp(min=SMALLEST_STEP)
        zero = _round(-low / step)
        return ((_round(x / step) + zero).clamp(0, self.codes) - zero) * step


def _factor(start: Tensor, extreme: Tensor) -> Tensor:
    """By which the extreme is multiplied to give the start."""
    ratio = torch.where(extreme == 0, CLOSEST, start / extreme)
    return ratio.clamp(LEAST, CLOSEST)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()
