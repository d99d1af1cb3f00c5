"""Which elements of a tensor share a quantizer's parameters.

Parameters are flat lists in a plan. Here they become arrays that broadcast against a *blocked* view of the
tensor: the tensor itself, but with its last axis split in groups for granularity "group".

==========  ====================  =======================  ==========================
granularity x                     blocked view             parameters
==========  ====================  =======================  ==========================
tensor      [B, T, K]             [B, T, K]                [1, 1, 1]
token       [B, T, K], axis -2    [B, T, K]                [1, T, 1]
channel     [N, K], axis 0        [N, K]                   [N, 1]
head        [B, H, T, D], axis -3 [B, H, T, D]             [1, H, 1, 1]
group       [B, T, K]             [B, T, K/g, g]           [1, 1, K/g, 1]
group       [N, K], axis 0        [N, K/g, g]              [N, K/g, 1]
==========  ====================  =======================  ==========================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer

Shape = tuple[int, ...]


def blocked_shape(site: SiteQuantizer, shape: Sequence[int]) -> Shape:
    """Shape of the blocked view of a tensor of `shape`; VitqError if the groups do not divide the last
    axis.
    """
    if site.granularity != "group":
        return tuple(shape)
    size = site.group_size
    if size is None or size < 1 or shape[-1] % size:
        raise VitqError(
            "the group size does not divide the channels",
            where="group_size",
            got=size,
            expected=f"a divisor of {shape[-1]}",
        )
    return (*shape[:-1], shape[-1] // size, size)


def parameter_shape(site: SiteQuantizer, shape: Sequence[int]) -> Shape:
    """Shape of the parameters that broadcasts against the blocked view of a tensor of `shape`."""
    result = [1] * len(blocked_shape(site, shape))
    if site.granularity == "group":
        result[-2] = blocked_shape(site, shape)[-2]
    if site.granularity != "tensor" and site.axis is not None:
        axis = site.axis % len(shape)
        result[axis] = shape[axis]
    return tuple(result)


def fit_shape(values: Any, site: SiteQuantizer, shape: Sequence[int]) -> Any:
    """A flat array or tensor of parameters in `parameter_shape`; VitqError if there are too few or too
    many.
    """
    target = parameter_shape(site, shape)
    count = 1
    for extent in target:
        count *= extent
    if len(values) != count:
        raise VitqError(
            f"a quantizer of granularity {site.granularity!r} does not fit the tensor",
            where=f"tensor of shape {tuple(shape)}",
            got=f"{len(values)} scales",
            expected=count,
        )
    return values.reshape(target)
