"""Levels with the smallest mean squared error, by splitting and by Lloyd's iteration."""

from __future__ import annotations

import numpy as np

from tvm_vitq.calibrate.codebooks import Moments
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Array
from tvm_vitq.quantizers.codebook import GRID
from tvm_vitq.quantizers.lloyd_max import LloydMax

ROUNDS = 8
"""Of Lloyd's iteration after each split: the next split disturbs the levels anyway."""

LAST_ROUNDS = 200
"""At most; steps shrink geometrically, and end when the grid no longer tells levels apart."""


def fit_lloyd_max(data: Moments, bits: int, grid: int = GRID) -> SiteQuantizer:
    """The quantizer of at most 2**bits levels on a grid of `grid` steps between the outermost of them.

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
    levels = _means(data, _lloyd(data, cuts, LAST_ROUNDS, grid))
    low, span = float(levels[0]), max(float(levels[-1] - levels[0]), float(np.finfo(np.float32).tiny))
    whole = np.unique(np.rint((levels - low) / span * grid).astype(int)) if len(levels) > 1 else [0, grid]
    params = {"grid": grid, "shift": -low, "levels": [int(v) for v in whole]}
    return SiteQuantizer(bits, [span], [0], LloydMax.name, params=params)


def free_levels(job: Job, summaries: dict[str, Summary], uniform_from: int) -> None:
    """Such a quantizer for every output of a scalar function below `uniform_from` bits.

    The output of GELU has a long tail above and a short one below, which no formula of few parameters fits;
    its codes come out of a table in any case, so any levels cost the same.
    """
    for site, spec in job.fitted_sites("input"):
        if site.kind and spec.bits < uniform_from and spec.granularity == "tensor":
            job.quantizers[site.name] = fit_lloyd_max(Moments.of(summaries[site.name]), spec.bits)


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
