"""One pass over the calibration images that collects ranges of all tensors and summaries of the chosen
ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from tvm_vitq.calibrate.executor import Hooks
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.statistics import Collector, Summary, rows_of
from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer

SAMPLE = 2**15
"""Values per site that are sampled for the bulk of squared errors, at least LEAST_SAMPLE per row."""

LEAST_SAMPLE = 512


@dataclass(frozen=True)
class View:
    """Which elements of a site's tensor form a row: granularity, axis and group size as in a plan; values
    larger than `within` count as 0.
    """

    granularity: str
    axis: int | None = None
    group_size: int | None = None
    within: float | None = None


def view_of(quantizer: SiteQuantizer) -> View:
    return View(quantizer.granularity, quantizer.axis, quantizer.group_size)


def observe(
    job: Job, views: dict[str, View], tail: float = 0.0, channels: Collection[str] = ()
) -> dict[str, Summary]:
    """Run all images through the float model; fills ``job.ranges`` and, for `channels`,
    ``job.channel_ranges``.

    Parameters
    ----------
    views : sites to summarize; attention probabilities (".probs") are among the possible ones.
    tail : share of the values to keep exactly at each end (0: only the extremes).
    channels : variables whose smallest and largest value is wanted per channel (last axis).

    Raises
    ------
    VitqError : naming the tensor, if the model computes NaN or infinity.
    """
    observer = _Observer(job, views, tail, frozenset(channels))
    job.run(observer, "calibrate")
    for name, (low, high) in observer.extremes.items():
        job.ranges[name] = max(abs(low), abs(high))
    job.channel_ranges |= observer.channel_extremes
    return {name: collector.summary() for name, collector in observer.collectors.items()}


class _Observer(Hooks):
    def __init__(self, job: Job, views: dict[str, View], tail: float, channels: frozenset[str]) -> None:
        self.job = job
        self.views = views
        self.tail = tail
        self.channels = channels
        self.channel_extremes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.extremes: dict[str, tuple[float, float]] = {}
        self.collectors: dict[str, Collector] = {}

    def value(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            low, high = (v.item() for v in x.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise VitqError(
                    "the float model computes NaN or infinity on the calibration images",
                    where=name,
                    fix="check the checkpoint's weights and the normalization of the images",
                )
            before = self.extremes.get(name, (low, high))
            self.extremes[name] = min(low, before[0]), max(high, before[1])
        if name in self.channels:
            rows = x.flatten(0, -2)
            lows, highs = rows.amin(0), rows.amax(0)
            known = self.channel_extremes.get(name, (lows, highs))
            self.channel_extremes[name] = torch.minimum(lows, known[0]), torch.maximum(highs, known[1])
        return x

    def quantize(self, site: str, x: torch.Tensor) -> torch.Tensor:
        view = self.views.get(site)
        if view is not None:
            seen = x if view.within is None else x * (x.abs() <= view.within)
            rows = rows_of(seen, view.granularity, view.axis, view.group_size)
            if site not in self.collectors:
                count = rows.shape[1] // x.shape[0] * self.job.batches
                sample = max(SAMPLE // len(rows), LEAST_SAMPLE)
                self.collectors[site] = Collector(count, self.tail, sample, self.job.generator)
            self.collectors[site].add(rows)
        return x

    def probs(self, site: str, probs: torch.Tensor) -> torch.Tensor:
        return self.quantize(site, probs)
