"""What all non-uniform quantizers have in common: a sorted list of levels with thresholds between them."""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.plan import SiteQuantizer, check_bits
from tvm_vitq.quantizers.base import Array, Codec
from tvm_vitq.quantizers.step_function import straight_through

GRID = 255
"""Default of ``params["grid"]``: what one is in units of the integer levels of activations, which are
bytes."""

PROBABILITY_GRID = 2**15
"""The grid of attention probabilities: two byte planes, in which powers of two down to 2**-15 are exact."""

GELU_SHIFT = 0.16997124
"""GELU is nowhere smaller than minus this."""

ZEROS = ("reserved", "implicit", "none")
"""``params["zero"]``: whether 0 takes one of the 2**bits codes (the default), is one level more than bits can
tell apart (as released code of several methods has it), or is no level at all."""


@dataclass(frozen=True)
class Book:
    """A quantizer of the unit interval.

    levels : float64 [M], ascending, equal ones allowed;  thresholds : float64 [M - 1], strictly ascending.
    The level of u is ``levels[i]`` with ``thresholds[i - 1] <= u < thresholds[i]``: ties go to the larger
    level.
    """

    thresholds: Array
    levels: Array


class Codebook(Codec):
    """``x^ = scale * level(u) - shift`` with ``u = (x + shift) / scale``.

    A subclass gives the `book` of u; this class gives everything else. Codes count the levels upwards, which
    for logarithms is the reverse of the exponent. For deployment the levels are rounded to integers,
    ``value = rint(grid * level)``, and ``x^ = scale / grid * value - shift`` in the simulation as well, so
    that what is fitted is what runs. Levels that round to the same integer stay separate codes.

    Parameters in a plan: ``scale`` (one), ``params["grid"]`` (`GRID` or `PROBABILITY_GRID`),
    ``params["shift"]`` and those of the subclass, `own`. With ``dynamic`` there is no scale: as with
    `RowMaximum`, u is relative to the largest of its row (last axis) and x^ is divided by its row's sum;
    `decode` needs whole rows then.
    """

    own: ClassVar[tuple[str, ...]] = ()
    default_shift: ClassVar[float] = 0.0

    @abstractmethod
    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        """Levels and thresholds in u; VitqError naming a parameter out of its range or a width that the
        method does not define.
        """

    def parameters(self, site: SiteQuantizer) -> dict[str, Array]:
        return {} if site.dynamic else {"scale": np.array(site.scale, np.float32)}

    def integers(self, site: SiteQuantizer) -> tuple[Array, Array]:
        """float64 thresholds [M - 1] of u, int32 values [M]; ``x^ = scale / grid * value - shift``."""
        wanted = 0 if site.dynamic else 1
        if len(site.scale) != wanted:
            raise VitqError(
                "a codebook quantizer has one scale, or none where it is relative to the largest of a row",
                where=self.name,
                got=f"{len(site.scale)} scales",
                expected=wanted,
            )
        self.grid_and_shift(site)
        return _integers(self, site.bits, json.dumps(site.params, sort_keys=True))

    def grid_and_shift(self, site: SiteQuantizer) -> tuple[float, float]:
        """(grid, shift) of a site, with the defaults of the codec."""
        default = 0.0 if site.dynamic else self.default_shift
        grid = parameter(self.name, site.params, "grid", 1, 2**16, GRID)
        shift = parameter(self.name, site.params, "shift", -1e6, 1e6, default)
        if site.dynamic and shift:
            raise VitqError(
                "values relative to the largest of their row cannot be shifted",
                where=f"params['shift'] of the {self.name} quantizer",
                got=shift,
            )
        return grid, shift

    def with_step(self, site: SiteQuantizer, step: float) -> SiteQuantizer:
        """The quantizer nearest to that of `site` whose values count in units of `step`."""
        return replace(site, scale=[step * self.grid_and_shift(site)[0]])

    def table(self, site: SiteQuantizer, scale: float | Array) -> tuple[Array, Array]:
        """The step function of x with this scale: float32 edges [..., M - 1] and results [..., M].

        Edges are rounded up, so that float32 numbers compare with them exactly as with the float64 edges
        ``scale * threshold - shift``. Scales may be an array [...].
        """
        thresholds, values = self.integers(site)
        grid, shift = self.grid_and_shift(site)
        scale = np.asarray(scale, np.float32).astype(np.float64)
        exact = np.multiply.outer(scale, thresholds) - shift
        edges = exact.astype(np.float32)
        edges = np.where(edges < exact, np.nextafter(edges, np.float32(np.inf)), edges)
        return edges, (np.multiply.outer(scale / grid, values) - shift).astype(np.float32)

    def encode(self, x: Array, site: SiteQuantizer) -> Array:
        x = np.asarray(x, np.float32)
        if site.dynamic:
            x = x / x.max(-1, keepdims=True)
        edges, _ = self.table(site, site.scale[0] if site.scale else 1.0)
        return np.searchsorted(edges, x, side="right").astype(np.int32)

    def decode(self, codes: Array, site: SiteQuantizer) -> Array:
        _, results = self.table(site, site.scale[0] if site.scale else 1.0)
        x = results[codes]
        return x / x.sum(-1, keepdims=True) if site.dynamic else x

    def fake_quantize(self, x: Any, site: SiteQuantizer, parameters: dict[str, Any]) -> Any:
        _, shift = self.grid_and_shift(site)
        if site.dynamic:
            levels = straight_through(x / x.amax(-1, keepdim=True), None, *self.table(site, 1.0), shift)
            return levels / levels.sum(-1, keepdim=True)
        scale = parameters["scale"]
        return straight_through(x, scale, *self.table(site, scale.item()), shift)


