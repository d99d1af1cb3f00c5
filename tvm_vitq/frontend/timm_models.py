"""Models by timm name."""

from __future__ import annotations

from os import PathLike
from pathlib import PurePath
from typing import Any

import timm
import torch

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.frontend.checkpoints import SUFFIXES, load_into, read_checkpoint


def create(
    name: str, image: tuple[int, int] | None, checkpoint: str | PathLike[str] | None, pretrained: bool
) -> torch.nn.Module:
    """A timm model for images of the given height and width (default: the model's own) with its weights.

    A checkpoint with another number of classes makes the model have that many.

    Raises
    ------
    VitqError : unknown name (listing the nearest), unknown pretrained tag, unreachable weights, a size that
        the model cannot take, a checkpoint that does not fit.
    """
    architecture = name.split(".")[0]
    if not name.startswith(("hf_hub:", "hf-hub:")) and not timm.is_model(architecture):
        close = nearest(architecture, timm.list_models(), 5)
        raise VitqError(
            "unknown model name",
            where="model",
            got=name,
            expected=close or "a name that timm.list_models() has, refmodel:vit, or an .onnx file",
            fix="give the architecture's timm name, and the file as checkpoint"
            if PurePath(name).suffix in SUFFIXES
            else None,
        )
    if pretrained and checkpoint is not None:
        raise VitqError(
            "both pretrained weights and a checkpoint file are asked for", where=name, fix="give one of them"
        )
    options: dict[str, Any] = {}
    state = None
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
        options.update(_class_count(name, state))
    cfg_size = tuple(_config(name).get("input_size", ()))[-2:]
    if image is not None and image != cfg_size:
        options["img_size"] = image
    module = _build(name, pretrained, options)
    if checkpoint is not None:
        load_into(module, checkpoint, state)
    return module.eval()


def _build(name: str, pretrained: bool, options: dict[str, Any]) -> torch.nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        if "img_size" in options and "img_size" in str(
            error
        ):  # convolutional: takes any size without being told
            return _build(name, pretrained, {k: v for k, v in options.items() if k != "img_size"})
        raise VitqError("timm could not build the model", where=name, got=error) from error
    except Exception as error:  # unknown tag, no network, a size that does not divide
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VitqError(
            "timm could not load the model with pretrained weights"
            if pretrained
            else "timm could not build the model",
            where=name,
            got=text,
            fix="check the network, or pass checkpoint=" if pretrained else None,
        ) from error


def _config(name: str) -> dict[str, Any]:
    """timm's pretrained configuration of a name; empty where it has none."""
    if name.startswith(("hf_hub:", "hf-hub:")):
        return {}
    config = timm.get_pretrained_cfg(name.split(".")[0])
    return config.to_dict() if config is not None else {}


def _class_count(name: str, state: dict[str, torch.Tensor]) -> dict[str, int]:
    classifier = _config(name).get("classifier") or "head"
    for key in classifier if isinstance(classifier, (list, tuple)) else (classifier,):
        weight = state.get(f"{key}.weight")
        if weight is not None and weight.ndim >= 2:
            return {"num_classes": int(weight.shape[0])}
    return {}


def preprocessing_of(module: torch.nn.Module) -> dict[str, Any] | None:
    """mean, std, crop_pct and interpolation of a timm module, else None."""
    if not hasattr(module, "pretrained_cfg"):
        return None
    config = timm.data.resolve_data_config({}, model=module)
    return {
        "mean": [float(v) for v in config["mean"]],
        "std": [float(v) for v in config["std"]],
        "crop_pct": float(config["crop_pct"]),
        "interpolation": str(config["interpolation"]),
    }


def default_image(module: torch.nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) that a timm module was made for, else None."""
    config = getattr(module, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is None:
        return None
    channels, height, width = (int(v) for v in size)
    embed = getattr(module, "patch_embed", None)
    made_for = getattr(embed, "img_size", None)  # differs from the configuration where img_size was passed
    if isinstance(made_for, (tuple, list)) and len(made_for) == 2:
        height, width = int(made_for[0]), int(made_for[1])
    return channels, height, width
