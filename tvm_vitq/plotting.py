"""Distributions with the quantizers' levels over them, as PNG files; needs the optional matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.explain import by_block, chosen_sites, granularity_text, levels, parameters_text, sqnr_text
from tvm_vitq.files import check_writable, written_whole
from tvm_vitq.plan import QuantPlan
from tvm_vitq.site_rules import role_of

COLUMNS = 4
PANEL = (3.6, 2.6)
"""Inches of one distribution."""

VALUES, LEVELS = "#4477aa", "#cc3311"
"""Colours that people who see few of them tell apart."""


def plot_plan(plan: QuantPlan, to: str | os.PathLike[str], pattern: str | None = None) -> list[Path]:
    """Draw the sites of a plan.

    Parameters
    ----------
    to : a folder, which gets "overview.png" (the signal-to-noise ratio of every site) and one file a block,
        "blocks.0.png", with the distribution of each of its operands, on a logarithmic axis, and the levels
        of its quantizer as vertical lines; or, ending in ".png", one file with all sites chosen.
    pattern : site or layer name or pattern; None: all.

    Returns
    -------
    The files written.

    Raises
    ------
    VitqError : matplotlib is missing; the plan has no statistics; no site matches; nothing can be written.
    """
    _need_matplotlib()
    sites = [name for name in chosen_sites(plan, pattern) if plan.statistics.get(name)]
    if not sites:
        raise VitqError(
            "the plan holds no distributions",
            where=f"plan of {plan.model or 'a model'}",
            fix="quantize the model anew: calibration measures them; or choose other sites with --site",
        )
    target = Path(to)
    if target.suffix == ".png":
        check_writable(target)
        return [_save(_distributions(plan, sites, _title(plan)), target)]
    if target.suffix or (target.exists() and not target.is_dir()):
        raise VitqError(
            "cannot plot to this path", where=target, expected="a folder, or a file ending in .png"
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitqError("cannot make the folder", where=target, got=error.strerror) from error
    written = [_save(_overview(plan, sites), target / "overview.png")]
    for block, names in by_block(sites).items():
        page = _distributions(plan, names, f"{block}  ·  {_title(plan)}")
        written.append(_save(page, target / f"{block}.png"))
    return written


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise VitqError(
            "plots need matplotlib", got=error, fix="pip install 'tvm-vitq[plot]', or pip install matplotlib"
        ) from error


def _title(plan: QuantPlan) -> str:
    return f"{plan.model} {plan.bits} {plan.recipe}"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window, no state that outlives the figure
    return figure


def _save(figure: Any, path: Path) -> Path:
    with written_whole(path) as part:
        figure.savefig(part, format="png")
    return path


def _distributions(plan: QuantPlan, sites: Sequence[str], title: str) -> Any:
    columns = min(COLUMNS, len(sites))
    rows = math.ceil(len(sites) / columns)
    figure = _figure(max(PANEL[0] * columns, 5.0), PANEL[1] * rows + 0.5)
    figure.suptitle(title, fontsize=11)
    for number, site in enumerate(sites):
        axes = figure.add_subplot(rows, columns, number + 1)
        _distribution(axes, plan, site)
        if number % columns == 0:
            axes.set_ylabel("values per bin", fontsize=8)
        if number >= len(sites) - columns:
            axes.set_xlabel("value", fontsize=8)
    return figure


def _distribution(axes: Any, plan: QuantPlan, site: str) -> None:
    quantizer, seen = plan[site], plan.statistics[site]
    edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
    if seen.low == seen.high:
        edges = np.array([seen.low - 0.5, seen.high + 0.5])
    axes.stairs(seen.counts, edges, fill=True, color=VALUES, alpha=0.7)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    # Levels far outside of what was seen would squeeze the distribution to a line.
    margin = 0.05 * (edges[-1] - edges[0])
    axes.set_xlim(edges[0] - margin, edges[-1] + margin)
    lines = levels(quantizer, seen.high)
    shown = lines[(lines >= edges[0] - margin) & (lines <= edges[-1] + margin)]
    crowded = len(shown) > 40
    axes.vlines(
        shown, 0, 1, transform=axes.get_xaxis_transform(), color=LEVELS,
        linewidth=0.3 if crowded else 0.7, alpha=0.4 if crowded else 0.8,
    )  # fmt: skip
    axes.tick_params(labelsize=7)
    axes.set_title(_panel_title(plan, site), fontsize=7)


def _panel_title(plan: QuantPlan, site: str) -> str:
    quantizer = plan[site]
    ratio = sqnr_text(plan, site)
    lines = [site, f"{quantizer.codec} {quantizer.bits} bit, {granularity_text(quantizer)}"]
    if ratio != "-":
        lines[1] += f", {ratio}" + ("" if ratio == "exact" else " dB")
    if quantizer.params:
        lines[1] += f"\n{parameters_text(quantizer)}"
    if quantizer.dynamic:
        lines.append("dynamic: levels of the row with the largest value")
    elif len(quantizer.scale) > 1:
        lines.append("levels of the median scale")
    return "\n".join(lines)


def _overview(plan: QuantPlan, sites: Sequence[str]) -> Any:
    """One line per kind of operand over all layers, front to back."""
    measured = [s for s in sites if plan.statistics[s].sqnr is not None]
    blocks = list(by_block(sites))
    place = {site: (n, block) for n, (block, names) in enumerate(by_block(sites).items()) for site in names}
    figure = _figure(max(7.0, 0.55 * len(blocks) + 3.0), 4.5)
    axes = figure.add_subplot()
    for role in dict.fromkeys(_kind(site, place[site][1]) for site in measured):
        mine = [s for s in measured if _kind(s, place[s][1]) == role]
        axes.plot(
            [place[s][0] for s in mine], [plan.statistics[s].sqnr for s in mine],
            marker="o", markersize=3, linewidth=0.8, label=role,
            linestyle="--" if role_of(mine[0]) == "weight" else "-",
        )  # fmt: skip
    axes.set_xticks(range(len(blocks)), blocks, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("signal to quantization noise, dB")
    axes.set_title(f"{_title(plan)}: noise that each quantizer adds by itself", fontsize=10)
    axes.grid(alpha=0.3)
    if measured:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _kind(site: str, block: str) -> str:
    """A site's name within its block; those outside of blocks are named in full."""
    return site.removeprefix(f"{block}.")
