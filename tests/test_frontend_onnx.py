"""ONNX files of both torch exporters, and the refusals of bad ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from frontend_checks import calls, check, lively, operators

from tvm_vitq.errors import VitqError
from tvm_vitq.frontend import import_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

SHAPE = (1, 3, 32, 32)


def model() -> torch.nn.Module:
    options = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return lively(timm.create_model("deit_tiny_patch16_224", **options))


def export(module: torch.nn.Module, path: Path, modern: bool) -> Path:
    """The torch.export exporter, or the older one at an opset that has neither LayerNorm nor GELU."""
    extra = (
        {"dynamo": True, "external_data": False, "verbose": False}
        if modern
        else {"dynamo": False, "opset_version": 14}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.zeros(SHAPE),), path, **extra)
    return path


@pytest.mark.parametrize("modern", [True, False])
def test_exported_vit(tmp_path: Path, modern: bool) -> None:
    module = model()
    found = check(export(module, tmp_path / "vit.onnx", modern), SHAPE, torch_module=module)
    assert found.name == "vit" and found.input_shape == SHAPE
    assert set(calls(found, "vitq.linear")) == {
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "head",
    }
    assert set(calls(found, "vitq.attention")) == {"blocks.0.attn"}
    assert operators(found)["vitq.layer_norm"] == 3 and operators(found)["vitq.activation"] == 1


def tiny(path: Path, operator: str = "Relu", batch: int | str = 1, bias: float = 0.0) -> Path:
    """Flatten, one weight, one operator."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.full((12, 4), bias, "float32"), "layer.weight")
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "layer.weight"], ["product"]),
            helper.make_node(operator, ["product"], ["logits"], name="last"),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", kind, [batch, 3, 2, 2])],
        [helper.make_tensor_value_info("logits", kind, [batch, 4])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_open_batch_is_fixed_at_import(tmp_path: Path) -> None:
    found = import_model(tiny(tmp_path / "open.onnx", batch="n"), batch=3)
    assert found.input_shape == (3, 3, 2, 2) and list(calls(found, "vitq.linear")) == ["layer"]


def test_refusals(tmp_path: Path) -> None:
    good = tiny(tmp_path / "good.onnx")
    (tmp_path / "cut.onnx").write_bytes(good.read_bytes()[:60])
    cases = [
        ("does not exist", tmp_path / "none.onnx", {}),
        ("cannot be read", tmp_path / "cut.onnx", {}),
        ("Det", tiny(tmp_path / "operator.onnx", "Det"), {}),
        ("layer.weight", tiny(tmp_path / "nan.onnx", bias=float("nan")), {}),
        ("another batch size", good, {"batch": 2}),
        ("another input shape", good, {"input_shape": (3, 4, 4)}),
        ("holds its weights already", good, {"checkpoint": "w.pth"}),
    ]
    for text, path, options in cases:
        with pytest.raises(VitqError, match=text):
            import_model(path, **options)
