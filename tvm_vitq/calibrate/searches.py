"""Ranges from statistics: how much of the tails to clip.

A range rule is ``f(summary, bits, signed) -> (low, high)``, both [P]; for signed (symmetric) quantizers
``low = -high``. Rules are used for activations and weights alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.quantizers.uniform import affine_from_range, symmetric_from_max

RangeRule = Callable[[Summary, int, bool], tuple[Tensor, Tensor]]

PERCENTILES = (0.999, 0.9999, 0.99999)
"""Candidates of the percentile search of the RepQ-ViT code family."""

WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)
"""Candidates for weights in the released code of I&S-ViT."""


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


def mse(steps: int = 28, smallest: float = 0.04) -> RangeRule:
    """Squared-error search over shrunken ranges.

    Both ends shrink together by `steps` factors in a geometric row from 1 to `smallest`; then each end alone
    by the same factors; then each end once more on a finer grid around its place. A symmetric range has only
    one end.
    """

    ratio = smallest ** (1.0 / (steps - 1))
    coarse = [ratio**i for i in range(steps)]
    fine = [ratio ** (i / 4) for i in range(-3, 4)]

    def rule(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        def best_of(lows: list[Tensor], highs: list[Tensor]) -> tuple[Tensor, Tensor]:
            return _best(summary, list(zip(lows, highs, strict=True)), bits, signed)

        lowest, highest = minmax(summary, bits, signed)
        low, high = best_of([lowest * f for f in coarse], [highest * f for f in coarse])
        if signed:
            low, high = best_of([low * f for f in fine], [high * f for f in fine])
        else:
            low, high = best_of([low] * steps, [highest * f for f in coarse])
            low, high = best_of([lowest * f for f in coarse], [high] * steps)
            low, high = best_of([low] * len(fine), [high * f for f in fine])
            low, high = best_of([low * f for f in fine], [high] * len(fine))
        return torch.maximum(low, lowest), torch.minimum(high, highest)

    return rule


BINS = 2048
"""Of the histogram that `plane` measures errors on: eight in a step of 8 bits over the whole range."""


def plane(steps: int = 100, power: float = 2.4) -> RangeRule:
    """The best of all pairs of a step and a zero point: `steps` fractions of the width of the range, evenly
    from 1 down, with every zero point. Best is the smallest mean of ``|error|**power``.

    For unsigned quantizers only, of few rows: each costs `steps` times 2**bits times `BINS` errors.
    """

    def rule(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        assert not signed  # by the recipe
        found = [_plane(x, w, bits, steps, power) for x, w in zip(*summary.weighted(), strict=True)]
        lows, highs = zip(*found, strict=True)
        return torch.tensor(lows), torch.tensor(highs)

    return rule


def _plane(x: Tensor, weight: Tensor, bits: int, steps: int, power: float) -> tuple[float, float]:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    width, last = high - low, 2**bits - 1
    if not width > 0:
        return low, high
    place = ((x - low) * (BINS / width)).long().clamp(0, BINS - 1)
    count = torch.zeros(BINS).index_add_(0, place, weight.float())
    centre = (low + (torch.arange(BINS) + 0.5) * (width / BINS))[count > 0]
    count = count[count > 0]
    zeros = torch.arange(last + 1, dtype=torch.float32)[:, None]
    best = (math.inf, low, high)
    for i in range(steps, 0, -1):
        scale = width * i / steps / last
        codes = ((centre / scale).round() + zeros).clamp_(0, last).sub_(zeros)
        errors = codes.mul_(scale).sub_(centre).abs_().pow_(power) @ count
        zero = int(errors.argmin())
        best = min(best, (float(errors[zero]), -zero * scale, (last - zero) * scale))
    return best[1:]


def whole(inner: RangeRule, factor: float = 1.2) -> RangeRule:
    """The whole range, but on either side at most `factor` times as far as `inner` reaches: a few values of a
    heavy tail are kept, a single one far beyond does not take the codes of all others.
    """

    def rule(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        low, high = inner(summary, bits, signed)
        lowest, highest = minmax(summary, bits, signed)
        return torch.maximum(lowest, factor * low), torch.minimum(highest, factor * high)

    return rule


UNSEEN_VALUES = 1e6
"""Values per channel that a range of `unseen` is meant to hold: a few thousand images of a few hundred
tokens."""


def unseen(rule: RangeRule) -> RangeRule:
    """The ranges of `rule`, widened to what more values than the observed ones would reach.

    The largest of n normal values grows as ``sqrt(2 ln n)``, so a range seen in n values is widened around
    its middle by ``sqrt(ln UNSEEN_VALUES / ln n)``: 1.6 for the 256 class tokens of a calibration set, 1.2
    for 16,000 tokens.
    """

    def widened(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        low, high = rule(summary, bits, signed)
        factor = max(1.0, math.sqrt(math.log(UNSEEN_VALUES) / math.log(max(summary.count, 2))))
        middle, half = (low + high) / 2, (high - low) / 2 * factor
        return middle - half, middle + half

    return widened


def symmetric(inner: RangeRule) -> RangeRule:
    """The ranges of `inner`, widened to lie around zero. An unsigned quantizer then has the zero point
    ``2**(bits - 1)``, the lower end being a hair farther than the upper: the symmetric quantizer of
    activations with codes from ``-2**(bits - 1)`` on.
    """

    def rule(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        low, high = _symmetric(*inner(summary, bits, signed))
        return (low, high) if signed else (low * (1 + 2.0**-16), high)

    return rule


def grouped(inner: RangeRule, count: int) -> RangeRule:
    """The ranges of `inner`, made equal within `count` groups of rows: rows are sorted by the width of their
    range and cut into equal parts, each with the range that holds those of its rows.
    """

    def rule(summary: Summary, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
        low, high = (end.clone() for end in inner(summary, bits, signed))
        for rows in (high - low).argsort(stable=True, dim=0).tensor_split(min(count, len(low))):
            low[rows], high[rows] = low[rows].min(), high[rows].max()
        return low, high

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
