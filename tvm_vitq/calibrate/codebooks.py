"""Scale and shape of codebook quantizers, fitted to data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import codec_of
from tvm_vitq.quantizers.base import Array
from tvm_vitq.quantizers.codebook import PROBABILITY_GRID, Codebook

Params = Mapping[str, Any]
Scales = Sequence[float] | Callable[[Params], Sequence[float]]
Fit = tuple[SiteQuantizer, float]


@dataclass(frozen=True)
class Moments:
    """Values in ascending order and, before each, how many there are, their sum and their sum of squares.

    With these the squared error of a step function costs a binary search per step.

    values : float32 [n];  sums : float64 [3, n + 1].
    """

    values: Array
    sums: Array

    @classmethod
    def of(cls, data: Summary | Tensor, importance: Tensor | None = None) -> Moments:
        """Moments of a tensor, or of what a summary stands for: its tails and, between them, its sample.

        importance : weight of each element's squared error, if `data` is a tensor.
        """
        if isinstance(data, Summary):
            data, importance = data.weighted()
        x, order = data.detach().reshape(-1).float().cpu().sort()
        weight = torch.ones_like(x) if importance is None else importance.reshape(-1).cpu()[order]
        terms = [weight.double() * x.double() ** power for power in range(3)]
        sums = torch.nn.functional.pad(torch.stack(terms).cumsum(1), (1, 0))
        return cls(x.numpy(), sums.numpy())

    def squared_error(self, edges: Array, results: Array) -> Array:
        """Mean squared error [...] of ``results[number of edges <= x]`` with M - 1 edges."""
        inner = np.searchsorted(self.values, edges)
        ends = np.zeros((*inner.shape[:-1], 1), inner.dtype)
        cuts = np.concatenate([ends, inner, ends + len(self.values)], -1)
        count, first, second = np.diff(self.sums[:, cuts], axis=-1)
        y = results.astype(np.float64)
        total = (second + y * (y * count - 2 * first)).sum(-1)
        return np.maximum(total, 0.0) / self.sums[0, -1]


def probability_codebook(codec: str, bits: int, **params: Any) -> SiteQuantizer:
    """A codebook quantizer of attention probabilities with scale 1: 1 is its largest level."""
    return SiteQuantizer(bits, [1.0], [0], codec, params={"grid": PROBABILITY_GRID, **params})


def every(**options: Iterable[Any]) -> list[dict[str, Any]]:
    """All combinations of options as params: ``every(base=(10, 11), zero=("none",))``."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def scales_below(largest: float, smallest: float = 0.04, steps: int = 64) -> list[float]:
    """Candidates of a scale: a geometric row from `largest` down to the share `smallest` of it."""
    return (largest * np.geomspace(1.0, smallest, steps)).tolist()


def fit_codebook(
    data: Summary | Tensor | Moments,
    site: SiteQuantizer,
    params: Sequence[Params] = ({},),
    scales: Scales = (1.0,),
    *,
    error: Callable[[SiteQuantizer], float] | None = None,
    keep: int = 8,
    rounds: int = 2,
) -> Fit:
    """The best combination of params and scale, and its error; the first of equals.

    For each params the scale with the smallest mean squared error is found among the candidates and then on
    closer grids around the best. With an `error`, of a layer's output say, the `keep` best of these are
    compared by it, and the scale of the winner is refined by it once more.

    Parameters
    ----------
    data : values of the site; if it is dynamic, a tensor of whole rows.
    site : what is given: codec, bits, dynamic, and params besides the candidates; its scale is ignored.
    params : candidates, see `every`.
    scales : candidates, or a function of the params that gives them; see `scales_below`. A single one stays.
    rounds : of refinement: each tries six scales around the best, four times closer than those before.
    """
    sites = [replace(site, params={**site.params, **p}) for p in params]
    if site.dynamic:
        assert isinstance(data, Tensor)
        found = [(s, _row_error(data, s)) for s in sites]
    else:
        moments = data if isinstance(data, Moments) else Moments.of(data)
        found = [_least_squares(moments, s, _row(scales, s), rounds) for s in sites]
    found.sort(key=lambda pair: pair[1])
    if error is None:
        return found[0]
    best, value = min(((s, float(error(s))) for s, _ in found[:keep]), key=lambda pair: pair[1])
    ratio = 1.0 if site.dynamic else _ratio(_row(scales, best))
    if ratio == 1 or not rounds:
        return best, value
    row = _around(best.scale[0], ratio)
    return _refined(best, row, lambda row: [error(_scaled(best, s)) for s in row], rounds - 1)


def _least_squares(moments: Moments, site: SiteQuantizer, row: Array, rounds: int) -> Fit:
    codec, given = codec_of(site), _scaled(site, 1.0)
    assert isinstance(codec, Codebook)
    return _refined(given, row, lambda row: moments.squared_error(*codec.table(given, row)), rounds)


def _refined(site: SiteQuantizer, row: Array, measure: Callable[[Array], Any], rounds: int) -> Fit:
    """The best scale of a row, then of closer and closer ones around it."""
    ratio = _ratio(row)
    while True:
        errors = np.asarray(measure(row))
        best = int(errors.argmin())
        if ratio == 1 or not rounds:
            return _scaled(site, row[best]), float(errors[best])
        ratio, rounds = ratio**0.25, rounds - 1
        row = _around(row[best], ratio)


def _row(scales: Scales, site: SiteQuantizer) -> Array:
    return np.array(scales(site.params) if callable(scales) else scales, np.float64)


def _ratio(row: Array) -> float:
    """Of the neighbours that differ most."""
    return float(np.exp(np.abs(np.diff(np.sort(np.log(row)))).max(initial=0.0)))


def _around(scale: float, ratio: float) -> Array:
    exponents = [0.0, -3, -2, -1, 1, 2, 3]  # the present scale first: it stays if none is better
    return scale * ratio ** np.array(exponents)


def _scaled(site: SiteQuantizer, scale: float) -> SiteQuantizer:
    return replace(site, scale=[float(np.float32(scale))], zero_point=[0])


def _row_error(rows: Tensor, site: SiteQuantizer) -> float:
    quantized = codec_of(site).fake_quantize(rows.detach(), site, {})
    return quantized.sub_(rows).square_().mean(dtype=torch.float64).item()
