"""Scales by the error that they cause in the layer's output.

An error is a function of the quantized operand that gives one number per output channel or head, see
`samples`. What has a scale of its own there chooses for itself, everything else by the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.samples import LinearSample, Samples
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import codec_of

Error = Callable[[Tensor], Tensor]

Step = Callable[[str, SiteQuantizer, Tensor, Error], SiteQuantizer]
"""From a site, its quantizer so far, a sample of its tensor and the error there, a better quantizer."""

COARSE = (1.0, *np.geomspace(1.2, 0.01, 28).tolist())
"""Factors of a scale from whole ranges: PTQ4ViT's 0.01 to 1.2 in coarse steps. The scale itself comes first:
it stays where no factor is better."""

FINE = (1.0, 0.96, 0.98, 1.02, 1.04)
"""Factors around a scale found before."""


def quantized(x: Tensor, quantizer: SiteQuantizer) -> Tensor:
    """A tensor behind its quantizer."""
    codec = codec_of(quantizer)
    numbers = {name: torch.from_numpy(value) for name, value in codec.parameters(quantizer).items()}
    return codec.fake_quantize(x, quantizer, numbers)


def search_scale(
    quantizer: SiteQuantizer, x: Tensor, error: Error, factors: Sequence[float] = COARSE
) -> SiteQuantizer:
    """The quantizer with its scales times the best of the factors, then times the best of `FINE` ones."""
    for row in (factors, FINE) if factors is not FINE else (FINE,):
        candidates = [_times(quantizer, factor) for factor in row]
        quantizer = search(candidates, x, error)
    return quantizer


def search(candidates: Iterable[SiteQuantizer], x: Tensor, error: Error) -> SiteQuantizer:
    """The best of quantizers that differ in their numbers; the first of equals.

    Where each output channel (or head) has scales of its own, each takes those of its best candidate.
    """
    options = list(candidates)
    errors = torch.stack([error(quantized(x, option)) for option in options])
    first = options[0]
    if first.axis not in (0, -3) or len(first.scale) % errors.shape[1]:
        return options[int(errors.sum(1).argmin())]
    chosen = errors.argmin(0).numpy()
    parts = np.arange(len(chosen))
    scales = np.array([o.scale for o in options], np.float32).reshape(len(options), len(chosen), -1)
    zeros = np.array([o.zero_point for o in options]).reshape(scales.shape)
    return replace(
        first,
        scale=scales[chosen, parts].ravel().tolist(),
        zero_point=zeros[chosen, parts].ravel().tolist(),
    )


def _times(quantizer: SiteQuantizer, factor: float) -> SiteQuantizer:
    scale = np.array(quantizer.scale, np.float32) * np.float32(factor)
    return replace(quantizer, scale=np.maximum(scale, np.finfo(np.float32).tiny).tolist())


def by_output(job: Job, samples: Samples, steps: Sequence[Step], about: str = "outputs") -> None:
    """Replace quantizers by what the steps make of them, one step per round over all layers.

    In each round weights come before their inputs and q, k and probabilities before v; each is measured with
    the quantizers that the layer's other operand has by then. Inputs per token keep their quantizers: a
    sample of rows does not tell tokens apart.
    """
    quantizers = job.quantizers
    found = len(samples.readers) + len(samples.attention)
    bar = iter(job.progress(range(found * len(steps)), about))

    def improve(step: Step, site: str, x: Tensor, error: Error) -> Tensor:
        owner = job.aliases.get(site, site)
        quantizers[owner] = step(owner, quantizers[owner], x, error)
        return quantized(x, quantizers[owner])

    with torch.no_grad():
        for step in steps:
            for site, readers in samples.inputs():
                next(bar)
                x = readers[0].x
                by_token = quantizers[site].granularity == "token"
                now = x if by_token else quantized(x, quantizers[site])
                weights = [
                    improve(step, f"{layer}.weight", sample.weight, partial(sample.error, now))
                    for layer, sample in zip(samples.readers[site], readers, strict=True)
                ]
                if not by_token:
                    improve(step, site, x, partial(_of_all, readers, weights))
            for layer, a in samples.attention.items():
                next(bar)
                q, k, v, probs = (f"{layer}.{role}" for role in ("q", "k", "v", "probs"))
                now = quantized(a.k, _of(job, k))
                now = improve(step, q, a.q, partial(a.score_error, k=now))
                improve(step, k, a.k, partial(a.score_error, now))
                now = quantized(a.v, _of(job, v))
                now = improve(step, probs, a.probs, partial(a.output_error, v=now))
                improve(step, v, a.v, partial(a.output_error, now))


def _of(job: Job, site: str) -> SiteQuantizer:
    return job.quantizers[job.aliases.get(site, site)]


def _of_all(readers: list[LinearSample], weights: list[Tensor], x: Tensor) -> Tensor:
    return torch.cat([reader.error(x, weight) for reader, weight in zip(readers, weights, strict=True)])
