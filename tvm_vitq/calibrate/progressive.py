"""Scale and zero point together, by the layer's output: AdaLog's fast progressive combining search (FPCS)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tvm_vitq.calibrate.output_search import COARSE, Error, quantized, search_scale
from tvm_vitq.calibrate.statistics import Summary, rows_of
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Array

PERCENTILES = np.linspace(0.9, 1.0, 25)
"""Upper ends of the first ranges; the lower end is at one minus each."""

OFFSETS = np.arange(-2, 3)
"""Of zero points around the one that keeps the lower end."""

WIDEST = 2**14
"""Values of each row that the first grid is measured on."""


def progressive_search(
    quantizer: SiteQuantizer, x: Tensor, error: Error, first: int = 16, keep: int = 5, steps: int = 2
) -> SiteQuantizer:
    """The best scales and zero points of a uniform quantizer.

    The grid of `PERCENTILES` and `OFFSETS` is measured by the squared error of x itself; its `first` best by
    the output's. Then, `steps` times, the `keep` best are tried with closer scales on either side. Heads
    choose for themselves. Quantizers with other shares of scales, or without zero point, keep the ratios of
    their scales.
    """
    if quantizer.signed or quantizer.granularity not in ("tensor", "head"):
        return search_scale(quantizer, x, error, COARSE)
    rows = rows_of(x, quantizer.granularity, quantizer.axis)
    if rows.shape[1] > WIDEST:
        rows = rows[:, torch.linspace(0, rows.shape[1] - 1, WIDEST).long()]
    scale, zero = _grid(rows, quantizer)
    summary = Summary.of(rows)
    own = [
        summary.squared_error(torch.from_numpy(s).float(), torch.from_numpy(z), 0, quantizer.qmax)
        for s, z in zip(scale, zero, strict=True)
    ]
    scale, zero = _best(scale, zero, torch.stack(own), first)
    spacing = 0.06
    for step in range(steps + 1):
        options = [
            replace(quantizer, scale=s.astype(np.float32).tolist(), zero_point=z.tolist())
            for s, z in zip(scale, zero, strict=True)
        ]
        errors = torch.stack([error(quantized(x, option)) for option in options])
        if errors.shape[1] != scale.shape[1]:
            errors = errors.sum(1, keepdim=True)
        last = step == steps
        scale, zero = _best(scale, zero, errors, 1 if last else keep)
        if not last:
            factors = 1 + spacing * np.array([0.0, -1.0, 1.0])
            scale = (scale[:, None] * factors[:, None]).reshape(-1, scale.shape[1])
            zero = np.repeat(zero, len(factors), 0)
            spacing /= 3
    return replace(quantizer, scale=scale[0].astype(np.float32).tolist(), zero_point=zero[0].tolist())


def _grid(rows: Tensor, quantizer: SiteQuantizer) -> tuple[Array, Array]:
    """float64 scales and int64 zero points [candidates, P]."""
    ends = np.concatenate([1 - PERCENTILES, PERCENTILES])
    low, high = np.split(np.quantile(rows.double().numpy(), ends, axis=1), 2)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    scale = np.maximum((high - low) / quantizer.qmax, np.finfo(np.float32).tiny)
    zero = np.rint(-low / scale)[:, None] + OFFSETS[:, None]
    scale = np.repeat(scale, len(OFFSETS), 0)
    return scale, np.clip(zero, 0, quantizer.qmax).astype(np.int64).reshape(scale.shape)


def _best(scale: Array, zero: Array, errors: Tensor, count: int) -> tuple[Array, Array]:
    """Of every column the candidates with the smallest errors, ascending."""
    order = errors.argsort(stable=True, dim=0)[:count].numpy()
    return np.take_along_axis(scale, order, 0), np.take_along_axis(zero, order, 0)
