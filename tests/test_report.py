"""The build report's table of kernels: layers, multiply-accumulates and bytes of the compiled program."""

from __future__ import annotations

import math
import re

import pytest

import tvm_vitq
from tvm_vitq import refmodels


@pytest.fixture(scope="module")
def quantized():
    images = refmodels.calibration_images(4)
    return tvm_vitq.quantize("refmodel:vit", "w4a4", "minmax", images, progress=False)


@pytest.fixture(scope="module", params=["packed", "unpacked"])
def report(request, quantized):
    found = tvm_vitq.compile(quantized, weights=request.param, tuning_logs=False).report
    return {"weights": request.param, **found}


def test_every_layer_is_one_call_of_a_kernel(quantized, report):
    """Layers are those that the plan has weights for, and LayerNorms and attention beside them."""
    layers = [layer for kernel in report["kernels"] for layer in kernel["layers"]]
    weights = {name.removesuffix(".weight") for name in quantized.plan.sites if name.endswith(".weight")}
    assert len(layers) == len(set(layers))
    assert weights < set(layers)
    assert all(len(kernel["layers"]) in (0, kernel["calls"]) for kernel in report["kernels"])


def test_kernels_have_all_the_multiply_accumulates(report):
    assert sum(kernel["calls"] * kernel["macs"] for kernel in report["kernels"]) == report["macs"]


def test_bytes_are_those_of_arguments_and_result(report):
    """Of a layer without padding: codes, weights, three constants per output, sums."""
    kernel = next(k for k in report["kernels"] if "blocks.0.attn.qkv" in k["layers"])
    m, k, n = (int(v) for v in re.search(r"__(\d+)x(\d+)x(\d+)", kernel["name"]).groups())
    assert n % 16 == 0 and k % 64 == 0
    if report["weights"] == "packed":  # half a byte each; the lowest weight of each output, four times
        constants = n * k // 2 + 4 * n
    else:
        constants = n * k
    assert kernel["bytes"] == m * k + constants + 12 * n + m * n


def test_bytes_of_a_slice_are_those_that_it_takes(quantized, report):
    kernel = next(k for k in report["kernels"] if k["name"] == "strided_slice")
    (width,) = {
        int(re.search(r"__\d+x(\d+)", k["name"])[1]) for k in report["kernels"] if k["layers"] == ["norm"]
    }
    assert kernel["bytes"] == 2 * 4 * width * math.prod(report["input_shape"][:1])
