"""Tables of a sweep: aligned text, and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tvm_vitq import published
from tvm_vitq.render import table
from tvm_vitq.sweep import Result

HEADERS = (
    "model", "bits", "recipe", "float", "simulation", "compiled", "+-", "agreement", "SQNR dB", "s", "latency"
)  # fmt: skip

LEGEND = """# Accuracy of the recipes

Top-1 in percent of the compiled integer programs, on the same images for all rows of a model; ± is half the
95 % confidence interval. Of two recipes on the same images, differences are known better than either
figure.

"Simulation" is the float simulation of the same plan, and "compiled − simulation" has the interval of that
difference: only images that exactly one of them gets right count. Both round at other places in between, so
with few bits an image near a boundary may fall to either side. "Agreement" is the share of images on which
both choose the same class, SQNR that of all logits. "Calibration" is in seconds; "latency" is relative to
`minmax` at w8a8 on the same model, both in turns on one thread.
"""

CHANCE = """Over all models and recipes. By chance alone, one row in twenty lies outside its 95 % interval."""


def text(rows: Sequence[Result]) -> str:
    """All rows as one table for people."""
    return table(
        HEADERS,
        (
            (
                r.model, r.bits, r.recipe, f"{r.float_top1:.2f}", f"{r.simulated:.2f}", f"{r.compiled:.2f}",
                f"{r.interval:.2f}", f"{r.agreement:.2f}", f"{r.sqnr:.1f}", f"{r.seconds:.1f}", _latency(r),
            )
            for r in rows
        ),
    )  # fmt: skip


def markdown(rows: Sequence[Result]) -> str:
    """An overview of each model, one table a model and width, recipes by accuracy, and published figures."""
    models = list(dict.fromkeys(row.model for row in rows))
    parts = [LEGEND, *(_overview([r for r in rows if r.model == model]) for model in models)]
    parts.append(_agreement(rows))
    for group in dict.fromkeys((row.model, row.bits) for row in rows):
        mine = _best_first(r for r in rows if (r.model, r.bits) == group)
        headers = (
            "recipe", "compiled", "simulation", "compiled − simulation", "agreement", "SQNR", "calibration",
            "latency",
        )  # fmt: skip
        parts.append(
            f"## {group[0]}, {group[1]}\n\n{_about(mine[0])}\n\n" + markdown_table(headers, map(_cells, mine))
        )
    return "\n".join([*parts, published.markdown()])


def _overview(rows: Sequence[Result]) -> str:
    """Recipes by widths, by accuracy at the last width that the most recipes have."""
    widths = list(dict.fromkeys(row.bits for row in rows))
    counts = {bits: sum(row.bits == bits for row in rows) for bits in widths}
    judge = [bits for bits in widths if counts[bits] == max(counts.values())][-1]
    compiled = {(row.recipe, row.bits): f"{row.compiled:.2f}" for row in rows}
    recipes = dict.fromkeys(row.recipe for row in _best_first(r for r in rows if r.bits == judge))
    recipes |= dict.fromkeys(row.recipe for row in rows)
    lines = ((f"`{name}`", *(compiled.get((name, bits), "") for bits in widths)) for name in recipes)
    return f"## {rows[0].model}\n\n{_about(rows[0])}\n\n" + markdown_table(("recipe", *widths), lines)


def _agreement(rows: Sequence[Result]) -> str:
    """Compiled - simulation over all rows of a width: what differs by chance averages out."""
    lines = []
    for bits in dict.fromkeys(row.bits for row in rows):
        known = [
            (r.compiled - r.simulated, r.paired) for r in rows if r.bits == bits and r.paired is not None
        ]
        if known:
            mean = sum(difference for difference, _ in known) / len(known)
            interval = math.sqrt(sum(paired**2 for _, paired in known)) / len(known)
            outside = sum(abs(difference) > paired for difference, paired in known)
            lines.append((bits, f"{len(known)}", _signed(mean, interval), f"{outside}"))
    headers = ("bits", "rows", "mean of compiled − simulation", "rows outside their interval")
    return f"## Compiled against simulated\n\n{CHANCE}\n\n" + markdown_table(headers, lines)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As pages on GitHub show it."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _best_first(rows: Iterable[Result]) -> list[Result]:
    return sorted(rows, key=lambda row: (-row.compiled, row.recipe))


def _about(row: Result) -> str:
    return f"Float {row.float_top1:.2f} %, {row.images} images."


def _cells(row: Result) -> tuple[str, ...]:
    return (
        f"`{row.recipe}`",
        f"{row.compiled:.2f} ± {row.interval:.2f}",
        f"{row.simulated:.2f}",
        _signed(row.compiled - row.simulated, row.paired),
        f"{row.agreement:.2f} %",
        f"{row.sqnr:.1f} dB",
        f"{row.seconds:.1f} s",
        _latency(row),
    )


def _signed(value: float, interval: float | None) -> str:
    return f"{value:+.2f}" + ("" if interval is None else f" ± {interval:.2f}")


def _latency(row: Result) -> str:
    return "-" if row.latency is None else f"{row.latency:.2f}"
