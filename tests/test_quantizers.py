"""Quantizers: formulas, granularities, and torch agreeing with NumPy."""

import numpy as np
import pytest
import torch

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import CODECS, codec_of
from tvm_vitq.quantizers.uniform import affine_from_range, symmetric_from_max

RNG = np.random.default_rng(0)


def fitted(shape, granularity, axis=None, group_size=None, bits=4, signed=False):
    """A quantizer with random parameters that fits a tensor of `shape`."""
    from tvm_vitq.quantizers.granularity import parameter_shape

    empty = SiteQuantizer(bits, [1.0], [0], "uniform", signed, granularity, axis, group_size)
    count = int(np.prod(parameter_shape(empty, shape)))
    zero = [0] * count if signed else RNG.integers(0, 2**bits, count).tolist()
    return SiteQuantizer(
        bits, RNG.uniform(0.05, 0.3, count).tolist(), zero, "uniform", signed, granularity, axis, group_size
    )


def row_of(site, shape, index):
    """Which entry of the plan's lists holds for an element."""
    if site.granularity == "tensor":
        return 0
    if site.granularity != "group":
        return index[site.axis]
    group = index[-1] // site.group_size
    return group if site.axis is None else index[site.axis] * (shape[-1] // site.group_size) + group


CASES = [
    ((2, 5, 8), "tensor", None, None, False),
    ((2, 5, 8), "token", -2, None, False),
    ((2, 5, 8), "channel", -1, None, False),
    ((2, 5, 8), "group", None, 4, False),
    ((2, 3, 5, 4), "head", -3, None, False),
    ((6, 8), "channel", 0, None, True),
    ((6, 8), "group", 0, 2, True),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "granularity", "axis", "group", "signed"), CASES)
def test_formula_and_torch_agree(shape, granularity, axis, group, signed, bits):
    site = fitted(shape, granularity, axis, group, bits, signed)
    x = RNG.normal(size=shape).astype("float32")
    codec = codec_of(site)
    codes = codec.encode(x, site)
    assert codes.min() >= site.qmin and codes.max() <= site.qmax
    parameters = {k: torch.from_numpy(v) for k, v in codec.parameters(site).items()}
    fake = codec.fake_quantize(torch.from_numpy(x), site, parameters)
    np.testing.assert_array_equal(fake.numpy(), codec.decode(codes, site))
    # element by element, as the formula is written
    for index in [tuple(RNG.integers(0, n) for n in shape) for _ in range(20)]:
        row = row_of(site, shape, index)
        scale, zero = np.float32(site.scale[row]), site.zero_point[row]
        assert codes[index] == np.clip(np.rint(x[index] / scale) + zero, site.qmin, site.qmax)


def test_ties_round_to_even():
    site = SiteQuantizer(8, [1.0], [0])
    np.testing.assert_array_equal(
        CODECS["uniform"].encode(np.array([0.5, 1.5, 2.5], "float32"), site), [0, 2, 2]
    )


def test_gradients_pass_straight_through_inside_the_range():
    site = SiteQuantizer(4, [0.1], [8])
    x = torch.tensor([0.03, 0.3, 5.0], requires_grad=True)
    scale = torch.tensor([0.1], requires_grad=True)
    y = CODECS["uniform"].fake_quantize(x, site, {"scale": scale, "zero_point": torch.tensor([8.0])})
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 1.0, 0.0]))
    # learned step size: (round(x/s) - x/s) inside, (qmax - z) where clipped
    torch.testing.assert_close(scale.grad, torch.tensor([(0 - 0.3) + (3 - 3.0) + 7.0]), atol=1e-4, rtol=0)


def test_affine_holds_zero_exactly():
    scale, zero = affine_from_range(np.array([-1.0, 0.5, -3.0, 0.0]), np.array([3.0, 2.0, -1.0, 0.0]), 4)
    np.testing.assert_allclose(scale, [4 / 15, 2 / 15, 3 / 15, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(zero, [4, 0, 15, 0])


def test_symmetric():
    np.testing.assert_allclose(symmetric_from_max(np.array([1.27, 0.0]), 8), [0.01, 1.0], rtol=1e-6)


def test_round_trip_error_is_half_a_step():
    x = RNG.uniform(-1, 1, 1000).astype("float32")
    scale, zero = affine_from_range(x.min(), x.max(), 6)
    site = SiteQuantizer(6, [float(scale)], [int(zero)])
    error = np.abs(CODECS["uniform"].round_trip(x, site) - x)
    assert error.max() <= float(scale) * 1.01  # the rounded zero point may move the range by half a step
    assert np.median(error) <= float(scale) / 2


def test_unfitting_parameters():
    site = SiteQuantizer(4, [0.1, 0.2], [0, 0], granularity="token", axis=-2)
    with pytest.raises(VitqError, match="2 scales"):
        CODECS["uniform"].encode(np.zeros((1, 3, 4), "float32"), site)
    site = SiteQuantizer(4, [0.1, 0.2], [0, 0], granularity="group", group_size=3)
    with pytest.raises(VitqError, match="divisor of 4"):
        CODECS["uniform"].encode(np.zeros((1, 3, 4), "float32"), site)
    with pytest.raises(VitqError, match="uniform"):
        codec_of(SiteQuantizer(4, [0.1], [0], codec="unifrom"))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_row_maximum(bits):
    """Codes relative to the row's maximum; rows sum to 1 again; NumPy, torch and gradients."""
    site = SiteQuantizer(bits, [], [], "row_maximum", granularity="token", axis=-2, dynamic=True)
    site.check("attn.probs")
    p = torch.randn(2, 3, 5, 17, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    codec = codec_of(site)
    codes = codec.encode(p.numpy(), site)
    assert codes.min() >= 0 and (codes.max(-1) == 2**bits - 1).all()
    largest = p.max(-1, keepdim=True).values
    assert np.abs(codes - (site.qmax * p / largest).numpy()).max() <= 0.5 + 1e-4
    decoded = codec.decode(codes, site)
    np.testing.assert_allclose(decoded.sum(-1), 1, atol=1e-6)
    p.requires_grad_()
    fake = codec.fake_quantize(p, site, {})
    np.testing.assert_allclose(fake.detach().numpy(), decoded, atol=1e-7)
    (fake * torch.arange(17)).sum().backward()
    assert p.grad.isfinite().all() and p.grad.abs().max() > 0
