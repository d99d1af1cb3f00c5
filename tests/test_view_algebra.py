"""Chains of views against NumPy."""

from __future__ import annotations

import numpy as np

from tvm_vitq.relax_passes.view_algebra import AxisMap, Step

SHAPES = [
    (2, 12, 6),
    (1, 4, 6, 6),
    (24, 6),
    (2, 3, 4, 1, 6),
    (144,),
    (4, 3, 2, 6),
    (1, 12, 1, 12),
    (2, 2, 6, 6),
]


def apply(array: np.ndarray, steps: list[Step]) -> np.ndarray:
    for step in steps:
        array = array.reshape(step.values) if step.kind == "reshape" else array.transpose(step.values)
    return array


def random_chain(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, AxisMap | None]:
    """A source of distinct numbers, the chain's result, and its map (None where sizes do not refine each
    other).
    """
    source = np.arange(144).reshape(SHAPES[rng.integers(len(SHAPES))])
    result, mapped = source, AxisMap(list(source.shape))
    for _ in range(count):
        if rng.integers(2):
            axes = [int(a) for a in rng.permutation(result.ndim)]
            result = result.transpose(axes)
            mapped.permute(axes)
        else:
            shape = SHAPES[rng.integers(len(SHAPES))]
            result = result.reshape(shape)
            if not mapped.reshape(list(shape)):
                return source, result, None
    return source, result, mapped


def test_normal_form_is_exact_and_short() -> None:
    rng, joined = np.random.default_rng(0), 0
    for _ in range(3000):
        source, result, mapped = random_chain(rng, int(rng.integers(1, 6)))
        if mapped is None:
            continue
        steps = mapped.steps()
        assert np.array_equal(apply(source, steps), result)
        assert sum(s.kind == "permute" for s in steps) <= 1 and len(steps) <= 3
        joined += 1
    assert joined > 1000


def test_slices_are_cut_from_the_source() -> None:
    rng, moved = np.random.default_rng(1), 0
    for _ in range(3000):
        source, result, mapped = random_chain(rng, int(rng.integers(1, 5)))
        axis = int(rng.integers(result.ndim))
        begin, end = sorted(int(v) for v in rng.integers(0, result.shape[axis] + 1, 2))
        if mapped is None or begin == end:
            continue
        found = mapped.slice(axis, begin, end)
        if found is None:
            continue
        origin, first, last, part = found
        cut = source[(slice(None),) * origin + (slice(first, last),)]
        assert np.array_equal(apply(cut, part.steps()), result[(slice(None),) * axis + (slice(begin, end),)])
        moved += 1
    assert moved > 300


def test_heads_are_column_ranges() -> None:
    """q, k and v of [B, T, 3 H D] as timm takes them apart."""
    mapped = AxisMap([2, 5, 24])
    assert mapped.reshape([2, 5, 3, 2, 4])
    mapped.permute([2, 0, 3, 1, 4])
    found = mapped.slice(0, 1, 2)
    assert found is not None
    origin, first, last, part = found
    assert (origin, first, last) == (2, 8, 16)
    assert part.reshape([2, 2, 5, 4])
    assert part.steps() == [Step("reshape", (2, 5, 2, 4)), Step("permute", (0, 2, 1, 3))]
