"""Free levels: the fit against planted levels and against the conditions of an optimum."""

import numpy as np
import pytest
import torch

from tvm_vitq.calibrate.codebooks import Moments
from tvm_vitq.calibrate.lloyd_max import fit_lloyd_max
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
