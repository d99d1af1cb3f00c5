"""Codebook quantizers against their published formulas, written out here a second time."""

import numpy as np
import pytest
import torch

from tvm_vitq.calibrate.codebooks import every, fit_codebook
from tvm_vitq.errors import VitqError
from tvm_vitq.plan import QuantPlan, SiteQuantizer
from tvm_vitq.quantizers import CODECS, codec_of
from tvm_vitq.quantizers.adalog import BASES
from tvm_vitq.quantizers.codebook import GELU_SHIFT, GRID, PROBABILITY_GRID, ZEROS
from tvm_vitq.quantizers.step_function import LARGE, step_function
from tvm_vitq.quantizers.twin_uniform_gelu import TwinUniformGelu

BITS = range(2, 9)
LOGARITHMS = ["log2", "log_int_softmax", "log_sqrt2", "adalog", "shift_log2"]


def site_of(codec, bits, scale=1.0, **params):
    return SiteQuantizer(bits, [scale], [0], codec, params={"grid": PROBABILITY_GRID, **params})


def samples(scale=1.0, shift=0.0):
    """float32 x whose u is spread over many octaves; 0, 1, powers of two, numbers above 1."""
    rng = np.random.default_rng(0)
    u = [
        np.exp2(rng.uniform(-30, 1, 4000)),
        rng.uniform(0, 1, 4000),
        np.exp2(-np.arange(20.0)),
        [0, 1, 1.7, 40],
    ]
    return (scale * np.concatenate(u) - shift).astype("float32")


# published formulas: level of u (float64), for N = 2**bits


def drop(k, level, n, zero):
    """What becomes of exponents k beyond the last code."""
    if zero == "reserved":  # the last code stands for 0
        return np.where(k >= n - 1, 0.0, level(np.minimum(k, n - 1)))
    if zero == "implicit":  # one level more than codes
        return np.where(k >= n, 0.0, level(np.minimum(k, n - 1)))
    return level(np.minimum(k, n - 1))


def log2(u, bits, zero="reserved"):
    k = np.maximum(np.round(-np.log2(u)), 0)
    return drop(k, lambda k: 2.0**-k, 2**bits, zero)


def log_sqrt2(u, bits, zero="reserved"):
    k = np.maximum(np.round(-2 * np.log2(u)), 0)
    return drop(k, lambda k: 2.0 ** -np.ceil(k / 2) * ((k % 2) * (np.sqrt(2) - 1) + 1), 2**bits, zero)


def log_int_softmax(u, bits, zero="reserved", quotient="rounded"):
    r = np.maximum(np.round(1 / u) if quotient == "rounded" else 1 / u, 1)
    floor = np.floor(np.log2(np.minimum(r, 2.0**300)))
    k = floor + (r - 2.0**floor >= 2.0 ** (floor - 1))
    return drop(k, lambda k: 2.0**-k, 2**bits, zero)


def adalog(u, bits, zero="reserved", base=37, mantissa="table"):
    n, r = 2**bits, 37
    k = np.maximum(np.round(-np.log2(u) * r / base), 0)

    def level(k):
        if mantissa == "exact":
            return 2.0 ** (-k * base / r)
        table = np.round(2.0 ** (-((k * base) % r) / r) * (2 * n - 2)) / (2 * n - 2)
        return 2.0 ** -np.floor(k * base / r) * table

    return drop(k, level, n, zero)


def shift_uniform_log2(u, bits, eta=0.005, low=None, high=None):
    low = np.log2(eta) if low is None else low
    high = np.log2(1 + eta) if high is None else high
    step = (high - low) / (2**bits - 1)
    q = np.clip(np.round((np.log2(np.maximum(u + eta, 1e-300)) - low) / step), 0, 2**bits - 1)
    return np.maximum(2.0 ** np.round(low + q * step) - eta, 0)


def tangent(u, bits, alpha=2.25):
    n, largest = 2**bits, np.tan(alpha / 2)
    t = np.tan(alpha * (np.clip(u, 0, 1) - 0.5))
    q = np.clip(np.round((t + largest) / (2 * largest) * (n - 1)), 0, n - 1)
    return 0.5 + np.arctan((2 * q / (n - 1) - 1) * largest) / alpha


def half_up(x):
    return np.floor(x + 0.5)


def twin_uniform(u, bits, m=2):
    count = 2 ** (bits - 1)
    coarse = 1 / count
    fine = coarse / 2**m
    return np.where(
        u < count * fine,
        np.clip(half_up(u / fine), 0, count - 1) * fine,
        np.clip(half_up(u / coarse), 0, count - 1) * coarse,
    )


