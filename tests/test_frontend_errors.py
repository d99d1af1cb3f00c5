"""Bad input: every refusal names what, where and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from frontend_checks import calls
from safetensors.torch import save_file
from torch import nn

from tvm_vitq.errors import VitqError
from tvm_vitq.frontend import import_model
from tvm_vitq.relax_passes.rewriter import value_of

NAME = "deit_tiny_patch16_224"


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


SHAPE = (3, 2, 2)


def refused(*parts: str, model: object, **options: object) -> None:
    with pytest.raises(VitqError) as caught:
        import_model(model, **options)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_unknown_name_lists_the_nearest() -> None:
    refused("unknown model name", "deit_tiny_patch16_223", NAME, model="deit_tiny_patch16_223")


def test_unusable_kinds_and_shapes() -> None:
    refused("cannot import", "int", model=3)
    refused("does not say its input size", "Tiny", model=Tiny())
    refused("unusable input shape", "(0, 3)", model=Tiny(), input_shape=(0, 3))
    refused("batch size", "0", model=Tiny(), input_shape=SHAPE, batch=0)
    refused("disagree", model=Tiny(), input_shape=(2, *SHAPE), batch=3)
    refused("could not be traced", "(1, 3, 5, 5)", model=Tiny(), input_shape=(5, 5))
    refused("pretrained weights exist for timm names only", model=Tiny(), input_shape=SHAPE, pretrained=True)


def test_weights_that_are_not_finite() -> None:
    module = Tiny()
    with torch.no_grad():
        module.fc.weight[1, 2] = torch.nan
    refused("NaN or infinity", "fc.weight", "1 of 48", model=module, input_shape=SHAPE)


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(self.inner(x.flatten(1)))[1]


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


class Noisy(Tiny):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand(4)


class Two(Tiny):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


def test_programs_that_cannot_be_graphs() -> None:
    refused("not supported", "part", "qr", model=Holder(Sorted()), input_shape=SHAPE)
    refused("random", model=Noisy(), input_shape=SHAPE)
    refused("one tensor", "2 outputs", model=Two(), input_shape=SHAPE)
    refused("matrix of logits", model=nn.Conv2d(3, 4, 1), input_shape=SHAPE)
    program = torch.export.export(Tiny(), (torch.zeros(1, *SHAPE),))
    refused("another input shape", model=program, input_shape=(2, *SHAPE))
    refused("holds its weights already", model=program, checkpoint="weights.pth")


def test_training_mode_is_put_back() -> None:
    module = Holder(nn.Sequential(Tiny(), nn.Dropout(0.5))).train()
    module.part[1].eval()
    import_model(module, input_shape=SHAPE)
    assert module.training and module.part[0].training and not module.part[1].training


def test_half_precision_modules_become_float32() -> None:
    module = Tiny().half()
    model = import_model(module, input_shape=SHAPE)
    assert module.fc.weight.dtype == torch.float16, "the user's module is left alone"
    assert value_of(calls(model, "vitq.linear")["fc"].args[1]).dtype == "float32"


def test_checkpoints(tmp_path: Path) -> None:
    module = Tiny()
    state = {k: v + 1 for k, v in module.state_dict().items()}
    save_file(state, tmp_path / "good.safetensors")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "good.pth"
    )
    for name in ("good.safetensors", "good.pth"):
        model = import_model(module, input_shape=SHAPE, checkpoint=tmp_path / name)
        assert (value_of(calls(model, "vitq.linear")["fc"].args[1]) == state["fc.weight"].numpy()).all()
    assert not torch.equal(module.fc.weight, state["fc.weight"]), "the user's module is left alone"

    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:300])
    (tmp_path / "weights.txt").write_text("no")
    save_file({"fc.weight": torch.zeros(5, 12), "extra": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, *parts in (
        ("missing.pth", "does not exist"),
        ("weights.txt", "unknown kind", ".safetensors"),
        ("cut.safetensors", "cannot be read", "truncated"),
        ("cut.pth", "cannot be read", "truncated"),
        ("list.pt", "no weights"),
        (
            "other.safetensors",
            "does not fit",
            "missing fc.bias",
            "unexpected extra",
            "[5, 12] instead of [4, 12]",
        ),
    ):
        refused(name, *parts, model=module, input_shape=SHAPE, checkpoint=tmp_path / name)


def test_checkpoint_of_a_timm_name_sets_the_class_count(tmp_path: Path) -> None:
    options = {"depth": 12, "num_classes": 7, "img_size": 32}
    source = timm.create_model("vit_tiny_patch16_224", **options)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = import_model("vit_tiny_patch16_224", input_shape=(32, 32), checkpoint=tmp_path / "w.safetensors")
    assert model.torch_module is not None and model.torch_module.head.out_features == 7
    refused("does not fit", model="deit_small_patch16_224", checkpoint=tmp_path / "w.safetensors")
    refused("both", model=NAME, pretrained=True, checkpoint=tmp_path / "w.safetensors")
