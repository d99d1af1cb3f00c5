"""What is asked of each site before anything is fitted: the grammar of `bits`, granularities and
overrides.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.plan import GRANULARITIES, check_bits

ROLES = ("input", "weight", "q", "k", "v", "probs")
IMAGE_BITS = 8


@dataclass(frozen=True)
class SiteSpec:
    """What one site asks for; the recipe fits the numbers."""

    bits: int
    granularity: str = "tensor"
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits")
        if self.granularity not in GRANULARITIES:
            raise VitqError(
                "unknown granularity",
                where="granularity",
                got=self.granularity,
                expected=", ".join(GRANULARITIES),
            )
        if self.group_size is not None and (
            isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1
        ):
            raise VitqError(
                "malformed group_size", where="group_size", got=self.group_size, expected="1 or more"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise VitqError("group_size belongs to granularity 'group' and only to it", got=self.group_size)


@dataclass(frozen=True)
class Granularities:
    """Default granularity by kind of operand; a group size makes it "group"."""

    weight: str = "channel"
    input: str = "tensor"
    heads: str = "tensor"
    probs: str = "token"
    weight_group: int | None = None
    input_group: int | None = None


ALLOWED = {
    "input": ("tensor", "token", "group"),
    "weight": ("tensor", "channel", "group"),
    "q": ("tensor", "head"),
    "k": ("tensor", "head"),
    "v": ("tensor", "head"),
    "probs": ("tensor", "token"),
}
"""Granularities that an integer matmul can apply at each operand. Per-channel inputs are reached by folding
their scales into the layer in front, which the recipe decides."""


WHY_NOT = {
    "input": "scales per channel are reached by folding them into the LayerNorm in front, which recipes do",
    "weight": "weights have scales per output channel, or per group of input channels",
} | dict.fromkeys("qkv", "attention multiplies heads as a whole: give it more bits instead")
"""Why an operand has no other granularities than `ALLOWED`, by role."""

THE_RECIPES = {
    "codec": "take a recipe that has it there, see docs/recipes.md; logarithms suit probabilities and GELU",
    "scale": "give bits or granularity; scales are fitted",
    "zero_point": "give bits or granularity; zero points are fitted",
    "params": "give the recipe other parameters, as recipe=RepQViT(zero='implicit')",
}
"""What a site has that overrides cannot change, with what to do instead."""


def parse_bits(bits: str) -> tuple[int, int]:
    """Widths of weights and activations in "w8a8", "w4a4", "w3a8", ...; VitqError for anything else."""
    found = re.fullmatch(r"w(\d+)a(\d+)", bits) if isinstance(bits, str) else None
    if found is None:
        raise VitqError("malformed bits", where="bits", got=bits, expected='text such as "w8a8" or "w4a8"')
    weight, activation = int(found[1]), int(found[2])
    return check_bits(weight, f"weights in bits={bits!r}"), check_bits(
        activation, f"activations in bits={bits!r}"
    )


def role_of(site: str) -> str:
    """Last part of a site name: which operand of its matmul it is."""
    return site.rpartition(".")[2]


def layer_of(site: str) -> str:
    """A site name without its operand."""
    return site.rpartition(".")[0]


def resolve_specs(
    sites: list[str],
    bits: str,
    *,
    image_sites: frozenset[str] = frozenset(),
    granularities: Granularities | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, SiteSpec]:
    """The spec of every site: defaults from `bits` and `granularities`, then `overrides` in order, the last
    one wins.

    Parameters
    ----------
    sites : all site names of the model.
    image_sites : inputs that see the image itself; they keep 8 bits unless an override says otherwise.
    overrides : pattern to ``{"bits": 8, "granularity": "group", "group_size": 32}`` (any subset) or to a bit
        width. A pattern is a site or layer name with shell wildcards ("blocks.*.mlp.fc2", "*.input"), or a
        regular expression after "re:" that must match the whole name. It must match something.
    """
    weight_bits, activation_bits = parse_bits(bits)
    asked = granularities or Granularities()
    specs = {}
    for site in sites:
        role = role_of(site)
        if role == "weight":
            spec = _spec(weight_bits, asked.weight, asked.weight_group)
        elif role == "input":
            spec = _spec(activation_bits, asked.input, asked.input_group)
        else:
            spec = _spec(activation_bits, asked.probs if role == "probs" else asked.heads, None)
        specs[site] = replace(spec, bits=IMAGE_BITS) if site in image_sites else spec
    for pattern, change in (overrides or {}).items():
        matched = [site for site in sites if matches(pattern, site, f"overrides[{pattern!r}]")]
        if not matched:
            layers = {layer_of(site) for site in sites}
            raise VitqError(
                "an override matches no site of the model",
                where=f"overrides[{pattern!r}]",
                expected=nearest(pattern, [*sites, *layers])
                or 'a name or pattern such as "blocks.*.mlp.fc2.input"',
            )
        for site in matched:
            specs[site] = _changed(specs[site], change, pattern, site)
    for site, spec in specs.items():
        role = role_of(site)
        if spec.granularity not in ALLOWED[role]:
            raise VitqError(
                "this operand cannot have this granularity",
                where=site,
                got=spec.granularity,
                expected=", ".join(ALLOWED[role]),
                fix=WHY_NOT.get(role),
            )
    return specs


def _spec(bits: int, granularity: str, group: int | None) -> SiteSpec:
    return SiteSpec(bits, "group", group) if group is not None else SiteSpec(bits, granularity)


def matches(pattern: str, site: str, where: str) -> bool:
    """Whether a site, or the layer it belongs to, is named by a pattern: shell wildcards, or a regular
    expression after "re:" that must match the whole name; VitqError naming `where` if that is malformed.
    """
    for name in (site, layer_of(site)):
        if pattern.startswith("re:"):
            try:
                if re.fullmatch(pattern[3:], name):
                    return True
            except re.error as error:
                raise VitqError(
                    "malformed regular expression", where=where, got=f"{pattern[3:]}: {error}"
                ) from error
        elif fnmatch.fnmatchcase(name, pattern):
            return True
    return False


def _changed(spec: SiteSpec, change: Any, pattern: str, site: str) -> SiteSpec:
    where = f"overrides[{pattern!r}]"
    if isinstance(change, int):
        change = {"bits": change}
    if not isinstance(change, Mapping):
        raise VitqError(
            "malformed override", where=where, got=change, expected='a bit width or {"bits": 8, ...}'
        )
    known = ("bits", "granularity", "group_size")
    for key in change:
        if key in THE_RECIPES:
            raise VitqError(
                f"an override cannot choose the {key}: the recipe does, by what an operand is",
                where=f"{where}: {key}, site {site}",
                got=change[key],
                expected=", ".join(known),
                fix=THE_RECIPES[key],
            )
        if key not in known:
            raise VitqError(
                "unknown key", where=f"{where}: {key}", expected=nearest(str(key), known) or ", ".join(known)
            )
    fields = dict(change)
    if "bits" in fields:
        check_bits(fields["bits"], f"{where}, site {site}")
    if "granularity" in fields and fields["granularity"] != "group":
        fields.setdefault("group_size", None)
    if "group_size" in fields and fields["group_size"] is not None:
        fields.setdefault("granularity", "group")
    return replace(spec, **fields)
