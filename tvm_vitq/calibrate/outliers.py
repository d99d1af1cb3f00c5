"""LayerNorm outputs with a scale per token position that outliers have no part in (ADFQ-ViT)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from tvm import relax

from tvm_vitq.calibrate.fit import empty_quantizer
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.observe import observe, view_of
from tvm_vitq.calibrate.searches import RangeRule, quantizer_numbers
from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.graph import data_operands, is_movement
from tvm_vitq.ops import op_name
from tvm_vitq.quantizers.base import Array
from tvm_vitq.quantizers.outliers import UniformOutliers
from tvm_vitq.relax_passes.sites import Site, bindings

TAIL = 1e-3
"""Share of the values that is kept exactly at either end, to tell what saturates."""

WIDENINGS = 9
"""Steps tried from the inliers' to the one that holds all outliers."""


def norm_sites(job: Job) -> list[Site]:
    """Inputs of linear layers that are LayerNorm outputs, moved or averaged over tokens or not, and that are
    asked for per tensor.
    """
    made = {b.var.name: b.value for b in bindings(job.mod)}

    def is_norm(value: relax.Expr | None) -> bool:
        if isinstance(value, relax.Var):
            return is_norm(made.get(value.name))
        if value is not None and op_name(value) == "vitq.mean":
            return is_norm(value.args[0])
        if value is not None and is_movement(value):
            operands = data_operands(value)
            return len(operands) == 1 and is_norm(operands[0])
        return op_name(value) == "vitq.layer_norm"

    return [
        site
        for site, spec in job.fitted_sites("input")
        if spec.granularity == "tensor" and is_norm(made.get(site.variable or ""))
    ]


def ask_for_tokens(job: Job, sites: list[Site]) -> None:
    """Ask for a scale per token position wherever a site has tokens."""
    for site in sites:
        if len(site.shape) == 3:
            job.specs[site.name] = replace(job.specs[site.name], granularity="token")


def fit_outliers(job: Job, sites: list[Site], summaries: dict[str, Summary], rule: RangeRule) -> None:
    """Quantizers `uniform_outliers` of the sites.

    Steps and zero points are those of the rule for what `summaries` hold, values within a limit. Where the
    largest outliers do not fit a byte then, a step is widened by what gives the smallest squared error of
    all values, outliers included.
    """
    empty = {site.name: empty_quantizer(job, site, job.specs[site.name]) for site in sites}
    everything = observe(job, {name: view_of(quantizer) for name, quantizer in empty.items()}, TAIL)
    for name, quantizer in empty.items():
        low, high = rule(summaries[name], quantizer.bits, False)
        scale, zero = quantizer_numbers(low, high, quantizer.bits, False)
        quantizer = replace(quantizer, codec=UniformOutliers.name)
        limits = UniformOutliers().limits(quantizer)
        scale = _widened(everything[name], scale, zero, limits)
        job.quantizers[name] = replace(quantizer, scale=scale.tolist(), zero_point=zero.tolist())


def _widened(summary: Summary, scale: Array, zero: Array, limits: tuple[int, int]) -> Array:
    """float32 steps [P], each between the given one and that which holds the whole row."""
    first, last = limits
    most = np.maximum(summary.maximum.numpy() / (last - zero), summary.minimum.numpy() / (first - zero))
    most = np.maximum(most / scale, 1.0)
    candidates = [(scale * most**share).astype(np.float32) for share in np.linspace(0.0, 1.0, WIDENINGS)]
    errors = [
        summary.squared_error(torch.from_numpy(steps), torch.from_numpy(zero), first, last)
        for steps in candidates
    ]
    best = torch.stack(errors).argmin(0).numpy()
    return np.stack(candidates)[best, np.arange(len(best))]
