"""Weights below 8 bits: stored in as many, unpacked in the kernel or once at load, the same answer."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_vitq
from tvm_vitq import refmodels
from tvm_vitq.errors import VitqError
from tvm_vitq.report import weight_count

IMAGES = refmodels.test_set()[0][:2]
FORMS = ("packed", "unpacked")


@pytest.fixture(scope="module")
def quantize():
    images = refmodels.calibration_images(8)
    made = {}

    def model(bits):
        if bits not in made:
            made[bits] = tvm_vitq.quantize("refmodel:vit", bits, "minmax", images, batch=2, progress=False)
        return made[bits]

    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a3", "w2a8"])
def test_every_form_gives_the_reference(quantize, bits, form, tmp_path):
    path = tvm_vitq.compile(quantize(bits), weights=form).export_library(tmp_path / "vit.so")
    library = tvm_vitq.load_library(path)
    for _ in range(2):  # what was unpacked is kept
        np.testing.assert_array_equal(library(IMAGES), quantize(bits).reference(IMAGES))
    assert library.benchmark(IMAGES, repeat=1)["runs"] == 1
    assert library.profile(IMAGES, repeat=1)


@pytest.mark.parametrize("form", FORMS)
def test_libraries_are_as_small_as_the_bits_say(quantize, form, tmp_path):
    """A weight less of 8 - b bits; the code that unpacks is a tenth of these."""
    sizes = {
        bits: tvm_vitq.compile(quantize(bits), weights=form).export_library(tmp_path / bits).stat().st_size
        for bits in ("w8a8", "w4a8", "w2a8")
    }
    count = weight_count(quantize("w8a8").mod)
    assert sizes["w8a8"] - sizes["w4a8"] > 0.4 * count
    assert sizes["w8a8"] - sizes["w2a8"] > 0.6 * count


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", ["aarch64-dotprod", "aarch64-i8mm"])
def test_other_targets(quantize, form, target, run_under_qemu, tmp_path):
    path = tvm_vitq.compile(quantize("w4a4"), target, weights=form).export_library(tmp_path / "vit.so")
    np.testing.assert_array_equal(run_under_qemu(path, IMAGES), quantize("w4a4").reference(IMAGES))


def test_an_unknown_form_is_refused(quantize):
    with pytest.raises(VitqError, match="no such form of weights"):
        tvm_vitq.compile(quantize("w4a4"), weights="folded")
