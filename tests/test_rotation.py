"""Rotations leave the function as it is, reach what they should, and decline the rest with a reason."""

import numpy as np
import pytest
import torch
from canonical_vit import GraphBuilder, tiny_mixer, tiny_vit
from test_recipes_papers import job_of
from tvm import relax

from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.orthogonal import hadamard, keeping_ones
from tvm_vitq.calibrate.rotation import rotate_heads, rotate_streams
from tvm_vitq.calibrate.streams import find_streams
from tvm_vitq.errors import VitqError
from tvm_vitq.ops import call
from tvm_vitq.relax_passes.constants import replace_constants

ROTATIONS = {"streams": rotate_streams, "heads": rotate_heads}


def reference_model(name, batch=2):
    from tvm_vitq import refmodels
    from tvm_vitq.frontend import import_model

    images = torch.from_numpy(refmodels.calibration_images()[:batch])
    return import_model(refmodels.load_model(name), input_shape=(3, 32, 32), batch=batch).mod, images


def rotated(mod, rotate, images):
    """The job, and the largest change of a logit relative to the largest logit."""
    job = job_of(mod)
    before = Executor(mod).run(images)
    rotate(job)
    after = Executor(job.mod).run(images)
    return job, float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("size", [3, 24, 32, 48, 50, 64, 128, 384])
@pytest.mark.parametrize("make", [hadamard, keeping_ones])
def test_matrices(make, size):
    matrix = make(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-9, rtol=0)
    exact = make is hadamard and size in (32, 64, 128)
    assert float(matrix.abs().max()) * size**0.5 < (1.001 if exact else 3.5)
    if make is keeping_ones:
        torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64))
    other = make(size, torch.Generator().manual_seed(1))
    assert not torch.equal(matrix, other) and torch.equal(
        matrix, make(size, torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("rotate", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("options", [{"gated": True, "bias": True}, {"pool": "mean", "attention": "sigmoid"}])
def test_small_models_keep_their_function(rotate, options):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mod = tiny_vit(**options)
    job, change = rotated(mod, rotate, images)
    assert change < 1e-5 and not job.notes
    first, second = Executor(mod).constants, job.executor.constants
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    if rotate is rotate_heads:
        parts = ("qkv.weight", "qkv.bias", "proj.weight")
        assert moved == {f"blocks.{i}.attn.{part}" for i in range(2) for part in parts}
    else:
        written = {f"blocks.{i}.mlp.fc2.{role}" for i in range(2) for role in ("weight", "bias")}
        assert written | {"pos_embed.1", "patch_embed.proj.weight", "head.weight", "head.bias"} <= moved
        assert not {"blocks.0.attn.3", "blocks.1.attn.3"} & moved


@pytest.mark.parametrize("rotate", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("name", ["vit_outlier", "swin"])
def test_reference_models_keep_their_function(rotate, name):
    mod, images = reference_model(name)
    job, change = rotated(mod, rotate, images)
    assert change < 1e-5
    if name == "swin" and rotate is rotate_streams:
        assert job.notes.keys() == {"patch_embed.norm", "layers.0.blocks.0.norm1", "layers.1.blocks.0.norm1"}
        assert "channels moved" in job.notes["layers.1.blocks.0.norm1"]
    else:
        assert not job.notes


def test_streams_of_deit():
    from tvm_vitq.frontend import import_model

    (stream,) = find_streams(import_model("deit_tiny_patch16_224").mod)
    assert not stream.declined and stream.width == 192 and len(stream.norms) == 25
    layers = [f"blocks.{i}.{part}" for i in range(12) for part in ("attn.proj", "mlp.fc2")]
    assert sorted(stream.writers) == sorted(["patch_embed.proj", *layers])
    assert len(stream.readers) == 25 and len(stream.constants) == 2
    assert stream.norms["norm"] == ["head"]


def test_outliers_spread():
    """Wide channels of LayerNorm outputs are no channels after rotation."""
    mod, images = reference_model("vit_outlier", 4)
    job = job_of(mod)

    def widest(executor):
        x = executor.run_between("x", "blocks.2.norm2", images).abs().amax((0, 1))
        return float(x.max() / x.median())

    before = widest(job.executor)
    norms = rotate_streams(job)
    assert len(norms) == 13 and widest(job.executor) < 3 < 0.5 * before
    for norm in norms:
        assert (job.executor.constants[f"{norm}.gamma"] == 1).all()
        assert not job.executor.constants[f"{norm}.beta"].any()


def test_declined():
    job = job_of(tiny_mixer())
    assert not rotate_streams(job) and "channels moved" in job.notes["blocks.0.norm2"]
    build = GraphBuilder(0)
    image = relax.Var("x", relax.TensorType((2, 3, 16, 16), "float32"))
    with build.block.function("main", [image]):
        with build.block.dataflow():
            x = build.layer_norm(build.patches(image, 4, 32), "norm")
            qkv = build.layer_norm(build.linear(x, 96, "qkv"), "qkv_norm")
            heads = [build.heads(qkv, i, 2, n) for i, n in enumerate("qkv")]
            mixed = build.emit(call("vitq.attention", heads, site="attn", scale=0.25, kind="softmax"), "attn")
            flat = build.emit(relax.op.reshape(mixed, (2, 16 * 32)), "flat")
            result = build.block.emit_output(build.linear(flat, 10, "head"), name_hint="logits")
        build.block.emit_func_output(result)
    job = job_of(build.block.get())
    rotate_heads(job)
    assert job.notes["attn"] == (
        "q and k not rotated: vitq.layer_norm makes q; v not rotated: vitq.layer_norm makes v"
    )
    assert rotate_streams(job) == {"norm"} and "qkv_norm" in job.notes


def test_constants_of_any_operator_are_replaced():
    mod = tiny_vit()
    constants = Executor(mod).constants
    token = constants["cls_token.0.0"].numpy()
    new = Executor(
        replace_constants(mod, {"cls_token.0.0": token + 1, "pos_embed.1": 0 * constants["pos_embed.1"]})
    )
    np.testing.assert_array_equal(new.constants["cls_token.0.0"], token + 1)
    assert not new.constants["pos_embed.1"].any()
    with pytest.raises(VitqError, match="no such constant"):
        replace_constants(mod, {"cls_token.0.1": token})
