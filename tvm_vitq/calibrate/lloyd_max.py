"""Levels with the smallest mean squared error, by splitting and by Lloyd's iteration."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tvm_vitq.calibrate.codebooks import Moments
from tvm_vitq.calibrate.fit import by_row
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.samples import record
from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Array
from tvm_vitq.quantizers.codebook import GRID
from tvm_vitq.quantizers.lloyd_max import LloydMax

ROUNDS = 8
"""Of Lloyd's iteration after each split: the next split disturbs the levels anyway."""

IMAGES = 128
"""That free levels are fitted to, as far as they are not fitted to all values."""

INPUTS = ("input", "tensor")
"""Role and granularity of the sites of linear layers that can have them: the shift of the levels goes to the
bias, which attention does not have."""

LAST_ROUNDS = 200
"""At most; steps shrink geometrically, and end when the grid no longer tells levels apart."""


def fit_lloyd_max(data: Moments, bits: int, grid: int = GRID) -> SiteQuantizer:
    """The quantizer of at most 2**bits levels on a grid of `grid` steps between the outermost of them."""
    levels = best_levels(data, bits, grid)
    low, span = float(levels[0]), max(float(levels[-1] - levels[0]), float(np.finfo(np.float32).tiny))
    params = {"grid": grid, "shift": -low, "levels": _whole((levels - low) / span, grid)}
    return SiteQuantizer(bits, [span], [0], LloydMax.name, params=params)


def fit_relative(rows: Tensor, bits: int) -> SiteQuantizer:
    """The quantizer of at most 2**bits levels for values relative to the largest of their row.

    An error of x / max(x) counts by the square of max(x), which it is multiplied by in the end.

    rows : positive, [..., keys]
    """
    largest = rows.amax(-1, keepdim=True)
    data = Moments.of(rows / largest, largest.square().expand_as(rows))
    params = {"grid": GRID, "levels": _whole(best_levels(data, bits, GRID), GRID)}
    return SiteQuantizer(
        bits, [], [], LloydMax.name, granularity="token", axis=-2, dynamic=True, params=params
    )


def best_levels(data: Moments, bits: int, grid: int) -> Array:
    """At most 2**bits levels, ascending, as precise as `grid` steps between the outermost ask for.

    Starts from one level; the cell with the largest squared error is split at its mean until there are
    enough. After each split a few rounds of Lloyd's iteration move every level to the mean of its cell and
    every threshold to the middle between two levels. `Moments` gives means and errors at the cost of a binary
    search each.
    """
    cuts = np.array([0, len(data.values)])
    while len(cuts) <= 2**bits:
        count, first, second = np.diff(data.sums[:, cuts], axis=-1)
        worst = int((second - first**2 / count).argmax())
        split = np.searchsorted(data.values, np.float32(first[worst] / count[worst]), side="right")
        if split in (cuts[worst], cuts[worst + 1]):
            break  # all values of the worst cell are equal: nothing is left to gain
        cuts = _lloyd(data, np.insert(cuts, worst + 1, split), ROUNDS, grid)
    return _means(data, _lloyd(data, cuts, LAST_ROUNDS, grid))


def free_levels(job: Job, summaries: dict[str, Summary], uniform_from: int) -> None:
    """Such quantizers below `uniform_from` bits for softmax and for inputs of linear layers with one scale.

    Outputs of scalar functions come out of a table in any case, so their levels cost nothing: that of GELU
    has a long tail above and a short one below, which no formula of few parameters fits. Other inputs are
    nearer to normal, gain less, and take a table of their own; an error of a channel counts by the squares of
    the weights that read it. Softmax is quantized relative to its rows: each has a few large probabilities
    and many small ones, and errors of either count.
    """
    wanted = {
        site.name: (site, spec)
        for site, spec in job.fitted_sites("input", "probs")
        if spec.bits < uniform_from and (by_row(site, spec) or (site.role, spec.granularity) == INPUTS)
    }
    if not wanted:
        return
    samples = record(job, IMAGES)
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for name, readers in samples.inputs():
        importance = torch.stack([reader.weight.square().sum(0) for reader in readers]).sum(0)
        values[name] = readers[0].x, importance.expand_as(readers[0].x)
    for name, (site, spec) in job.progress(wanted.items(), "levels"):
        if site.role == "probs":
            job.quantizers[name] = fit_relative(samples.attention[site.layer].probs, spec.bits)
        else:
            data = Moments.of(summaries[name]) if site.kind else Moments.of(*values[name])
            job.quantizers[name] = fit_lloyd_max(data, spec.bits)


def _whole(levels: Array, grid: int) -> list[int]:
    """Different levels of the grid; two at least, as a quantizer has them."""
    whole = np.unique(np.rint(levels * grid)).astype(int).tolist()
    return whole if len(whole) > 1 else [0, grid]


def _means(data: Moments, cuts: Array) -> Array:
    count, first, _ = np.diff(data.sums[:, cuts], axis=-1)
    return first / count


def _lloyd(data: Moments, cuts: Array, rounds: int, grid: int) -> Array:
    """Cuts between the cells after some rounds; a cell that runs empty goes."""
    levels = _means(data, cuts)
    near = (data.values[-1] - data.values[0]) / (8.0 * grid)
    for _ in range(rounds):
        inner = np.searchsorted(data.values, (levels[1:] + levels[:-1]) / 2)
        cuts = np.unique(np.concatenate([[0], inner, [len(data.values)]]))
        before, levels = levels, _means(data, cuts)
        if len(before) == len(levels) and np.abs(levels - before).max(initial=0) <= near:
            break
    return cuts
