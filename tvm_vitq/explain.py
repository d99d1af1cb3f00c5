"""Quantizers in words and numbers: what `vitq inspect` says about a site."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.plan import QuantPlan, SiteQuantizer
from tvm_vitq.quantizers import codec_of
from tvm_vitq.quantizers.base import Array
from tvm_vitq.quantizers.codebook import Codebook
from tvm_vitq.site_rules import layer_of, matches


def levels(site: SiteQuantizer, largest: float = 1.0) -> Array:
    """The values that a quantizer can give, float64 ascending; where it has several scales, those of the
    median one.

    Parameters
    ----------
    largest : of a row, which is the scale of dynamic quantizers.
    """
    middle = int(np.argsort(site.scale)[len(site.scale) // 2]) if site.scale else 0
    codec = codec_of(site)
    if isinstance(codec, Codebook):
        _, values = codec.integers(site)
        grid, shift = codec.grid_and_shift(site)
        scale = site.scale[middle] if site.scale else largest
        return np.unique(scale / grid * values - shift)
    codes = np.arange(site.qmin, site.qmax + 1, dtype=np.float64)
    if not site.scale:
        return codes * (largest / site.qmax)
    return (codes - site.zero_point[middle]) * site.scale[middle]


def parameters_text(site: SiteQuantizer) -> str:
    """The codec's own numbers: "base=1.41 zero=reserved"; lists by their length."""
    return " ".join(f"{name}={_short(value)}" for name, value in sorted(site.params.items())) or "-"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{len(value)}]"
    return format(value, ".4g") if isinstance(value, float) else str(value)


def granularity_text(site: SiteQuantizer) -> str:
    """ "channel x384": what shares a scale, and how many scales there are."""
    name = f"group of {site.group_size}" if site.granularity == "group" else site.granularity
    return name + (f" x{len(site.scale)}" if len(site.scale) > 1 else "")


def sqnr_text(plan: QuantPlan, site: str) -> str:
    """Signal-to-noise ratio in dB as calibration measured it; "exact" without noise, "-" if not measured."""
    if site not in plan.statistics:
        return "-"
    ratio = plan.statistics[site].sqnr
    return "exact" if ratio is None else f"{ratio:.1f}"


def chosen_sites(plan: QuantPlan, pattern: str | None) -> list[str]:
    """Names of the plan's quantizers whose site or layer matches `pattern` (see `site_rules.matches`); None:
    all. An alias stands for the site it shares. VitqError with the nearest names if nothing matches.
    """
    if pattern is None:
        return list(plan.sites)
    named = [*plan.sites, *plan.aliases]
    wanted = {plan.aliases.get(name, name) for name in named if matches(pattern, name, "site")}
    if not wanted:
        known = [*named, *dict.fromkeys(layer_of(name) for name in named)]
        raise VitqError(
            "no site of the plan matches",
            where="site",
            got=pattern,
            expected=nearest(pattern, known) or 'a name or pattern such as "blocks.0.*.weight"',
        )
    return [name for name in plan.sites if name in wanted]


def block_of(site: str) -> str:
    """The part of the model that a site is shown with: its path up to the last number, "blocks.3", else
    its first component.
    """
    numbered = re.match(r"(.*\.\d+|\d+)\.", site)
    return numbered[1] if numbered else site.split(".")[0]


def by_block(sites: Sequence[str]) -> dict[str, list[str]]:
    """Sites by their block, in order; lone ones in front of and behind the blocks share "model"."""
    found: dict[str, list[str]] = {}
    for site in sites:
        block = block_of(site)
        found.setdefault(block if re.search(r"(^|\.)\d+$", block) else "model", []).append(site)
    return found
