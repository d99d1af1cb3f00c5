"""Scales in groups that are whole multiples: of a weight's, each times that of the inputs which it meets.

A group g of input channels enters output channel n with the scale ``s_w[n, g] * s_x[g]``. Where all of these
are whole multiples ``count[n, g] * step[n]`` of a step per output channel, a sum of integers is the layer,
and nothing is rounded inside it. The plan says so in the weight's ``params``: "step", a number per output
channel, and "multiples", a whole number for each of the weight's scales, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Array

MOST = 2**15 - 1
"""Largest multiple: kernels keep 16 bits of them."""

TOLERANCE = 1e-5
"""Relative, of the products of scales: these are written as float32."""


@dataclass(frozen=True)
class WholeScales:
    """``s_w[n, g] * s_x[g] = count[n, g] * step[n]``;  step : float64 [N];  count : int64 [N, G]."""

    step: Array
    count: Array


def multiples_params(step: Array, count: Array) -> dict[str, Any]:
    """The entries of a weight's ``params``."""
    return {"step": step.tolist(), "multiples": count.ravel().tolist()}


def whole_scales(
    weight: SiteQuantizer, inputs: Array, granularity: str, rows: int, where: str
) -> WholeScales | None:
    """What the quantizer of a weight with `rows` output channels says about multiples, None if nothing;
    VitqError naming `where` if that does not fit itself, or the scales of the inputs and their granularity.
    """
    if not {"step", "multiples"} & set(weight.params):
        return None
    groups = len(weight.scale) // rows
    step = _numbers(weight.params, "step", rows, float, where)
    count = _numbers(weight.params, "multiples", rows * groups, int, where).reshape(rows, groups)
    inputs = np.atleast_1d(inputs).astype(np.float64)
    if weight.granularity != "group" or granularity not in ("tensor", "group") or groups % len(inputs):
        raise VitqError(
            "multiples belong to weights in groups, behind inputs with scales for whole groups of those",
            where=where,
            got=f"{groups} groups, granularity {weight.granularity!r}; the input has {len(inputs)} scales, "
            f"granularity {granularity!r}",
            fix=_AGAIN,
        )
    product = np.asarray(weight.scale, np.float64).reshape(rows, groups)
    product = product * np.repeat(inputs, groups // len(inputs))
    whole = count * step[:, None]
    off = np.abs(product - whole) > TOLERANCE * whole
    if off.any():
        n, g = (int(v[0]) for v in np.nonzero(off))
        raise VitqError(
            "the scales of weight and input are not the multiples that the plan names",
            where=f"{where}, output channel {n}, group {g}",
            got=f"{product[n, g]:.7g}",
            expected=f"{count[n, g]} times the step {step[n]:.7g}, {whole[n, g]:.7g}",
            fix=_AGAIN,
        )
    return WholeScales(step, count)


_AGAIN = 'quantize the model anew, or delete "step" and "multiples" from the params of this site'


def _numbers(params: Mapping[str, Any], name: str, length: int, kind: type, where: str) -> Array:
    values = params.get(name)
    ok = isinstance(values, list) and len(values) == length and all(_fits(v, kind) for v in values)
    if not ok:
        raise VitqError(
            "malformed multiples of scales",
            where=f"{where}: params[{name!r}]",
            got=f"{len(values)} entries" if isinstance(values, list) else values,
            expected=f"a list of {length} "
            + ("positive numbers" if kind is float else f"whole numbers from 1 to {MOST}"),
            fix=_AGAIN,
        )
    return np.array(values, np.float64 if kind is float else np.int64)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return False
    return 1 <= value <= MOST if kind is int else 0 < value and math.isfinite(value)
