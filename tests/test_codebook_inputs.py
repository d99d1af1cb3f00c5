"""Codebook quantizers of linear inputs: levels come out of tables, the layer behind stays an integer one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from canonical_vit import tiny_vit

import tvm_vitq
from tvm_vitq.calibrate import calibrate
from tvm_vitq.calibrate.simulate import simulate
from tvm_vitq.errors import VitqError
from tvm_vitq.evaluation import sqnr
from tvm_vitq.formats import codebook_format
from tvm_vitq.ops import op_name
from tvm_vitq.pipeline import realize_passes, run_passes
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.quantizers import CODECS
from tvm_vitq.quantizers.codebook import Book, Codebook
from tvm_vitq.relax_passes.sites import bindings

IMAGES = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32)


class Squares(Codebook):
    """Levels (i / (N - 1))**2: finer near zero, and simple enough to know."""

    name = "squares"

    def book(self, bits, params):
        levels = np.linspace(0, 1, 2**bits) ** 2
        return Book((levels[1:] + levels[:-1]) / 2, levels)


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    monkeypatch.setitem(CODECS, "squares", Squares())


def site(bits, largest, shift=0.0, grid=255):
    return SiteQuantizer(bits, [largest + shift], [0], "squares", params={"grid": grid, "shift": shift})


@pytest.mark.parametrize("shift", [0.0, 0.17])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_format_holds_the_quantized_values(bits, shift):
    quantizer = site(bits, 2.0, shift)
    f = codebook_format(quantizer, "fc2.input")
    x = np.random.default_rng(1).uniform(-1, 3, 2000).astype(np.float32)
    integers = f.encode(x)
    assert integers.dtype == np.int8 and integers.min() == -128
    real = f.scale * (integers - f.zero_point.astype(np.float64)) + f.offset
    np.testing.assert_allclose(real, Squares().round_trip(x, quantizer), atol=1e-6)
    assert f.largest == pytest.approx(2.0, abs=1e-6)


def test_levels_must_fit_a_byte():
    with pytest.raises(VitqError, match="more than a byte"):
        codebook_format(site(4, 1.0, grid=2**15), "fc2.input")


def realized(bits, chosen):
    """Simulation and integer model of tiny_vit with codebooks at the inputs that `chosen` accepts."""
    graph = tiny_vit(batch=2)
    model = SimpleNamespace(mod=graph, name="tiny", input_shape=(2, 3, 16, 16), preprocessing=None)
    found = calibrate(model, bits, "minmax", IMAGES, progress=False)
    for name, quantizer in found.plan.sites.items():
        if chosen(name):
            low = -quantizer.scale[0] * quantizer.zero_point[0]
            high = low + quantizer.scale[0] * quantizer.qmax
            found.plan.sites[name] = site(quantizer.bits, high, -low)
    return found, QuantizedModel(run_passes(found.mod, realize_passes(found.plan)), found.plan)


@pytest.mark.parametrize(
    ("chosen", "lookups"),
    [(lambda n: n.endswith("fc2.input"), 0), (lambda n: n.endswith(".input"), 1)],
    ids=["behind GELU", "everywhere"],
)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_program_equals_its_reference_and_follows_the_simulation(bits, chosen, lookups):
    found, model = realized(bits, chosen)
    made = [op_name(b.value) for b in bindings(model.mod)]
    functions = sum(op_name(b.value) == "vitq.activation" for b in bindings(found.mod))
    # one table per GELU gives its codes, only inputs that no function precedes need tables of their own
    assert (made.count("vitq.int_lookup") > functions) == bool(lookups)
    assert not model.float_islands
    want = model.reference(IMAGES)
    library = tvm_vitq.compile(model)
    np.testing.assert_array_equal(np.concatenate([library(IMAGES[i : i + 2]) for i in range(0, 16, 2)]), want)
    assert sqnr(simulate(found.mod, found.plan)(IMAGES), want) > (30 if bits == "w8a8" else 10)


def test_probabilities_that_all_fall_on_one_level_run():
    """Attention as flat as that of an untrained model: one level is left, and the program follows."""
    params = {"grid": 2**15, "eta": 0.01, "low": -6.39, "high": -5.52}
    flat = SiteQuantizer(4, [1.0], [0], "shift_uniform_log2", params=params)
    found, _ = realized("w8a8", lambda name: False)
    probs = [name for name in found.plan.sites if name.endswith(".probs")]
    found.plan.sites |= dict.fromkeys(probs, flat)
    model = QuantizedModel(run_passes(found.mod, realize_passes(found.plan)), found.plan)
    want = model.reference(IMAGES[:2])
    np.testing.assert_array_equal(tvm_vitq.compile(model)(IMAGES[:2]), want)
    assert sqnr(simulate(found.mod, found.plan)(IMAGES[:2]), want) > 25
