"""Fitting of codebook quantizers: planted optima are found, summaries stand for the data."""

import numpy as np
import pytest
import torch

from tvm_vitq.calibrate.codebooks import Moments, every, fit_codebook, scales_below
from tvm_vitq.calibrate.statistics import Collector, Summary
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import CODECS, codec_of
from tvm_vitq.quantizers.adalog import BASES
from tvm_vitq.quantizers.codebook import GELU_SHIFT, PROBABILITY_GRID
from tvm_vitq.quantizers.shift_uniform_log2 import ETAS
from tvm_vitq.quantizers.twin_uniform_gelu import TwinUniformGelu


def site_of(codec, bits, scale=1.0, **params):
    return SiteQuantizer(bits, [scale], [0], codec, params={"grid": PROBABILITY_GRID, **params})


def softmax_like(scale=3.0, seed=0):
    return (scale * torch.randn(2, 3, 60, 197, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def planted(site, count=20_000):
    """Values that this quantizer represents, all of them, and no others."""
    _, results = codec_of(site).table(site, site.scale[0])
    index = torch.randint(len(results), (count,), generator=torch.Generator().manual_seed(1))
    return torch.from_numpy(results)[index]


@pytest.mark.parametrize(
    ("name", "true", "candidates"),
    [
        ("adalog", {"base": 23}, every(base=BASES)),
        ("adalog", {"base": 61, "mantissa": "exact"}, every(base=BASES, mantissa=("table", "exact"))),
        ("tangent", {"alpha": 2.25}, every(alpha=np.arange(0.25, 3.1, 0.25).tolist())),
        ("twin_uniform", {"m": 3}, every(m=range(1, 5))),
        ("twin_uniform_gelu", {"m": 4}, every(m=range(-5, 10))),
        ("shift_uniform_log2", {"eta": 0.02}, every(eta=ETAS)),
    ],
)
def test_planted_optimum(name, true, candidates):
    for scale in (1.0, 0.37):
        site = site_of(name, 4, scale, **true)
        found, error = fit_codebook(planted(site), site_of(name, 4), candidates, scales_below(1.3 * scale))
        assert found.params == site.params
        assert found.scale[0] == pytest.approx(scale, rel=0.005)  # the finest grid has steps of 0.3 %
        assert error < 2e-5 * scale**2
        exact, error = fit_codebook(planted(site), site_of(name, 4), candidates, [scale])
        assert exact.params == site.params and error < 1e-12
        assert exact.scale == [float(np.float32(scale))]


def test_error_is_that_of_the_codec():
    """And the refined scale is at least as good as any of a fine grid nearby."""
    p = softmax_like()
    found, error = fit_codebook(p, site_of("adalog", 4), every(base=BASES), scales_below(float(p.max())))
    quantized = codec_of(found).round_trip(p.numpy(), found)
    assert error == pytest.approx(np.square(quantized - p.numpy().astype(float)).mean(), rel=1e-6)
    moments, codec = Moments.of(p), codec_of(found)
    fine = found.scale[0] * np.geomspace(0.9, 1.1, 400)
    assert error <= 1.02 * moments.squared_error(*codec.table(found, fine)).min()
    assert fit_codebook(p, site_of("adalog", 4), every(base=BASES), scales_below(float(p.max()))) == (
        found,
        error,
    )


def test_first_of_equals():
    found, _ = fit_codebook(
        torch.zeros(10), site_of("log2", 4), every(zero=("implicit", "reserved")), [0.5, 1.0]
    )
    assert found.params["zero"] == "implicit" and found.scale == [0.5]


def test_summary_stands_for_the_data():
    p = softmax_like(4.0)
    exact = fit_codebook(p, site_of("tangent", 4), every(alpha=[1.0, 2.0, 3.0]))
    assert (
        fit_codebook(Summary.of(p.reshape(1, -1)), site_of("tangent", 4), every(alpha=[1.0, 2.0, 3.0]))
        == exact
    )
    collector = Collector(p.numel(), 1e-3, 20_000, torch.Generator().manual_seed(0))
    for part in p.reshape(1, -1).split(10_000, 1):
        collector.add(part)
    found, error = fit_codebook(collector.summary(), site_of("tangent", 4), every(alpha=[1.0, 2.0, 3.0]))
    assert found == exact[0] and error == pytest.approx(exact[1], rel=0.05)


def test_importance_of_values():
    """Values that do not count may be clipped."""
    x = torch.linspace(0, 1, 1001)
    light = Moments.of(x, (x < 0.25).float())
    found, _ = fit_codebook(light, site_of("tangent", 4, alpha=0.01), scales=scales_below(1.0))
    assert found.scale[0] == pytest.approx(0.25, rel=0.04)


def test_error_of_the_output_decides():
    p, v = softmax_like()[0, 0], torch.randn(197, 16, generator=torch.Generator().manual_seed(2))
    calls = []

    def error(site):
        calls.append(site)
        return float(
            (torch.from_numpy(codec_of(site).round_trip(p.numpy(), site)) @ v - p @ v).square().mean()
        )

    candidates = every(base=BASES)
    plain, _ = fit_codebook(p, site_of("adalog", 3), candidates, scales_below(1.0))
    found, value = fit_codebook(p, site_of("adalog", 3), candidates, scales_below(1.0), error=error, keep=6)
    assert value == error(found) <= error(plain)
    assert len(calls) == 6 + 7 + 7 + 2  # candidates, two rounds, the line above
    fixed, _ = fit_codebook(p, site_of("adalog", 3), candidates, error=lambda s: -s.params["base"], keep=5)
    best = fit_codebook(p, site_of("adalog", 3), candidates)[0]
    assert fixed.params["base"] > best.params["base"] and fixed.scale == [1.0]


def test_rows_relative_to_their_largest():
    p = softmax_like()
    site = SiteQuantizer(
        4, [], [], "adalog", granularity="token", axis=-2, dynamic=True, params={"grid": PROBABILITY_GRID}
    )
    found, error = fit_codebook(p, site, every(base=range(5, 40, 2)))
    assert found.dynamic and found.scale == [] and 7 <= found.params["base"] <= 37
    assert error < fit_codebook(p, site_of("log2", 4))[1]
    assert fit_codebook(p, site, error=lambda s: 5.0)[1] == 5.0


def test_outputs_of_gelu():
    """Every codec for them is better than a uniform one at 4 bits; scales may depend on the params."""
    x = 1.5 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[:100] *= 6
    g = torch.nn.functional.gelu(x)
    span = float(g.max()) + GELU_SHIFT
    uniform = min(
        float((((g / s).round() + z).clamp(0, 15).sub(z).mul(s) - g).square().mean())
        for z in (0, 1, 2)
        for s in scales_below(span / 15, 0.05, 60)
    )
    ada, error = fit_codebook(
        g, site_of("adalog", 4, grid=255, shift=GELU_SHIFT), every(base=BASES), scales_below(span)
    )
    assert error < 1.1 * uniform and ada.params["shift"] == GELU_SHIFT
    twin, error = fit_codebook(
        g,
        site_of("twin_uniform_gelu", 4, grid=255),
        every(m=range(-5, 10)),
        lambda params: [TwinUniformGelu.paper_scale(4, params["m"])],
    )
    assert error < 2 * uniform and twin.scale[0] == np.float32(
        TwinUniformGelu.paper_scale(4, twin.params["m"])
    )
    better = fit_codebook(g, twin, every(m=range(-5, 10)), scales_below(2 * span))[1]
    assert better <= error
    assert CODECS["shift_log2"].grid_and_shift(site_of("shift_log2", 4))[1] == GELU_SHIFT
