"""Mixed precision: a width for every layer, within a budget, by what each width costs the prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import tvm

from tvm_vitq.calibrate.allocate import Option, allocate
from tvm_vitq.calibrate.budget import Budget, Matmul, cost, matmuls, unit_cost
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.sensitivity import IMAGES, divergences
from tvm_vitq.errors import VitqError
from tvm_vitq.relax_passes.annotate import annotate
from tvm_vitq.site_rules import SiteSpec, layer_of
from tvm_vitq.site_statistics import SiteStatistics

AUTO = "auto"
"""As `bits`: widths are chosen."""

MIXED = "mixed"
"""In plans: every site has a width of its own."""

WIDTHS = range(3, 9)

Specs = Mapping[str, SiteSpec]


@dataclass(frozen=True)
class Chosen:
    """specs : of every site;  note : what was chosen and why;  divergence : by layer and width."""

    specs: dict[str, SiteSpec]
    note: str
    divergence: dict[str, dict[str, float]]

    def told(self, statistics: Mapping[str, SiteStatistics]) -> dict[str, SiteStatistics]:
        """Statistics of the sites with the divergence of their layer."""
        return {
            site: replace(seen, divergence=self.divergence[layer_of(site)])
            for site, seen in statistics.items()
        }


def choose_widths(
    mod: tvm.IRModule,
    specs: Mapping[int, Specs],
    fit: Callable[[Specs], Job],
    budget: Budget,
) -> Chosen:
    """A width for every layer, weights and activations alike, so that the divergences of the layers (see
    `sensitivity`) add up to the least within the budget.

    A layer that costs nothing, which in a budget of weights is attention, gets the average that the budget
    leaves for weights, rounded down: without weights it would take 8 bits for free.

    Parameters
    ----------
    mod : canonical.
    specs : of every site, by width; where they are equal at all widths, because an override says so or the
        site sees the image, nothing is chosen.
    fit : calibrates all of the model with such specs.

    Raises
    ------
    VitqError : the smallest widths cost more than the budget.
    """
    layers = matmuls(mod)
    groups = _groups(mod, layers, next(iter(specs.values())))
    everything = [product for products in layers.values() for product in products]
    widths = sorted(specs)

    def costs(group: Sequence[str]) -> list[int]:
        products = [product for layer in group for product in layers[layer]]
        return [cost(budget.kind, products, specs[width]) for width in widths]

    unit = unit_cost(budget.kind, everything)
    least = sum(min(costs(group)) for group in groups)
    allowed = math.floor(budget.limit * unit + 1e-6 * unit)
    if least > allowed:
        raise VitqError(
            "the budget is too small",
            where="budget",
            got=str(budget),
            expected=f"{budget.text(_rounded_up(least / unit))} or more, "
            f"which is {widths[0]} bits everywhere",
        )
    losses = {width: divergences(fit(specs[width]), groups) for width in widths}
    free = max((w for w in widths if w <= _average(budget, unit, everything)), default=widths[0])
    candidates = [widths if any(costs(group)) else [free] for group in groups]
    items = [
        [Option(of_group[widths.index(width)], losses[width][number]) for width in candidates[number]]
        for number, of_group in enumerate(map(costs, groups))
    ]
    picked = [of[option] for of, option in zip(candidates, allocate(items, allowed), strict=True)]
    width_of = {layer: width for group, width in zip(groups, picked, strict=True) for layer in group}
    chosen = {site: specs[width_of[layer_of(site)]][site] for site in specs[widths[0]]}
    reached = cost(budget.kind, everything, chosen) / unit
    divergence = {
        layer: {str(width): losses[width][number] for width in widths}
        for number, group in enumerate(groups)
        for layer in group
    }
    return Chosen(chosen, _note(budget, reached, everything, chosen, width_of, divergence), divergence)


def _groups(mod: tvm.IRModule, layers: Mapping[str, list[Matmul]], specs: Specs) -> list[list[str]]:
    """Layers that share an input share its quantizer, and so their width."""
    _, aliases = annotate(mod, specs)
    groups: dict[str, list[str]] = {}
    for layer in layers:
        owners = [aliases[p.left] for p in layers[layer] if p.left in aliases]
        groups.setdefault(layer_of(owners[0]) if owners else layer, []).append(layer)
    return list(groups.values())


def _rounded_up(amount: float) -> float:
    """To the four digits that `Budget.text` shows, so that what it shows is enough."""
    step = 10.0 ** (math.floor(math.log10(amount)) - 3)
    return math.ceil(amount / step - 1e-6) * step


def _average(budget: Budget, unit: float, everything: list[Matmul]) -> float:
    """Bits per weight that a budget of weights amounts to."""
    return (budget.limit * unit + 1e-6 * unit) / max(sum(p.weights for p in everything), 1)


def _note(
    budget: Budget,
    reached: float,
    everything: list[Matmul],
    chosen: Specs,
    width_of: Mapping[str, int],
    divergence: Mapping[str, Mapping[str, float]],
) -> str:
    other = "bits" if budget.kind == "bops" else "bops"
    beside = Budget(other, cost(other, everything, chosen) / unit_cost(other, everything))
    counts = {width: list(width_of.values()).count(width) for width in sorted(set(width_of.values()))}
    lowest = str(min(map(int, next(iter(divergence.values())))))
    worst = sorted(divergence, key=lambda layer: -divergence[layer][lowest])[:3]
    return (
        f"chosen for {budget}: {budget.text(reached)}, {beside}; layers by width: "
        + ", ".join(f"{count} of {width} bits" for width, count in counts.items())
        + f"; most sensitive at {lowest} bits, by KL over at most {IMAGES} images: "
        + ", ".join(f"{layer} {divergence[layer][lowest]:.2g}" for layer in worst)
    )
