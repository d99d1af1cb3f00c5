"""timm models: each architecture once, small, against torch; what is left of it in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from frontend_checks import calls, check, images, largest_error, lively, operators

from tvm_vitq.frontend import import_model
from tvm_vitq.frontend.canonicalize import bindings_of, float_islands
from tvm_vitq.ops import attrs, op_name, shape_of
from tvm_vitq.relax_passes.rewriter import value_of

NARROW = {"depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


def small(name: str, **options: Any) -> Any:
    return lively(timm.create_model(name, **options))


def test_deit_canonical_form() -> None:
    module = small("deit_tiny_patch16_224", img_size=48, **NARROW)
    model = check(module, (2, 3, 48, 48))
    assert set(calls(model, "vitq.linear")) == {
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "head",
    }
    assert set(calls(model, "vitq.attention")) == {"blocks.0.attn"}
    attention = attrs(calls(model, "vitq.attention")["blocks.0.attn"])
    assert attention["kind"] == "softmax" and attention["scale"] == pytest.approx(8**-0.5)
    assert attrs(calls(model, "vitq.activation")["blocks.0.mlp.act"])["kind"] == "gelu"
    # q, k, v are column ranges of their projection; the position embedding is added once, to the patches
    slices = [b for b in bindings_of(model.mod) if op_name(b.value) == "relax.strided_slice"]
    assert [b.value.args[0].name for b in slices][:3] == ["blocks.0.attn.qkv"] * 3
    assert operators(model)["relax.add"] == 3
    assert model.preprocessing is not None and len(model.preprocessing["mean"]) == 3


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, (32, 32)),
        ("deit3_small_patch16_224", {"img_size": 32}, (32, 32)),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 42}, (42, 28)),
        ("vit_base_patch32_224", {"img_size": 64, "qk_norm": True}, (64, 64)),
        (
            "vit_tiny_patch16_224",
            {
                "img_size": (18, 30),
                "patch_size": 6,
                "qkv_bias": False,
                "class_token": False,
                "global_pool": "avg",
            },
            (18, 30),
        ),
        ("beit_base_patch16_224", {"img_size": 48}, (48, 48)),
    ],
)
def test_vision_transformers(name: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    if name.endswith("reg4_dinov2"):
        options = {**options, "img_size": size}
    module = small(name, **NARROW, **options)
    model = check(module, (1, 3, *size))
    counts = operators(model)
    assert counts["vitq.linear"] == (7 if "distilled" in name else 6)
    assert counts["vitq.attention"] == counts["vitq.activation"] == 1
    assert counts["relax.multiply"] == 0, "LayerScale, averaged heads and attention scales are folded"
    if name.startswith("beit"):
        assert "blocks.0.attn.qkv" in calls(model, "vitq.linear")
        assert shape_of(calls(model, "vitq.attention")["blocks.0.attn"].args[3]) == [1, 3, 10, 10]


def test_swin_windows() -> None:
    module = small(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        depths=(2, 1),
        embed_dim=12,
        num_heads=(2, 4),
        num_classes=5,
    )
    model = check(module, (1, 3, 56, 56))
    # bias per head, mask per window
    shifted = calls(model, "vitq.attention")["layers.0.blocks.1.attn"]
    assert [shape_of(a) for a in shifted.args[3:]] == [[1, 2, 49, 49], [4, 1, 49, 49]]
    # window reverse and roll went above the projection: it is added to the residual as it is
    added = [a.name for call in calls(model, "relax.add").values() for a in call.args if hasattr(a, "name")]
    for block in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"):
        assert f"{block}.attn.proj" in added and f"{block}.mlp.fc2" in added


def test_mixer() -> None:
    from timm.models.mlp_mixer import MlpMixer

    module = lively(MlpMixer(num_classes=5, img_size=32, patch_size=16, num_blocks=2, embed_dim=24))
    model = check(module, (1, 3, 32, 32))
    assert operators(model)["vitq.linear"] == 10 and "vitq.mean" in operators(model)


def test_float_islands_still_compute() -> None:
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    module = lively(
        PyramidVisionTransformerV2(
            num_classes=5,
            depths=(1, 1),
            embed_dims=(8, 16),
            num_heads=(1, 2),
            sr_ratios=(2, 1),
            mlp_ratios=(2, 2),
        )
    )
    model = import_model(module, input_shape=(3, 32, 32))
    assert set(float_islands(model.mod)) == {"relax.nn.conv2d"}
    assert largest_error(model, module, images((1, 3, 32, 32))) < 1e-5


def test_batch_norm_and_one_by_one_convolutions_vanish() -> None:
    from timm.models.levit import Levit

    module = lively(
        Levit(
            img_size=32,
            num_classes=5,
            embed_dim=(16, 24),
            key_dim=8,
            depth=(1, 1),
            num_heads=(1, 2),
            mlp_ratio=2,
        )
    )
    model = import_model(module, input_shape=(3, 32, 32))
    assert set(float_islands(model.mod)) == {"relax.nn.conv2d"}
    assert largest_error(model, module, images((1, 3, 32, 32))) < 1e-5


def test_import_is_repeatable_and_shares_memory() -> None:
    module = small("deit_tiny_patch16_224", img_size=32, **NARROW)
    first, second = (import_model(module, input_shape=(32, 32), batch=2) for _ in range(2))
    assert first.input_shape == (2, 3, 32, 32)
    assert [b.var.name for b in bindings_of(first.mod)] == [b.var.name for b in bindings_of(second.mod)]
    assert value_of(calls(first, "vitq.linear")["head"].args[1]).ctypes.data == module.head.weight.data_ptr()
