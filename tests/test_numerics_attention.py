"""Integer attention against its float64 definition, within the bounds of docs/numerics.md."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tvm_vitq import numerics as nm
from tvm_vitq import numerics_attention as na
from tvm_vitq.errors import VitqError
from tvm_vitq.formats import codes_format
from tvm_vitq.integerize.activation import sigmoid_table
from tvm_vitq.integerize.attention import (
    additive_scores,
    attention_constants,
    probabilities,
    site_probabilities,
)
from tvm_vitq.integerize.codebook import largest_total
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import codec_of

INT8 = nm.Output("int8", -128, 127)
LOG2_BOUND = 0.7
"""Of int_log2, in its units."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_coefficients_are_what_the_fits_find() -> None:
    coefficients, error = tool("fit_exp2").fit()
    assert coefficients == na.EXP2_COEFFICIENTS and error < 1.27e-4
    coefficients, error = tool("fit_log2").fit()
    assert coefficients == na.LOG2_COEFFICIENTS and error < 2e-5


@pytest.mark.parametrize("guard", [0, 3, 8])
def test_exp2_is_within_its_bound(guard: int) -> None:
    d = np.concatenate([np.arange(2**18), rng().integers(0, 2**31 - 1, 10_000)]).astype(np.int32)
    exact = 2.0 ** (na.EXP_BITS + guard - d / 2**na.SCORE_BITS)
    error = na.int_exp2(d, guard) - exact
    assert np.all(error <= 1.27e-4 * exact) and np.all(error >= -1.27e-4 * exact - 1)
    assert na.int_exp2(np.zeros(1, np.int32), guard) == 2 ** (na.EXP_BITS + guard)


@pytest.mark.parametrize("terms", [1, 2, 49, 50, 197, 255, 256, 1370, 4096, 32767, 65535])
def test_guard_bits_keep_the_sum_in_int32(terms: int) -> None:
    guard = na.exp2_guard_bits(terms)
    assert 0 <= guard <= 8 and terms * 2 ** (na.EXP_BITS + guard) <= 2**31 - 1


def softmax_bound(bits: int, scale: float, terms: int, probs: na.Probabilities) -> float:
    """Error beyond half a code, in codes: cubic, cut-off exponentials, cut-off sum and integer reciprocal."""
    steps = min(1 / scale, 2**bits)
    return steps * (0.7e-4 + 2 * 2.0**-na.EXP_BITS + terms * 2.0 ** -(na.EXP_BITS + probs.guard)) + 2.0 ** (
        na.EXP_BITS - probs.shift
    )


@pytest.mark.parametrize("tokens", [1, 2, 49, 197, 577, 1370])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_softmax_is_within_its_bound(tokens: int, bits: int) -> None:
    scale = 1 / (2**bits - 1)
    probs = probabilities("softmax", bits, scale, tokens, "attn")
    for deviation in (0.0, 0.1, 1.0, 6.0, 1000.0):
        t = np.rint(rng(tokens).normal(0, deviation, (8, tokens)) * 2**na.SCORE_BITS).astype(np.int32)
        e = 2.0 ** ((t - t.max(-1, keepdims=True)) / 2**na.SCORE_BITS)
        exact = e / e.sum(-1, keepdims=True) / scale
        excess = np.abs(na.int_probabilities(t, probs) - exact).max() - 0.5
        assert excess <= softmax_bound(bits, scale, tokens, probs)


@pytest.mark.parametrize("tokens", [1, 2, 49, 197, 1370, 8192])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_row_maximum_is_within_its_bound(tokens: int, bits: int) -> None:
    """Half a code, and the errors of the cubic and of its EXP_BITS times the largest code."""
    probs = probabilities("softmax", bits, None, tokens, "attn")
    assert probs.factor < 2**16 and probs.factor * 2**na.EXP_BITS + 2 ** (probs.shift - 1) < 2**31
    for deviation in (0.0, 0.1, 1.0, 6.0, 1000.0):
        t = np.rint(rng(tokens).normal(0, deviation, (8, tokens)) * 2**na.SCORE_BITS).astype(np.int32)
        exact = (2**bits - 1) * 2.0 ** ((t - t.max(-1, keepdims=True)) / 2**na.SCORE_BITS)
        p = na.int_probabilities(t, probs)
        assert p.max(-1).tolist() == [2**bits - 1] * 8
        assert np.abs(p - exact).max() <= 0.5 + (2**bits - 1) * (1.3e-4 + 2.0**-na.EXP_BITS)