def twin_uniform_gelu(u, bits, m=2):
    count = 2 ** (bits - 1)
    negative = 1 / (count + (count - 1) * 2.0**m)
    positive = negative * 2.0**m
    return np.where(
        u < 0,
        np.clip(half_up(u / negative), -count, 0) * negative,
        np.clip(half_up(u / positive), 0, count - 1) * positive,
    )


FORMULAS = {
    "log2": log2,
    "log_int_softmax": log_int_softmax,
    "log_sqrt2": log_sqrt2,
    "adalog": adalog,
    "shift_log2": log_sqrt2,
    "shift_uniform_log2": shift_uniform_log2,
    "tangent": tangent,
    "twin_uniform": twin_uniform,
    "twin_uniform_gelu": twin_uniform_gelu,
}

VARIANTS = [
    *((name, {"zero": zero}) for name in LOGARITHMS for zero in ZEROS),
    *(("adalog", {"base": base, "mantissa": m}) for base in (10, 23, 36, 137) for m in ("table", "exact")),
    ("log_int_softmax", {"quotient": "exact"}),
    *(("shift_uniform_log2", {"eta": eta}) for eta in (0.001, 0.05, 1.0)),
    ("shift_uniform_log2", {"eta": 0.01, "low": -5.5, "high": -0.25}),
    *(("tangent", {"alpha": alpha}) for alpha in (0.01, 2.0, 3.1)),
    *(("twin_uniform", {"m": m}) for m in (1, 2)),
    *(("twin_uniform_gelu", {"m": m}) for m in (-2, 0, 2, 7)),
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)
@pytest.mark.parametrize(("scale", "grid"), [(1.0, PROBABILITY_GRID), (0.37, GRID)])
def test_formula(name, params, bits, scale, grid):
    site = site_of(name, bits, scale, grid=grid, **params)
    codec, scale = codec_of(site), float(np.float32(scale))
    shift = codec.grid_and_shift(site)[1]
    x = samples(scale, shift)
    if name == "twin_uniform_gelu":
        x = np.concatenate([x, -x])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        u = (x.astype(float) + shift) / scale
        level = FORMULAS[name](u if name == "twin_uniform_gelu" else u.clip(0), bits, **params)
    codes = codec.encode(x, site)
    _, values = codec.integers(site)
    wrong = values[codes] != np.round(grid * level)
    near = np.abs(grid * level % 1 - 0.5) < 1e-9  # half a unit of the grid, up to the last bit of a formula
    assert not np.any(wrong & ~near), x[wrong]
    decoded = codec.decode(codes, site).astype(float)
    half = 0.5 * scale / grid
    assert np.abs(decoded - (scale * level - shift)).max() <= half * (1 + 1e-4) + 1e-6
    assert decoded.max() <= scale * max(1, 2 - 2 ** params.get("eta", 0)) + half


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)
def test_books(name, params, bits):
    """Thresholds ascend, levels do not descend; codes are no more than promised."""
    book = CODECS[name].book(bits, params)
    assert len(book.levels) == len(book.thresholds) + 1
    assert np.all(np.diff(book.thresholds) > 0) and np.all(np.diff(book.levels) >= 0)
    if name not in ("adalog", "shift_uniform_log2"):  # whose levels are rounded after the fact
        assert np.all(book.levels[:-1] <= book.thresholds) and np.all(book.thresholds <= book.levels[1:])
    extra = params.get("zero") == "implicit"
    assert len(book.levels) <= 2**bits + extra
    if name not in ("twin_uniform", "shift_uniform_log2"):
        assert len(book.levels) == 2**bits + extra


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", LOGARITHMS[:3])
def test_codes_descend_with_the_exponent(name, bits):
    site = site_of(name, bits)
    octaves = 2 if name == "log_sqrt2" else 1
    k = np.arange(min(2**bits - 1, 100))
    codes = CODECS[name].encode(np.exp2(-k / octaves).astype("float32"), site)
    np.testing.assert_array_equal(codes, 2**bits - 1 - k)
    np.testing.assert_array_equal(CODECS[name].encode(np.array([0.0], "float32"), site), 0)


