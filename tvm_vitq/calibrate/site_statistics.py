"""One pass after fitting: how much noise each quantizer adds, and to which values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tvm_vitq.calibrate.executor import Hooks
from tvm_vitq.calibrate.job import CHUNK, Job
from tvm_vitq.calibrate.simulate import FakeQuantize
from tvm_vitq.site_statistics import BINS, SiteStatistics

IMAGES = 16
"""Evenly spread over the calibration images. Ratios differ from those of many more images by tenths of a dB,
where a layer sees one token per image by one."""

VALUES = 2**18
"""Per site and chunk of images, in whole images (windows), at least one."""


def measure_sites(job: Job) -> dict[str, SiteStatistics]:
    """Statistics of every site that has a quantizer of its own, in the order of ``job.sites``.

    Operands are those of the float model with the constants that the recipe left: each quantizer's own
    error, not what the errors in front of it add up to.
    """
    quantize = FakeQuantize(job.quantizers)
    observer = _Observer(job, quantize)
    count = min(IMAGES, len(job.images))
    chosen = torch.arange(count) * len(job.images) // count
    chunk = max(CHUNK // job.executor.batch, 1) * job.executor.batch
    with torch.no_grad():
        for part in job.progress(job.images[chosen].split(chunk), "measure"):
            job.executor.run(part, observer)
        for site in job.sites.values():
            if site.role == "weight" and site.name in job.quantizers:
                weight = job.weight(site.layer)
                observer.seen[site.name] = _Seen().add(weight, quantize.apply(site.name, weight))
    return {name: observer.seen[name].result() for name in job.sites if name in observer.seen}


@dataclass
class _Seen:
    power: float = 0.0
    noise: float = 0.0
    values: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, quantized: Tensor) -> _Seen:
        self.power += float(torch.linalg.vector_norm(x)) ** 2
        self.noise += float(torch.linalg.vector_norm(quantized - x)) ** 2
        self.values.append(x.flatten())
        return self

    def result(self) -> SiteStatistics:
        x = torch.cat(self.values)
        low, high = (v.item() for v in x.aminmax())
        counts = torch.histc(x, BINS, low, high) if high > low else torch.tensor([len(x)])
        smallest = torch.finfo(torch.float32).tiny
        sqnr = 10 * math.log10(max(self.power, smallest) / self.noise) if self.noise else None
        return SiteStatistics(
            None if sqnr is None else round(sqnr, 2), low, high, [int(v) for v in counts.tolist()]
        )


class _Observer(Hooks):
    def __init__(self, job: Job, quantize: FakeQuantize) -> None:
        self.job, self.apply = job, quantize.apply
        self.generator = torch.Generator().manual_seed(job.seed)
        self.seen: dict[str, _Seen] = {}

    def quantize(self, site: str, x: Tensor) -> Tensor:
        if site in self.job.quantizers:
            images = x.flatten(0, 1)
            # Channels choose their scales by whole images, windows do not
            by_image = self.job.quantizers[site].granularity == "instance"
            quantized = self.apply(site, x).flatten(0, 1) if by_image else None
            wanted = max(1, VALUES // images[0].numel())
            if wanted < len(images):
                chosen = torch.randperm(len(images), generator=self.generator)[:wanted]
                images, quantized = images[chosen], None if quantized is None else quantized[chosen]
            quantized = self.apply(site, images) if quantized is None else quantized
            self.seen.setdefault(site, _Seen()).add(images, quantized)
        return x

    def probs(self, site: str, probs: Tensor) -> Tensor:
        return self.quantize(site, probs)