def test_row_maximum_refuses_what_its_sums_do_not_hold() -> None:
    with pytest.raises(VitqError, match="too many keys"):
        probabilities("softmax", 8, None, 8193, "attn")
    with pytest.raises(VitqError, match="softmax"):
        probabilities("sigmoid", 8, None, 4, "attn")


def test_softmax_bound_is_small_for_common_numbers_of_tokens() -> None:
    for tokens, limit in ((49, 0.05), (197, 0.05), (577, 0.12), (1370, 0.4)):
        probs = probabilities("softmax", 8, 1 / 255, tokens, "attn")
        assert softmax_bound(8, 1 / 255, tokens, probs) < limit


def test_softmax_of_equal_scores_is_uniform() -> None:
    for tokens in (1, 3, 50, 197, 1370):
        probs = probabilities("softmax", 8, 1 / 255, tokens, "attn")
        p = na.int_probabilities(np.full((1, tokens), -12345, np.int32), probs)
        assert np.all(np.abs(p - 255 / tokens) <= 0.51)


def test_softmax_of_huge_scores_is_one_hot() -> None:
    probs = probabilities("softmax", 8, 1 / 255, 3, "attn")
    t = np.array([[nm.WIDE_MAX, -nm.WIDE_MAX, 0]], np.int32)
    assert na.int_probabilities(t, probs).tolist() == [[255, 0, 0]]


def test_softmax_with_a_narrow_range_clips() -> None:
    probs = probabilities("softmax", 4, 0.25 / 15, 4, "attn")
    p = na.int_probabilities(np.array([[0, -100 << 12, -100 << 12, -100 << 12]], np.int32), probs)
    assert p.tolist() == [[15, 0, 0, 0]]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_softmax_product_fits_int32(bits: int) -> None:
    for scale in (1 / (2**bits - 1), 0.3 / (2**bits - 1), 2.0**-bits, 1e-4):
        probs = probabilities("softmax", bits, scale, 197, "attn")
        assert probs.numerator + 2 ** (probs.shift - 1) <= 2**31 - 1
        assert abs(probs.numerator / 2**probs.shift * scale - 1) < 2.0**-probs.shift
        for t in (np.zeros((1, 1), np.int32), np.array([[0, -(2**26)]], np.int32)):
            assert na.int_probabilities(t, probs)[0, 0] == min(
                round(1 / scale / (1 + 0 * t[0, 0])), probs.qmax
            )


def test_masked_keys_get_no_probability() -> None:
    mask = additive_scores(np.array([0.0, -np.inf, -100.0, -1e9], np.float32))
    probs = probabilities("softmax", 8, 1 / 255, 4, "attn")
    scores = np.array([[0, 4096 * 30, 4096 * 30, 0]], np.int32)
    assert na.int_probabilities(scores + mask, probs).tolist() == [[255, 0, 0, 0]]
    everything = additive_scores(np.full((1, 4), -np.inf, np.float32))
    assert na.int_probabilities(everything, probs).tolist() == [[64, 64, 64, 64]]


def test_sigmoid_is_within_its_bound() -> None:
    probs = probabilities("sigmoid", 8, 1 / 255, 4, "attn")
    t = np.concatenate([np.arange(-(2**17), 2**17, 3), [-(2**26), 2**26]]).astype(np.int32)
    exact = 255 / (1 + np.exp(np.clip(-t / 2**na.SCORE_BITS * math.log(2), -700, 700)))
    bound = 0.5 + 255 * (math.log(2) / 4 * 2.0**-10 + 2.0**-16)
    assert np.abs(na.int_probabilities(t, probs) - exact).max() <= bound
    assert len(sigmoid_table(1 / 255, 255)) == 2**na.SIGMOID_BITS


