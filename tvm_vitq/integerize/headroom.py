"""Proofs that no int32 accumulator can overflow."""

from __future__ import annotations

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array

INT32_MAX = 2**31 - 1


def require(bound: float, site: str, what: str, fix: str) -> None:
    """Refuse a layer whose largest possible accumulator `bound` does not fit int32."""
    if bound > INT32_MAX:
        raise VitqError(
            f"the int32 accumulator of {what} could overflow",
            where=site,
            got=f"up to {bound:.4g}",
            expected=f"at most {INT32_MAX}",
            fix=fix,
        )


def linear_bound(weight: Array, bias: Array, code_min: int, code_max: int) -> float:
    """Largest ``|bias + sum_k x_k w_nk|`` over all codes x in code_min..code_max and all outputs n."""
    w = weight.astype(np.int64)
    positive, negative = np.maximum(w, 0).sum(1), np.minimum(w, 0).sum(1)
    high = bias.astype(np.float64) + code_max * positive + code_min * negative
    low = bias.astype(np.float64) + code_min * positive + code_max * negative
    return float(max(high.max(), -low.min()))
