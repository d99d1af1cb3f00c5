"""Whole models with their matrix products on VTA, simulated: the logits of the NumPy reference."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import tvm
import tvm_ffi
from timm.models.vision_transformer import VisionTransformer
from tvm import relax

import tvm_vitq
from tvm_vitq.compiler import _after_kernels
from tvm_vitq.pipeline import lower_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.relax_passes.offload_vta import LAUNCH, Offload
from tvm_vitq.targets import parse
from tvm_vitq.vta.config import VtaConfig
from tvm_vitq.vta.device import SimulatedDevice
from tvm_vitq.vta.program import PlacedProgram

CONFIG = VtaConfig()
SIZE = 32


@pytest.fixture(scope="module")
def quantized():
    """A small ViT, by recipe and bits."""
    import torch

    made: dict[tuple, QuantizedModel] = {}

    def make(recipe: str, bits: str, batch: int = 1, **sizes) -> QuantizedModel:
        key = (recipe, bits, batch, *sizes.items())
        if key not in made:
            torch.manual_seed(0)
            shape = {"embed_dim": 48, "num_heads": 3, "depth": 1, **sizes}
            model = VisionTransformer(img_size=SIZE, patch_size=8, num_classes=10, **shape)
            images = np.random.default_rng(0).standard_normal((16, 3, SIZE, SIZE)).astype(np.float32)
            made[key] = tvm_vitq.quantize(
                model, bits=bits, recipe=recipe, calibration=images, input_shape=(batch, 3, SIZE, SIZE)
            )
        return made[key]

    return make


def run(model: QuantizedModel, images: np.ndarray) -> tuple[np.ndarray, Offload, PlacedProgram]:
    """Logits of the host's program with launches on the simulator."""
    profile, offload = parse("llvm"), Offload(CONFIG)
    with profile.target:
        lowered = run_passes(model.mod, lower_passes(profile, offload=offload))
    executable = relax.build(lowered, target=profile.target, relax_pipeline=_after_kernels())
    placed = PlacedProgram(offload.program, SimulatedDevice(CONFIG, megabytes=64))
    names = list(offload.program.launches)

    def launch(number, *tensors) -> None:
        name = names[int(np.from_dlpack(number))]
        inputs = [np.from_dlpack(t) for t in tensors[: len(offload.program.launches[name].inputs)]]
        results = placed.run(name, *inputs)
        for out, result in zip(tensors[len(inputs) :], results, strict=True):
            array = np.from_dlpack(out)
            memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
            np.frombuffer(memory, array.dtype).reshape(array.shape)[...] = result.reshape(array.shape)

    tvm_ffi.register_global_func(LAUNCH, launch, override=True)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](tvm.runtime.tensor(images)).numpy(), offload, placed


@pytest.mark.parametrize(
    ("recipe", "bits", "batch"),
    [
        ("p2-vit", "w8a8", 1),
        ("p2-vit", "w4a4", 2),
        ("percentile", "w8a8", 1),
        ("minmax", "w4a4", 2),
        ("repq-vit", "w8a8", 1),
    ],
)
def test_logits_are_those_of_the_reference(quantized, recipe, bits, batch):
    model = quantized(recipe, bits, batch)
    images = np.random.default_rng(1).standard_normal(model.input_shape).astype(np.float32)
    found, offload, placed = run(model, images)
    assert np.array_equal(found, model.reference(images))
    launched = set(offload.program.launches)
    layers = {"patch_embed.proj", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "head"}
    attention = set() if offload.notes else {"blocks.0.attn"}
    assert {name.removeprefix("blocks.0.") for name in launched - attention} == layers
    if recipe == "p2-vit":
        assert not offload.notes, "all products of a shift plan, attention's too"
    assert all(placed.cycles(name).total > 0 for name in launched)


def test_what_stays_on_the_host_says_why(quantized):
    """A plan whose q, k and v are no shifts, and heads of a width that is no block."""
    for model, reason in (
        (quantized("percentile", "w8a8"), "no shifts of sums"),
        (quantized("p2-vit", "w8a8", 1, num_heads=2), "heads of whole blocks"),
    ):
        offload = Offload(CONFIG)
        profile = parse("llvm")
        with profile.target:
            run_passes(model.mod, lower_passes(profile, offload=offload))
        assert reason in offload.notes["blocks.0.attn"]