def test_log2_is_within_its_bound() -> None:
    """Half a unit, 1.9e-5 of the cubic, and two cuts of 2**-16."""
    powers = 2 ** np.arange(31)
    x = np.concatenate(
        [powers[15] + np.arange(2**15), rng().integers(1, 2**31, 100_000), powers, powers[1:] - 1]
    )
    error = na.int_log2(x.astype(np.int32)) - 2**na.SCORE_BITS * np.log2(x)
    assert np.abs(error).max() <= LOG2_BOUND
    assert na.int_log2(powers.astype(np.int32)).tolist() == [n << na.SCORE_BITS for n in range(31)]


def book_of(
    codec: str,
    bits: int,
    keys: int,
    relative: bool = False,
    scale: float = 1.0,
    grid: int = 2**15,
    **params: Any,
) -> tuple[na.Probabilities, SiteQuantizer]:
    params["grid"] = grid
    if relative:
        site = SiteQuantizer(bits, [], [], codec, granularity="token", axis=-2, dynamic=True, params=params)
    else:
        site = SiteQuantizer(bits, [scale], [0], codec, params=params)
    return site_probabilities("softmax", site, keys, "attn.probs")[0], site


@pytest.mark.parametrize("codec", ["log2", "log_sqrt2", "shift_uniform_log2", "twin_uniform", "adalog"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codebook_chooses_the_level_of_the_real_quantizer(codec: str, relative: bool, bits: int) -> None:
    """But for distances from a threshold within the bound of y, and for probabilities below 2**-16."""
    for tokens, scale in ((1, 1.0), (2, 0.8), (49, 0.3), (197, 1.0), (1370, 0.1)):
        scale = 1.0 if relative else scale
        probs, site = book_of(codec, bits, tokens, relative, scale)
        thresholds, values = codec_of(site).integers(site)
        cuts = tokens * 2.0 ** -(na.EXP_BITS + probs.guard)
        bound = 0.0 if relative else LOG2_BOUND + 2**na.SCORE_BITS / math.log(2) * (1.3e-4 + cuts)
        for deviation in (0.0, 1.0, 3.0, 100.0):
            t = np.rint(rng(tokens).normal(0, deviation, (8, tokens)) * 2**na.SCORE_BITS).astype(np.int32)
            e = 2.0 ** ((t - t.max(-1, keepdims=True)) / 2**na.SCORE_BITS)
            p = e if relative else e / e.sum(-1, keepdims=True)
            want = values[np.searchsorted(thresholds * scale, p, side="right")]
            got = na.int_probabilities(t, probs)
            with np.errstate(divide="ignore"):
                distance = (
                    np.abs(np.log2(p[..., None]) - np.log2(thresholds * scale)).min(-1) * 2**na.SCORE_BITS
                )
            doubtful = (distance <= bound + 1e-6) | (p < 2**-15.9)
            assert np.array_equal(got[~doubtful], want[~doubtful])
            assert not relative or np.all(got.max(-1) == probs.qmax)


def test_codebook_gives_what_is_masked_the_level_of_zero() -> None:
    mask = additive_scores(np.array([[0.0, -np.inf, -1e9]], np.float32))
    for zero, least in (("reserved", 0), ("none", 2)):
        probs, _ = book_of("log2", 4, 3, grid=2**16 - 2, zero=zero)
        assert na.int_probabilities(mask, probs).tolist() == [[2**16 - 2, least, least]]


def test_codebook_leaves_out_levels_that_nothing_reaches() -> None:
    """Probabilities end at 1 and at 2**-16."""
    assert len(book_of("log2", 8, 9)[0].values) == 17  # type: ignore[arg-type]
    assert len(book_of("log2", 4, 9, scale=0.1)[0].values) == 15  # type: ignore[arg-type]
    assert book_of("log2", 4, 9, scale=4.0)[0].qmax == 2**13
    probs, site = book_of("twin_uniform", 4, 9, scale=0.5, shift=0.1)
    assert probs.zero == round(0.1 * 2**15 / 0.5)
    assert len(probs.values) < len(codec_of(site).integers(site)[1])  # type: ignore[arg-type]


def test_one_level_for_all_probabilities_is_kept_with_an_edge_that_changes_nothing() -> None:
    probs, _ = book_of("log2", 4, 9, scale=1e6)
    assert probs.values is not None and probs.edges is not None
    assert len(probs.edges) == 1 and probs.values[0] == probs.values[1]


def test_codebook_refuses_what_integers_do_not_hold() -> None:
    with pytest.raises(VitqError, match="16 bits"):
        book_of("log2", 4, 9, grid=2**16)
    with pytest.raises(VitqError, match="too many keys"):
        book_of("log2", 4, 8193)
    with pytest.raises(VitqError, match="only softmax"):
        site_probabilities("sigmoid", book_of("log2", 4, 9)[1], 9, "attn.probs")


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("codec", ["log2", "twin_uniform", "shift_uniform_log2"])
def test_largest_total_holds(codec: str, relative: bool) -> None:
    for tokens, scale in ((1, 1.0), (9, 1.0), (197, 0.2), (8192, 0.05)):
        probs, _ = book_of(codec, 4, tokens, relative, 1.0 if relative else scale)
        bound = largest_total(probs, tokens)
        for deviation in (0.0, 0.1, 1.0, 3.0):
            t = np.rint(rng(tokens).normal(0, deviation, (8, tokens)) * 2**na.SCORE_BITS).astype(np.int32)
            assert na.int_probabilities(t, probs).sum(-1, dtype=np.int64).max() <= bound


@pytest.mark.parametrize("kind", ["softmax", "row_maximum", "sigmoid", "codebook", "relative_codebook"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 7, 8), (1, 2, 50, 50, 32)])
def test_attention_matches_its_definition(kind: str, shape: tuple[int, ...]) -> None:
    batch, heads, tq, tk, depth = shape
    r = rng(depth)
    q, k, v = (r.integers(-128, 128, (batch, heads, t, depth)).astype(np.int8) for t in (tq, tk, tk))
    formats = [
        codes_format(8, r.uniform(0.01, 0.03, heads).tolist(), r.integers(90, 160, heads).tolist(), "head")
        for _ in range(3)
    ]
    out = codes_format(8, [6 / 255], [128], "tensor")
    bias = r.normal(0, 0.5, (heads, tq, tk))
    by_row = kind in ("row_maximum", "relative_codebook")
    step = 1.0 if by_row else 1 / 255
    if "codebook" in kind:
        probs, site = book_of(
            "twin_uniform", 8, tk, by_row, grid=255, m=1, **({} if by_row else {"shift": 0.01})
        )
    else:
        probs = probabilities("softmax" if by_row else kind, 8, None if by_row else step, tk, "attn")
    made = attention_constants(
        *formats, out, probs, step,
        heads=heads, depth=depth, keys=tk, scale=depth**-0.5, site="attn",
    )  # fmt: skip
    got = na.int_attention(
        q, k, v, made.score_multiplier, made.multiplier, (additive_scores(bias),), zero_q=made.zero_q,
        zero_k=made.zero_k, zero_v=made.zero_v, zero_point=int(out.zero_point), probs=probs, out=INT8,
    )  # fmt: skip
    real = []
    for codes, f in zip((q, k, v), formats, strict=True):
        scale, zero = f.broadcast(list(codes.shape))
        real.append(scale * (codes - zero.astype(np.float64)))
    scores = real[0] @ real[1].swapaxes(-1, -2) * depth**-0.5 + bias
    p = np.exp(scores - scores.max(-1, keepdims=True))
    if kind == "sigmoid":
        p = 1 / (1 + np.exp(-scores))
    if kind in ("softmax", "codebook"):
        p = p / p.sum(-1, keepdims=True)
    codes = np.rint(255 * p)
    if "codebook" in kind:
        thresholds, values = codec_of(site).integers(site)
        codes = (
            values[np.searchsorted(thresholds - site.params.get("shift", 0), p, side="right")] - probs.zero
        )
    total = codes.sum(-1, keepdims=True) if by_row else 255
    exact = codes / total @ real[2] / out.scale + out.zero_point
    clipped = np.clip(np.rint(exact), -128, 127)
    # a probability next to a rounding boundary may fall to the other side: one code of p on one key
    one_code = np.abs(real[2]).max() / 255 / out.scale
    assert np.abs(got - clipped).max() <= 1 + math.ceil(2 * one_code)
    assert (got != clipped).mean() <= 0.1
