"""Ranges from statistics: how much of the tails to clip.

A range rule is ``f(summary, bits, signed) -> (low, high)``, both [P]; for signed (symmetric) quantizers
``low = -high``. Rules are used for activations and weights alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.quantizers.uniform import affine_from_range, symmetric_from_max

RangeRule = Callable[[Summary, int, bool], tuple[Tensor, Tensor]]

PERCENTILES = (0.999, 0.9999, 0.99999)
"""Candidates of the percentile search of the RepQ-ViT code family."""


def minmax(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """The whole range: nothing is clipped."""
    return _symmetric(summary.minimum, summary.maximum) if signed else (summary.minimum, summary.maximum)


def percentile(candidates: Sequence[float] = PERCENTILES) -> RangeRule:
    """Of the ranges between the quantiles 1 - p and p, row by row the one with the smallest squared error."""

    def rule(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        ranges = []
        for p in candidates:
            low, high = summary.quantiles(p)
            ranges.append(_symmetric(low, high) if signed else (low, high))
        return _best(summary, ranges, bits, signed)

    return rule


def mse(steps: int = 24, rounds: int = 2, smallest: float = 0.2) -> RangeRule:
    """Squared-error search over shrunken ranges.

    First both ends shrink together by `steps` factors down to `smallest`; then, `rounds` times, each end is
    refined alone on a grid around its place that gets finer each time. Symmetric ranges have only one end.
    """

    def rule(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        low, high = minmax(summary, bits, signed)
        factors = torch.linspace(1.0, smallest, steps).tolist()
        best = _best(summary, [(low * f, high * f) for f in factors], bits, signed)
        width = (1.0 - smallest) / (steps - 1)
        for _ in range(rounds):
            nearby = [1.0 + width * offset for offset in (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75)]
            if signed:
                best = _best(summary, [(best[0] * f, best[1] * f) for f in nearby], bits, signed)
            else:
                # the ends may differ by more than the spacing of the joint grid
                wide = [1.0 + 4 * (f - 1.0) for f in nearby]
                best = _best(summary, [(best[0], best[1] * f) for f in wide], bits, signed)
                best = _best(summary, [(best[0] * f, best[1]) for f in wide], bits, signed)
            width /= 4
        return torch.maximum(best[0], low), torch.minimum(best[1], high)

    return rule


def by_bits(narrow: RangeRule, wide: RangeRule, limit: int = 8) -> RangeRule:
    """`wide` from `limit` bits on, `narrow` below: with many levels clipping costs more than it gains."""

    def rule(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        return (wide if bits >= limit else narrow)(summary, bits, signed)

    return rule


def quantizer_numbers(low: Tensor, high: Tensor, bits: int, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """float32 scale and int64 zero point, [P] each, of a uniform quantizer for ranges."""
    if signed:
        scale = symmetric_from_max(high.numpy(), bits)
        return scale, np.zeros(len(scale), np.int64)
    return affine_from_range(low.numpy(), high.numpy(), bits)


def _symmetric(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.maximum(low.abs(), high.abs())
    return -largest, largest


def _best(
    summary: Summary, ranges: list[tuple[Tensor, Tensor]], bits: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """Row by row the range with the smallest error; the first of equals."""
    qmin, qmax = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    errors = []
    for low, high in ranges:
        scale, zero = quantizer_numbers(low, high, bits, signed)
        errors.append(summary.squared_error(torch.from_numpy(scale), torch.from_numpy(zero), qmin, qmax))
    chosen = torch.stack(errors).argmin(0)
    rows = torch.arange(len(chosen))
    lows, highs = (torch.stack(ends) for ends in zip(*ranges, strict=True))
    return lows[chosen, rows], highs[chosen, rows]
