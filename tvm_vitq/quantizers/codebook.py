"""What all non-uniform quantizers have in common: a sorted list of levels with thresholds between them."""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Array, Codec

GRID = 255
"""Default of ``params["grid"]``: what one is in units of the integer levels of activations, which are bytes."""

PROBABILITY_GRID = 2**15
"""The grid of attention probabilities: two byte planes, in which powers of two down to 2**-15 are exact."""

ZEROS = ("reserved", "implicit", "none")
"""``params["zero"]``: whether 0 takes one of the 2**bits codes (the default), is one level more than bits can
tell apart (as released code of several methods has it), or is no level at all."""


@dataclass(frozen=True)
class Book:
    """A quantizer of the unit interval.

    levels : float64 [M], ascending;  thresholds : float64 [M - 1], strictly ascending. The level of u is
    ``levels[i]`` with ``thresholds[i - 1] <= u < thresholds[i]``.
    """

    thresholds: Array
    levels: Array


class Codebook(Codec):
    """``x^ = scale * level(u) - shift`` with ``u = (x + shift) / scale``.

    A subclass gives the `book` of u; this class gives everything else. For deployment the levels are rounded to
    integers, ``value = rint(grid * level)``, and ``x^ = scale / grid * value - shift`` in the simulation as well,
    so that what is fitted is what runs. Levels that round to the same integer stay separate codes.

    Parameters in a plan: ``scale`` (one), ``params["grid"]`` (`GRID` or `PROBABILITY_GRID`), ``params["shift"]``
    (0) and those of the subclass.
    """

    @abstractmethod
    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        """Levels and thresholds in u; VitqError naming a parameter out of its range or a width that the method
        does not define.
        """

    def parameters(self, site: SiteQuantizer) -> dict[str, Array]:
        return {"scale": np.array(site.scale, np.float32)}

    def integers(self, site: SiteQuantizer) -> tuple[Array, Array]:
        """float64 thresholds [M - 1] in units of u, and int32 values [M]; ``x^ = scale / grid * value - shift``."""
        if len(site.scale) != 1:
            raise VitqError("a codebook quantizer has one scale", where=self.name, got=len(site.scale))
        return _integers(self, site.bits, json.dumps(site.params, sort_keys=True))

    def encode(self, x: Array, site: SiteQuantizer) -> Array:
        thresholds, _ = self.integers(site)
        return np.searchsorted(thresholds, self._unit(x, site), side="right").astype(np.int32)

    def decode(self, codes: Array, site: SiteQuantizer) -> Array:
        _, values = self.integers(site)
        step = site.scale[0] / site.params.get("grid", GRID)
        return (step * values[codes] - site.params.get("shift", 0.0)).astype(np.float32)

    def fake_quantize(self, x: Any, site: SiteQuantizer, parameters: dict[str, Any]) -> Any:
        import torch

        thresholds, values = self.integers(site)
        scale, shift = parameters["scale"], site.params.get("shift", 0.0)
        u = (x + shift) / scale
        levels = torch.from_numpy(values / site.params.get("grid", GRID)).to(u.dtype)
        edges = torch.from_numpy(thresholds).to(u.dtype)
        level = levels[torch.bucketize(u.detach(), edges, right=True)]
        if u.requires_grad:
            inside = u.clamp(float(levels[0]), float(levels[-1]))  # no gradient where a value is clipped
            level = inside + (level - inside).detach()
        return scale * level - shift

    def _unit(self, x: Array, site: SiteQuantizer) -> Array:
        shift = np.float32(site.params.get("shift", 0.0))
        return (np.asarray(x, np.float32) + shift) / np.float32(site.scale[0])


@functools.lru_cache(maxsize=1024)
def _integers(codec: Codebook, bits: int, params: str) -> tuple[Array, Array]:
    plain = json.loads(params)
    book = codec.book(bits, plain)
    values = np.rint(plain.get("grid", GRID) * book.levels).astype(np.int32)
    return book.thresholds, values


def parameter(codec: str, params: Mapping[str, Any], name: str, low: float, high: float, default: Any) -> Any:
    """``params[name]``, checked to be a number from low to high; VitqError otherwise."""
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise VitqError(
            f"parameter {name!r} of the {codec} quantizer is out of its range",
            where=f"params[{name!r}]",
            got=value,
            expected=f"a number from {low:g} to {high:g}",
        )
    return value


def zero_of(codec: str, params: Mapping[str, Any]) -> str:
    """``params["zero"]``, one of `ZEROS`."""
    value = params.get("zero", ZEROS[0])
    if value not in ZEROS:
        raise VitqError(
            f"unknown treatment of zero in the {codec} quantizer",
            where='params["zero"]',
            got=value,
            expected=", ".join(ZEROS),
        )
    return str(value)
