"""What every importer returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import tvm


@dataclass
class FloatModel:
    """A model as a canonical float graph.

    Attributes
    ----------
    mod : ``main`` maps images, float32 [B, C, H, W], to logits, float32 [B, classes]; weights are constants.
    name : the timm name, the class name of a module, or the stem of a file.
    input_shape : (B, C, H, W).
    preprocessing : ``mean`` and ``std`` per channel, ``crop_pct`` and ``interpolation``, where known.
    torch_module : the module that was imported; its parameters share memory with the constants of `mod`.
    """

    mod: tvm.IRModule
    name: str
    input_shape: tuple[int, ...]
    preprocessing: dict[str, Any] | None = None
    torch_module: torch.nn.Module | None = None