@functools.lru_cache(maxsize=1024)
def _integers(codec: Codebook, bits: int, params: str) -> tuple[Array, Array]:
    plain = json.loads(params)
    known = ("grid", "shift", *codec.own)
    for name in plain:
        if name not in known:
            raise VitqError(
                f"the {codec.name} quantizer has no such parameter",
                where=f"params[{name!r}]",
                expected=nearest(name, known) or ", ".join(known),
            )
    book = codec.book(check_bits(bits, codec.name), plain)
    values = np.rint(plain.get("grid", GRID) * book.levels).astype(np.int32)
    return book.thresholds, values


def descending(levels: Array, edges: Array, zero: str) -> Book:
    """The book of a logarithm: 2**bits levels in descending order, each with its lower edge, before `zero`
    takes the place of the last one or is added to them.
    """
    count = len(levels) - (zero == "reserved")
    levels, edges = levels[:count][::-1], edges[:count][::-1]
    return Book(edges[1:], levels) if zero == "none" else Book(edges, np.concatenate([[0.0], levels]))


def parameter(
    codec: str,
    params: Mapping[str, Any],
    name: str,
    low: float,
    high: float,
    default: Any,
    whole: bool = False,
) -> Any:
    """``params[name]``, checked to be a number, or a whole number, from low to high; VitqError otherwise."""
    value = params.get(name, default)
    allowed = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        raise VitqError(
            f"parameter {name!r} of the {codec} quantizer is out of its range",
            where=f"params[{name!r}]",
            got=value,
            expected=f"a {'whole ' if whole else ''}number from {low:g} to {high:g}",
        )
    return value


def choice(codec: str, params: Mapping[str, Any], name: str, options: Iterable[str]) -> str:
    """``params[name]``, one of `options`, of which the first is the default; VitqError otherwise."""
    options = tuple(options)
    value = params.get(name, options[0])
    if value not in options:
        raise VitqError(
            f"unknown choice of {name!r} in the {codec} quantizer",
            where=f"params[{name!r}]",
            got=value,
            expected=", ".join(options),
        )
    return str(value)


def zero_of(codec: str, params: Mapping[str, Any]) -> str:
    """``params["zero"]``, one of `ZEROS`."""
    return choice(codec, params, "zero", ZEROS)
