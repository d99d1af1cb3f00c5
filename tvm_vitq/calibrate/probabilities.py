"""Codebooks of softmax probabilities by squared error, one function per method; what is no softmax is noted
and left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tvm_vitq.calibrate.codebooks import every, fit_codebook, probability_codebook, scales_below
from tvm_vitq.calibrate.fit import softmax_sites
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.quantizers.shift_uniform_log2 import ETAS

ALPHAS = np.linspace(0.2, 3.1, 30).tolist()
"""Candidates of the tangent's shape, from nearly uniform to nearly all codes at the ends."""

NARROWEST = 2.0**-10
"""Of a range of logarithms: probabilities that are all equal have none."""


def fit_log_sqrt2(
    job: Job, summaries: dict[str, Summary], percentiles: Sequence[float], zero: str = "reserved"
) -> None:
    """Powers of the square root of two; the scale is one of the quantiles."""
    for site, spec in softmax_sites(job, "log_sqrt2"):
        summary = summaries[site.name]
        scales = [float(summary.quantiles(p)[1]) for p in percentiles]
        given = probability_codebook("log_sqrt2", spec.bits, zero=zero)
        job.quantizers[site.name] = fit_codebook(summary, given, scales=scales, rounds=0)[0]


def fit_shift_uniform_log2(job: Job, summaries: dict[str, Summary], etas: Sequence[float] = ETAS) -> None:
    """Uniform steps of ``log2(p + eta)`` over its whole range, with the best of the etas."""
    for site, spec in softmax_sites(job, "shift_uniform_log2"):
        ends = [float(end[0]) for end in (summaries[site.name].minimum, summaries[site.name].maximum)]
        params = []
        for eta in etas:
            low, high = (math.log2(max(end, 0.0) + eta) for end in ends)
            params.append({"eta": eta, "low": low, "high": max(high, low + NARROWEST)})
        given = probability_codebook("shift_uniform_log2", spec.bits)
        job.quantizers[site.name] = fit_codebook(summaries[site.name], given, params)[0]


def fit_tangent(job: Job, summaries: dict[str, Summary]) -> None:
    """Uniform steps of a tangent; shape and scale are searched together."""
    for site, spec in softmax_sites(job, "tangent"):
        summary = summaries[site.name]
        scales = scales_below(float(summary.maximum[0]), 0.1, 24)
        given = probability_codebook("tangent", spec.bits)
        job.quantizers[site.name] = fit_codebook(summary, given, every(alpha=ALPHAS), scales)[0]
