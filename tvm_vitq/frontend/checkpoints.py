"""Weights from .safetensors, .pth and .pt files, with every misfit told by name."""

from __future__ import annotations

import sys
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from tvm_vitq.errors import VitqError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training scripts keep the weights; averaged ones are preferred, as timm does."""


def read_checkpoint(path: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by parameter name.

    Raises
    ------
    VitqError : no such file, another kind of file, truncated or damaged, or no tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise VitqError("checkpoint file does not exist", where=path, fix="check the path")
    if path.suffix not in SUFFIXES:
        raise VitqError(
            "checkpoint file is of an unknown kind", where=path, got=path.suffix, expected=", ".join(SUFFIXES)
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many types for a damaged file
        raise VitqError(
            "checkpoint file cannot be read: truncated, damaged, or more than plain weights",
            where=path,
            got=f"{type(error).__name__}: {error}".split(". ")[0].splitlines()[0],
            fix="copy it again, or save model.state_dict() alone",
        ) from error
    for key in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    tensors = (
        {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)} if isinstance(loaded, dict) else {}
    )
    if not tensors:
        raise VitqError(
            "checkpoint file holds no weights",
            where=path,
            got=type(loaded).__name__,
            expected="a state dict of tensors",
            fix="save model.state_dict() alone",
        )
    prefix = "module."  # left by DataParallel
    return {k.removeprefix(prefix): v for k, v in tensors.items()}


def fit(
    module: torch.nn.Module, state: dict[str, torch.Tensor], path: str | PathLike[str]
) -> dict[str, torch.Tensor]:
    """`state` in the module's own layout where timm knows how; refuses keys and shapes that do not fit."""
    filter_fn = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if misfits(module, state) and filter_fn is not None:
        try:
            converted = filter_fn(dict(state), module)
        except Exception:  # not one of the layouts that timm converts: report the file as it is
            converted = state
        if not misfits(module, converted):
            return converted
    found = misfits(module, state)
    if found:
        raise VitqError(
            "checkpoint does not fit the model",
            where=path,
            got=_shortened(found),
            expected=f"the weights of {type(module).__name__}",
            fix="name the model that the checkpoint was trained as",
        )
    return state


def misfits(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Missing, unexpected and wrongly shaped entries, one sentence each."""
    own = module.state_dict()
    found = [f"missing {k}" for k in own if k not in state]
    found += [f"unexpected {k}" for k in state if k not in own]
    found += [
        f"{k} is {list(state[k].shape)} instead of {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    return found


def _shortened(found: list[str], limit: int = 6) -> str:
    rest = len(found) - limit
    return "; ".join(found[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def load_into(
    module: torch.nn.Module, path: str | PathLike[str], state: dict[str, torch.Tensor] | None = None
) -> None:
    """Load a checkpoint file into a module."""
    module.load_state_dict(fit(module, read_checkpoint(path) if state is None else state, path))
