"""Integer constants of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.formats import Format
from tvm_vitq.integerize.activation import sigmoid_table
from tvm_vitq.integerize.codebook import codebook_probabilities, largest_total, probability_step
from tvm_vitq.integerize.headroom import INT32_MAX, require
from tvm_vitq.numerics import Array
from tvm_vitq.numerics_attention import EXP_BITS, SCORE_BITS, Probabilities, exp2_guard_bits
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import RowMaximum, codec_of
from tvm_vitq.quantizers.codebook import Codebook

ADDITIVE_MAX = 2**26
"""Limit of additive scores: as base-2 exponents +-2**14, beyond which a probability is 0 anyway."""

ROW_KEYS = 8192
"""Most keys of a row whose bytes may all be 255: kernels add them up in 32 lanes of 16 bits."""


@dataclass(frozen=True)
class AttentionConstants:
    """Operands of numerics_attention.int_attention; arrays are over the heads."""

    score_multiplier: Array
    multiplier: Array
    zero_q: Array
    zero_k: Array
    zero_v: Array
    probabilities: Probabilities


def _largest(f: Format) -> float:
    """Largest distance of a code from its zero point."""
    return float(np.maximum(f.qmax - f.zero_point, f.zero_point - f.qmin).max())


def _per_head(value: Array, heads: int, dtype: type) -> Array:
    return np.broadcast_to(np.asarray(value), (heads,)).astype(dtype)


def site_probabilities(
    kind: str, quantizer: SiteQuantizer, keys: int, site: str
) -> tuple[Probabilities, float]:
    """The integer form of a plan's quantizer of probabilities, and what one unit of its p is worth (1 if the
    result is divided by the row's sum).
    """
    codec = codec_of(quantizer)
    if isinstance(codec, Codebook):
        _require_rows(kind, keys, "by a codebook", site, "ask for the uniform quantizer at this site")
        return codebook_probabilities(codec, quantizer, keys, site), probability_step(codec, quantizer)
    step = None if isinstance(codec, RowMaximum) else float(quantizer.scale[0])
    return probabilities(kind, quantizer.bits, step, keys, site), step or 1.0


def probabilities(kind: str, bits: int, scale: float | None, keys: int, site: str) -> Probabilities:
    """Quantizer of probabilities with step `scale`, ``0 <= code <= 2**bits - 1``; None: relative to
    the largest probability of each row.
    """
    qmax = 2**bits - 1
    if scale is None:
        _require_rows(kind, keys, "relative to its row", site, 'ask for granularity "tensor" of this site')
        return Probabilities("row_maximum", qmax, shift=EXP_BITS + 16 - bits)
    if kind == "sigmoid":
        return Probabilities("sigmoid", qmax, table=sigmoid_table(scale, qmax))
    if kind != "softmax":
        raise VitqError("unknown kind of attention", where=site, got=kind, expected="softmax or sigmoid")
    shift = math.floor(math.log2(INT32_MAX / (1 / scale + 0.5)))
    guard = exp2_guard_bits(keys)
    if guard < 0:
        raise VitqError(
            "too many keys for the integer softmax", where=site, got=keys, expected="at most 65535 tokens"
        )
    return Probabilities("softmax", qmax, round(2**shift / scale), shift, guard)


def _require_rows(kind: str, keys: int, how: str, site: str, fix: str) -> None:
    """Softmax, and as many keys as the kernel's sums of a row hold."""
    if kind != "softmax":
        raise VitqError(f"only softmax can be quantized {how}", where=site, got=kind, fix=fix)
    if keys > ROW_KEYS:
        raise VitqError(
            f"too many keys for softmax quantized {how}",
            where=site,
            got=keys,
            expected=f"at most {ROW_KEYS} tokens",
            fix=fix,
        )


def attention_constants(
    q: Format,
    k: Format,
    v: Format,
    out: Format,
    probs: Probabilities,
    probs_scale: float,
    *,
    heads: int,
    depth: int,
    keys: int,
    scale: float,
    site: str,
) -> AttentionConstants:
    """``score_multiplier = s_q s_k scale log2(e) 2**SCORE_BITS``, ``multiplier = s_p s_v / s_out``, per
    head.

    Raises
    ------
    VitqError : an operand counts from an offset, as codebooks with a shift do: nothing in attention's sums
        takes it; sums that int32 does not hold.
    """
    for role, operand in (("q", q), ("k", k), ("v", v)):
        if operand.offset:
            raise VitqError(
                "an operand of attention cannot have levels that count from an offset",
                where=f"{site}.{role}",
                got=operand.offset,
                fix="use a uniform quantizer there, or levels whose shift is 0",
            )
    require(_largest(q) * _largest(k) * depth, site, "q @ k", "use fewer bits or fewer channels per head")
    if probs.kind == "codebook":
        total, fix = largest_total(probs, keys), "use a smaller grid, fewer bits or fewer tokens"
        require(total * max(_largest(v), 128), site, "probabilities @ v", fix)
    else:
        require(probs.qmax * _largest(v) * keys, site, "probabilities @ v", "use fewer bits or fewer tokens")
    score = q.scale * k.scale * scale * math.log2(math.e) * 2.0**SCORE_BITS
    return AttentionConstants(
        _per_head(score, heads, np.float32),
        _per_head(probs_scale * v.scale / out.scale, heads, np.float32),
        _per_head(q.zero_point, heads, np.int32),
        _per_head(k.zero_point, heads, np.int32),
        _per_head(v.zero_point, heads, np.int32),
        probs,
    )


def additive_scores(value: Array) -> Array:
    """Additive attention term in base-2 fixed point; -inf becomes the most negative score."""
    finite = np.nan_to_num(value.astype(np.float64), posinf=1e9, neginf=-1e9)
    scores = np.rint(finite * math.log2(math.e) * 2**SCORE_BITS)
    return np.clip(scores, -ADDITIVE_MAX, ADDITIVE_MAX).astype(np.int32)
