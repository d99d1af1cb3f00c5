"""Free levels: the fit against planted levels and against the conditions of an optimum."""

import numpy as np
import pytest
import torch

from tvm_vitq.calibrate.codebooks import Moments
from tvm_vitq.calibrate.lloyd_max import fit_lloyd_max, fit_relative
from tvm_vitq.calibrate.searches import mse, quantizer_numbers
from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import codec_of

NORMAL = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
GELU = torch.nn.functional.gelu(2 * NORMAL)


def error(site, x):
    return float(np.square(codec_of(site).round_trip(x.numpy(), site) - x.numpy()).mean())


def test_finds_planted_levels():
    planted = np.array([-1.0, -0.9, 0.2, 4.0])
    x = torch.tensor(np.repeat(planted, 100), dtype=torch.float32)
    site = fit_lloyd_max(Moments.of(x), 2)
    np.testing.assert_allclose(codec_of(site).decode(np.arange(4), site), planted, atol=5.0 / 255 / 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_reaches_the_known_error_of_normal_data(bits):
    """Max (1960), table I: mean squared error of the optimal quantizers of a normal variable."""
    site = fit_lloyd_max(Moments.of(NORMAL), bits)
    assert error(site, NORMAL) == pytest.approx({2: 0.1175, 3: 0.03454, 4: 0.009497}[bits], rel=0.05)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_beats_the_best_uniform_quantizer(bits):
    rows = GELU[None]
    low, high = mse()(Summary.of(rows), bits, False)
    scale, zero = quantizer_numbers(low, high, bits, False)
    uniform = SiteQuantizer(bits, scale.tolist(), zero.tolist())
    assert error(fit_lloyd_max(Moments.of(GELU), bits), GELU) < 0.85 * error(uniform, GELU)


def test_levels_that_coincide_are_one():
    site = fit_lloyd_max(Moments.of(torch.zeros(50)), 4)
    assert codec_of(site).round_trip(np.zeros(3, np.float32), site).tolist() == [0, 0, 0]
    site = fit_lloyd_max(Moments.of(torch.tensor([0.0, 1.0] * 9)), 4)
    assert site.params["levels"] == [0, 255]


@pytest.mark.parametrize("levels", [None, [3], [5, 5], [0, 256], [0.5, 2], list(range(17))])
def test_malformed_levels(levels):
    site = SiteQuantizer(4, [1.0], [0], "lloyd_max", params={"levels": levels})
    with pytest.raises(VitqError, match="levels"):
        codec_of(site).encode(np.zeros(1, np.float32), site)


def relative_error(site, rows):
    p = rows.numpy()
    return float(np.square(codec_of(site).round_trip(p, site) - p).mean())


def test_relative_levels_find_planted_ones():
    u = np.array([10, 60, 200, 255]) / 255
    rows = torch.tensor(np.stack([u * peak for peak in (0.01, 0.3, 0.8)]), dtype=torch.float32)
    site = fit_relative(rows, 2)
    assert site.params["levels"] == [10, 60, 200, 255] and site.dynamic and site.scale == []
    assert fit_relative(torch.ones(2, 7), 3).params["levels"] == [0, 255]


@pytest.mark.parametrize(("bits", "share"), [(3, 0.5), (4, 0.5), (6, 0.9)])
def test_relative_levels_beat_uniform_ones(bits, share):
    """On softmax of normal scores, 197 keys; at 6 bits the grid of bytes is near."""
    scores = 2 * torch.randn(4, 3, 50, 197, generator=torch.Generator().manual_seed(1))
    rows = scores.softmax(-1)
    uniform = SiteQuantizer(bits, [], [], "row_maximum", granularity="token", axis=-2, dynamic=True)
    assert relative_error(fit_relative(rows, bits), rows) < share * relative_error(uniform, rows)
