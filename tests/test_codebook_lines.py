"""Guesses of codes: never above the code, and at most one below it."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_vitq.integerize.attention import site_probabilities
from tvm_vitq.numerics_attention import DISTANCE_MAX
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.codebook import PROBABILITY_GRID
from tvm_vitq.schedules.codebook import above
from tvm_vitq.schedules.codebook_lines import lines

DISTANCES = np.arange(DISTANCE_MAX + 1)
CODECS = ("log2", "log_int_softmax", "log_sqrt2", "adalog", "tangent", "twin_uniform", "shift_uniform_log2")


def published(codec: str, bits: int, scale: float | None = None, **params: float) -> np.ndarray:
    scale = scale or 1 / (2**bits - 1)
    site = SiteQuantizer(bits, [scale], [0], codec, params={"grid": PROBABILITY_GRID, **params})
    edges = site_probabilities("softmax", site, 197, codec)[0].edges
    assert edges is not None
    return edges


def within(edges: np.ndarray) -> bool:
    found, codes = lines(edges), above(edges, DISTANCES)
    assert found is not None
    guesses = found.guesses(DISTANCES)
    assert found.base.max() < 2**16 and found.slope.max() < 2**16
    assert guesses.min() >= 0
    return bool(((guesses <= codes) & (guesses >= codes - 1)).all())


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("codec", CODECS)
def test_guesses_of_published_quantizers(codec, bits):
    edges = published(codec, bits)
    assert within(edges)


@pytest.mark.parametrize("base", [3, 8, 20, 37, 74, 148])
def test_guesses_of_adaptive_logarithms(base):
    assert within(published("adalog", 8, base=base))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0, 2.7, 2.9, 3.0, 3.1])
@pytest.mark.parametrize("largest", [1.0, 0.3, 0.009])
def test_guesses_of_tangents(alpha, largest):
    assert within(published("tangent", 8, largest, alpha=alpha))


def test_few_edges_anywhere_are_near_a_line():
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = rng.permutation(64)[:12]
        assert within(np.sort(1024 * places + rng.integers(1, 1024, 12))[::-1])


def test_no_lines_for_crowds_and_long_books():
    rng = np.random.default_rng(0)
    crowds = 1024 * rng.permutation(64)[:20, None] + 500 + np.arange(10)
    assert lines(np.sort(crowds.ravel())[::-1]) is None
    assert lines(256 * np.arange(256)[::-1]) is None


def test_books_at_the_ends():
    for edges in ([], [1], [DISTANCE_MAX], [DISTANCE_MAX, 1]):
        assert within(np.array(edges, np.int64))