@pytest.mark.parametrize("name", LOGARITHMS)
def test_zeros(name):
    """Zero: exactly, from a code of its own or one too many, or the smallest level."""
    for zero, count in zip(ZEROS, (8, 9, 8), strict=True):
        site = site_of(name, 3, zero=zero)
        shift = CODECS[name].grid_and_shift(site)[1]
        _, values = CODECS[name].integers(site)
        assert len(values) == count
        lowest = CODECS[name].round_trip(np.array([-shift], "float32"), site)[0]
        smallest = 2.0**-3.5 if "sqrt2" in name or name == "shift_log2" else 2.0**-7
        assert lowest == pytest.approx((smallest if zero == "none" else 0) - shift, rel=1e-3)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ties_go_to_the_larger_level(name, bits):
    site = site_of(name, bits, 0.3)
    codec = codec_of(site)
    edges, _ = codec.table(site, 0.3)
    edges, first = np.unique(edges, return_index=True)  # those below the smallest float are one
    last = np.append(first[1:], len(codec.integers(site)[0]))
    np.testing.assert_array_equal(codec.encode(edges, site), last)
    np.testing.assert_array_equal(codec.encode(np.nextafter(edges, np.float32(-1)), site), first)


@pytest.mark.parametrize("name", FORMULAS)
def test_float32_compares_with_edges_as_float64_does(name):
    site = site_of(name, 8, 0.3)
    codec = codec_of(site)
    thresholds, _ = codec.integers(site)
    exact = float(np.float32(0.3)) * thresholds - codec.grid_and_shift(site)[1]
    near = exact.astype("float32")
    x = np.concatenate([near, np.nextafter(near, np.float32(2)), np.nextafter(near, np.float32(-2)), [0]])
    x = x.astype("float32")
    np.testing.assert_array_equal(codec.encode(x, site), np.searchsorted(exact, x.astype(float), "right"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)
def test_levels_keep_their_codes(name, params, bits):
    """Where no two codes share a value; AdaLog's narrow mantissas move levels across thresholds."""
    site = site_of(name, bits, 0.5, **params)
    codec = codec_of(site)
    _, values = codec.integers(site)
    alone = np.flatnonzero(np.isin(values, np.unique(values)[np.unique(values, return_counts=True)[1] == 1]))
    if name == "adalog" and params.get("mantissa", "table") == "table":
        alone = alone[values[alone] >= 2**12] if bits >= 6 else alone[:0]
    alone = alone[(values[alone] == 0) | (np.abs(values[alone]) > 64)]  # the grid is fine there
    np.testing.assert_array_equal(codec.encode(codec.decode(alone, site), site), alone)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", FORMULAS)
def test_torch_equals_numpy(name, bits):
    for scale, grid in ((1.0, PROBABILITY_GRID), (0.37, GRID), (0.0123, GRID)):
        site = site_of(name, bits, scale, grid=grid)
        codec = codec_of(site)
        x = np.concatenate([samples(scale), -samples(scale), np.float32([-0.0])])
        x = np.resize(x, (LARGE // 8 + 1, 8))
        parameters = {k: torch.from_numpy(v) for k, v in codec.parameters(site).items()}
        for part in (x, x[::3, 1:5]):
            fake = codec.fake_quantize(torch.from_numpy(np.ascontiguousarray(part)), site, parameters)
            assert fake.dtype == torch.float32
            np.testing.assert_array_equal(fake.numpy(), codec.round_trip(part, site))
            strided = torch.from_numpy(np.ascontiguousarray(part.T)).T
            np.testing.assert_array_equal(
                codec.fake_quantize(strided, site, parameters).numpy(), fake.numpy()
            )


@pytest.mark.parametrize(
    "edges", [[-1.0, -1e-40, 0.0, 1e-45, 0.5], [0.0, 0.0, 0.25], [0.5, 0.5001, 0.5002], [3.0]]
)
def test_large_tensors_take_the_same_steps(edges):
    edges = np.array(edges, "float32")
    results = np.arange(len(edges) + 1, dtype="float32")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, LARGE, dtype=np.uint32).view("float32")
    near = np.concatenate([edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, np.float32(-9))])
    x = np.concatenate([bits[~np.isnan(bits)], rng.normal(size=LARGE), near, [np.inf, -np.inf, 0.0, -0.0]])
    x = x.astype("float32")
    expected = results[np.searchsorted(edges, x, "right")]
    np.testing.assert_array_equal(step_function(torch.from_numpy(x), edges, results).numpy(), expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients(name):
    """x: 1 inside; scale: level - u inside, level where clipped."""
    site = site_of(name, 4, 0.25, grid=GRID)
    codec = codec_of(site)
    _, shift = codec.grid_and_shift(site)
    _, values = codec.integers(site)
    x = torch.tensor([-0.3, 0.0, 0.01, 0.07, 0.2, 0.9], requires_grad=True)
    for index in range(len(x)):
        scale = torch.tensor([0.25], requires_grad=True)
        y = codec.fake_quantize(x, site, {"scale": scale})
        x.grad = None
        y[index].backward()
        u = (x[index].item() + shift) / 0.25
        level = values[codec.encode(x.detach().numpy(), site)[index]] / GRID
        inside = values[0] / GRID <= u <= values[-1] / GRID
        assert x.grad[index] == inside and x.grad.abs().sum() == inside
        assert scale.grad.shape == (1,)
        assert scale.grad.item() == pytest.approx(level - u * inside, abs=1e-5)


def test_dtypes_and_frozen_parameters():
    site = site_of("log2", 4)
    scale = torch.tensor([1.0])
    x = torch.rand(50, dtype=torch.float64, requires_grad=True)
    y = codec_of(site).fake_quantize(x, site, {"scale": scale})
    y.sum().backward()
    assert y.dtype == torch.float64 and x.grad.dtype == torch.float64
    scale.requires_grad_()
    codec_of(site).fake_quantize(x.detach(), site, {"scale": scale}).sum().backward()
    assert scale.grad.isfinite().all()


@pytest.mark.parametrize(
    "name", ["log2", "log_sqrt2", "adalog", "tangent", "twin_uniform", "shift_uniform_log2"]
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_relative_to_the_largest_of_a_row(name, bits):
    site = SiteQuantizer(
        bits, [], [], name, granularity="token", axis=-2, dynamic=True, params={"grid": PROBABILITY_GRID}
    )
    site.check("attn.probs")
    codec = codec_of(site)
    p = torch.randn(2, 3, 5, 17, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    codes = codec.encode(p.numpy(), site)
    _, values = codec.integers(site)
    level = FORMULAS[name]((p / p.amax(-1, keepdim=True)).double().numpy(), bits)
    expected = np.round(PROBABILITY_GRID * level)
    np.testing.assert_array_equal(values[codes], expected)
    decoded = codec.decode(codes, site)
    np.testing.assert_allclose(decoded, expected / expected.sum(-1, keepdims=True), rtol=1e-6)
    assert codec.parameters(site) == {}
    p.requires_grad_()
    fake = codec.fake_quantize(p, site, {})
    np.testing.assert_allclose(fake.detach().numpy(), decoded, rtol=1e-6)
    (fake * torch.arange(17)).sum().backward()
    assert p.grad.isfinite().all() and p.grad.abs().max() > 0


@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)
def test_plans_keep_them(name, params, tmp_path):
    site = site_of(name, 4, 0.7, **params)
    QuantPlan(sites={"a.input": site}).save(tmp_path / "plan.json")
    loaded = QuantPlan.load(tmp_path / "plan.json")["a.input"]
    assert loaded == site
    x = samples()
    np.testing.assert_array_equal(codec_of(loaded).round_trip(x, loaded), codec_of(site).round_trip(x, site))


def test_twin_steps_of_gelu_on_their_own_grid():
    """The negative step reaches GELU's minimum, the positive one is 2**m times that, and 0 is 0."""
    for bits, m in ((2, 0), (4, 3), (4, 5), (6, 2)):
        span, count = TwinUniformGelu.span(bits, m), 2 ** (bits - 1)
        scale = TwinUniformGelu.paper_scale(bits, m)
        site = site_of("twin_uniform_gelu", bits, scale, grid=span, m=m)
        _, values = codec_of(site).integers(site)
        assert values.tolist() == [*range(-count, 0), *(k << m for k in range(count))]
        assert values[-1] - values[0] <= 255
        low, zero = codec_of(site).round_trip(np.array([-GELU_SHIFT, 0.0], "float32"), site)
        assert low == pytest.approx(-GELU_SHIFT) and zero == 0


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("log2", {"zero": "perhaps"}, "reserved, implicit, none"),
        ("log2", {"zeros": "none"}, "no such parameter(.|\n)*expected: zero"),
        ("log_int_softmax", {"quotient": "floor"}, "rounded, exact"),
        ("adalog", {"base": 0}, "whole number from 1 to 148"),
        ("adalog", {"base": 20.5}, "whole number from 1 to 148"),
        ("adalog", {"mantissa": "float"}, "table, exact"),
        ("shift_uniform_log2", {"eta": 0}, "from 1e-06 to 1"),
        ("shift_uniform_log2", {"low": -1, "high": -2}, "low < high"),
        ("tangent", {"alpha": 3.2}, "from 0.01 to 3.14"),
        ("tangent", {"alpha": True}, "from 0.01 to 3.14"),
        ("tangent", {"alpha": "2"}, "from 0.01 to 3.14"),
        ("twin_uniform", {"m": 5}, "whole number from 1 to 4"),
        ("twin_uniform_gelu", {"m": 25}, "whole number from -5 to 24"),
        ("log_sqrt2", {"grid": 0}, "from 1 to 65536"),
        ("shift_log2", {"shift": float("nan")}, "'shift'"),
    ],
)
def test_errors(name, params, message):
    site = site_of(name, 4, **params)
    with pytest.raises(VitqError, match=message) as error:
        codec_of(site).encode(np.zeros(1, "float32"), site)
    assert name in str(error.value)


def test_errors_of_sites():
    ones = np.ones((1, 2), "float32")
    for bits in (1, 9):
        with pytest.raises(VitqError, match=r"unsupported bit width(.|\n)*log2"):
            CODECS["log2"].encode(ones, site_of("log2", bits))
    two = SiteQuantizer(4, [1.0, 1.0], [0, 0], "log2", granularity="channel", axis=-1)
    with pytest.raises(VitqError, match=r"one scale(.|\n)*2 scales"):
        CODECS["log2"].encode(ones, two)
    moved = SiteQuantizer(
        4, [], [], "log2", granularity="token", axis=-2, dynamic=True, params={"shift": 0.1}
    )
    with pytest.raises(VitqError, match="cannot be shifted"):
        CODECS["log2"].encode(ones, moved)


@pytest.fixture(scope="module")
def softmax_like():
    scores = 3 * torch.randn(2, 3, 197, 197, generator=torch.Generator().manual_seed(0))
    return scores.softmax(-1)


def smallest_error(p, name, bits, params=({},), **given):
    return fit_codebook(p, site_of(name, bits, **given), params)


def test_paper_form_of_twin_uniform_beats_the_released_sum(softmax_like):
    x = softmax_like.double()
    for bits, m, split in ((4, 3, 6), (6, 3, 8)):
        last = 2 ** (bits - 1) - 1
        sums = []
        for i in range(20):
            t = 2.0**-i
            high = (x.clamp(t, 1) * last).round() / last
            low = (x.clamp(0, t) * last / t).round() * t / last
            sums.append((high + low - x).square().mean().item())
        site, error = smallest_error(softmax_like, "twin_uniform", bits, every(m=range(1, bits + 1)))
        assert site.params["m"] == m and int(np.argmin(sums)) == split
        assert 3 < min(sums) / error < 9


def test_tangent_and_adalog(softmax_like):
    """Best alpha 2.0 to 2.5, better than twin uniform from 4 bits on; at 4 bits AdaLog is slightly better."""
    alphas = every(alpha=np.arange(0.25, 3.1, 0.25).tolist())
    for bits in (3, 4, 6, 8):
        site, error = smallest_error(softmax_like, "tangent", bits, alphas)
        twin = smallest_error(softmax_like, "twin_uniform", bits, every(m=range(1, bits + 1)))[1]
        assert 2.0 <= site.params["alpha"] <= 2.5
        assert error < twin * (1.15 if bits == 3 else 1)
        if bits == 4:
            ada = smallest_error(softmax_like, "adalog", 4, every(base=BASES), zero="implicit")[1]
            assert 0.7 * error < ada < error


def test_shifted_uniform_logarithm_wastes_codes():
    """Over the range of a shift of 0.005, 4 bits give 9 different levels and 6 bits hardly more."""
    for bits, most in ((4, 9), (6, 11)):
        levels = CODECS["shift_uniform_log2"].book(bits, {"eta": 0.005}).levels
        assert 9 <= len(np.unique(levels)) <= most


def test_statements_about_rounding(softmax_like):
    """A reserved zero costs little; the thresholds of an integer logarithm about as much as those of log2."""
    for name in ("log2", "log_sqrt2", "adalog"):
        reserved, implicit = (smallest_error(softmax_like, name, 4, zero=zero)[1] for zero in ZEROS[:2])
        assert implicit <= reserved < 1.1 * implicit
    plain, integer = (smallest_error(softmax_like, name, 4)[1] for name in ("log2", "log_int_softmax"))
    assert plain < integer < 1.3 * plain
