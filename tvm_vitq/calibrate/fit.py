"""Steps that fill in quantizers from statistics, shared by recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.observe import View, view_of
from tvm_vitq.calibrate.searches import RangeRule, quantizer_numbers
from tvm_vitq.calibrate.statistics import Summary, rows_of
from tvm_vitq.plan import MAX_BITS, SiteQuantizer
from tvm_vitq.quantizers import RowMaximum
from tvm_vitq.relax_passes.sites import Site
from tvm_vitq.site_rules import SiteSpec

AXES = {"token": -2, "head": -3, "channel": -1}
"""Axes of the granularities of activations, counted from the end."""

ACTIVATIONS = ("input", "q", "k", "v")


def empty_quantizer(job: Job, site: Site, spec: SiteSpec) -> SiteQuantizer:
    """The quantizer that a spec asks for on this tensor, without numbers; what does not fit declines with a
    note.
    """
    weight = site.role == "weight"
    granularity, axis, group = spec.granularity, AXES.get(spec.granularity), spec.group_size
    if weight:
        axis = None if granularity == "tensor" else 0
    if granularity == "group" and group is not None and site.shape[-1] % group:
        granularity, axis, group = ("channel", 0, None) if weight else ("tensor", None, None)
        job.notes[site.name] = (
            f"per {granularity}: {site.shape[-1]} channels do not divide into groups of {spec.group_size}"
        )
    if granularity == "token" and len(site.shape) != 3:
        job.notes[site.name] = f"per tensor: no token axis in a tensor of shape {list(site.shape)}"
        granularity, axis = "tensor", None
    signed = weight and spec.bits == MAX_BITS  # below, the byte of a weight holds ``q - zero_point``
    return SiteQuantizer(spec.bits, [], [], "uniform", signed, granularity, axis, group)


def activation_views(job: Job) -> dict[str, View]:
    """How to summarize every activation that needs a quantizer."""
    return {s.name: view_of(empty_quantizer(job, s, spec)) for s, spec in job.fitted_sites(*ACTIVATIONS)}


SMALLEST_PROBABILITY = 2.0**-6
"""Smallest upper end of a range of probabilities: at 8 bits a step of 2**-14, the finest that the integer
softmax has room for (it keeps 15 bits of each exponential)."""


def probability_views(job: Job, softmax: bool = False) -> dict[str, View]:
    """How to summarize the attention probabilities that need a scale; `softmax`: all of them."""
    sites = job.fitted_sites("probs")
    return {site.name: View("tensor") for site, spec in sites if softmax or not by_row(site, spec)}


def by_row(site: Site, spec: SiteSpec) -> bool:
    """Whether probabilities are quantized relative to the largest of their row."""
    return spec.granularity == "token" and site.kind == "softmax"


def softmax_sites(job: Job, codec: str) -> Iterator[tuple[Site, SiteSpec]]:
    """Attention probabilities that a codec for softmax can have; the others are noted."""
    for site, spec in job.fitted_sites("probs"):
        if site.kind == "softmax":
            yield site, spec
        else:
            job.notes[site.name] = f"uniform: {codec} is for softmax, this is {site.kind}"


GELUS = ("gelu", "gelu_tanh", "quick_gelu")
"""Functions that are nowhere smaller than minus `GELU_SHIFT`."""


def gelu_sites(job: Job, codec: str) -> Iterator[tuple[Site, SiteSpec]]:
    """Inputs behind GELU that a codec for it can have; those behind other functions are noted."""
    for site, spec in job.fitted_sites("input"):
        if site.kind in GELUS and spec.granularity == "tensor":
            yield site, spec
        elif site.kind:
            reason = f"this is per {spec.granularity}" if site.kind in GELUS else f"this is {site.kind}"
            job.notes[site.name] = f"uniform: {codec} is for GELU and per tensor, {reason}"


def fit_activations(
    job: Job, summaries: dict[str, Summary], rule: RangeRule, roles: Sequence[str] = ACTIVATIONS
) -> None:
    """Quantizers of all activations of these roles whose site is not fitted yet, from their summaries."""
    for site, spec in job.progress(list(job.fitted_sites(*roles)), "activations"):
        if site.name not in job.quantizers:
            empty = empty_quantizer(job, site, spec)
            job.quantizers[site.name] = _filled(empty, summaries[site.name], rule)


def fit_probabilities(job: Job, summaries: dict[str, Summary], rule: RangeRule) -> None:
    """Quantizers of attention probabilities not fitted yet: relative to their row where the spec says
    "token", which softmax alone allows, else from 0 to the rule's upper end.

    Not to 1: where attention is spread over hundreds of tokens, no probability comes near 1, and a step of
    1 / 255 would leave them a single code.
    """
    for site, spec in job.fitted_sites("probs"):
        if site.name in job.quantizers:
            continue
        if by_row(site, spec):
            job.quantizers[site.name] = SiteQuantizer(
                spec.bits, [], [], RowMaximum.name, granularity="token", axis=-2, dynamic=True
            )
            continue
        high = rule(summaries[site.name], spec.bits, False)[1].clamp(SMALLEST_PROBABILITY, 1.0)
        scale = (high / (2**spec.bits - 1)).tolist()
        job.quantizers[site.name] = SiteQuantizer(spec.bits, scale, [0])


def fit_weights(job: Job, rule: RangeRule) -> None:
    """Quantizers of all weights, symmetric at 8 bits, from the weights themselves as they are now."""
    for site, _ in job.progress(list(job.fitted_sites("weight")), "weights"):
        job.quantizers[site.name] = fit_weight(job, site, job.weight(site.layer), rule)


def fit_weight(job: Job, site: Site, weight: Tensor, rule: RangeRule) -> SiteQuantizer:
    """The quantizer of one layer's weight [N, K]."""
    empty = empty_quantizer(job, site, job.specs[site.name])
    rows = rows_of(weight, empty.granularity, empty.axis, empty.group_size)
    return _filled(empty, Summary.of(rows), rule)


def _filled(empty: SiteQuantizer, summary: Summary, rule: RangeRule) -> SiteQuantizer:
    low, high = rule(summary, empty.bits, empty.signed)
    scale, zero = quantizer_numbers(low, high, empty.bits, empty.signed)
    return SiteQuantizer(
        empty.bits,
        scale.tolist(),
        zero.tolist(),
        empty.codec,
        empty.signed,
        empty.granularity,
        empty.axis,
        empty.group_size,
    )
