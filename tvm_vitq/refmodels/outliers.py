"""Outlier channels of large pretrained Transformers, added to a model without changing its function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tvm_vitq.errors import VitqError

if TYPE_CHECKING:
    from torch import nn


def normalized_linears(model: nn.Module) -> list[tuple[str, nn.LayerNorm, list[nn.Linear]]]:
    """Every LayerNorm whose output enters linear layers and nothing else, by module path, with those layers.

    Known structures: a timm block (`norm1` before `attn.qkv`, `norm2` before `mlp.fc1`), Swin's patch merging
    (`norm` before `reduction`), the last `norm` before `head` (ViT with class token) or `head.fc` (Swin,
    where the mean over tokens lies between, which commutes with the division).
    """
    from torch import nn

    consumers = {"norm1": ("attn.qkv",), "norm2": ("mlp.fc1",), "norm": ("reduction", "head.fc", "head")}
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.LayerNorm):
            continue
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        for consumer in consumers.get(name, ()):
            try:
                linear = parent.get_submodule(consumer)
            except AttributeError:
                continue
            if isinstance(linear, nn.Linear) and linear.in_features == module.normalized_shape[-1]:
                found.append((path, module, [linear]))
                break
    return found


def add_outliers(
    model: nn.Module, fraction: float = 0.08, low: float = 8.0, high: float = 40.0, seed: int = 0
) -> nn.Module:
    """Scales channels of every LayerNorm up and the next linear layer's columns down, in place.

    For a seeded choice of ``max(1, round(fraction · C))`` channels c of each LayerNorm and factors f_c drawn
    log-uniformly from [low, high]::

        gamma_c ← f_c · gamma_c,  beta_c ← f_c · beta_c,  W_{:, c} ← W_{:, c} / f_c

    so that W · LN(x) stays what it was up to rounding, while a per-tensor quantizer of LN(x) must now span
    f_c times the range. 5–10 % of channels times 8–40 is what pretrained ViTs show.

    Parameters
    ----------
    model : a timm ViT or Swin (see `normalized_linears`).
    fraction : share of the channels of each LayerNorm, in (0, 1].
    low, high : bounds of the factors, 0 < low <= high.
    seed : of the choice of channels and factors.

    Returns
    -------
    The same module.

    Raises
    ------
    VitqError
        Arguments out of range, or no LayerNorm followed by a linear layer in the model.
    """
    import torch

    if not 0 < fraction <= 1:
        raise VitqError(
            "the share of outlier channels is out of range", got=fraction, expected="0 < fraction <= 1"
        )
    if not 0 < low <= high:
        raise VitqError("the outlier factors are out of range", got=(low, high), expected="0 < low <= high")
    pairs = normalized_linears(model)
    if not pairs:
        raise VitqError(
            "no LayerNorm followed by a linear layer",
            where=type(model).__name__,
            expected="a timm ViT or Swin",
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for _, norm, linears in pairs:
            width = norm.normalized_shape[-1]
            channels = rng.choice(width, max(1, round(fraction * width)), replace=False)
            factors = torch.ones(width)
            factors[torch.from_numpy(channels)] = torch.from_numpy(
                np.exp(rng.uniform(np.log(low), np.log(high), len(channels))).astype(np.float32)
            )
            norm.weight *= factors
            norm.bias *= factors
            for linear in linears:
                linear.weight /= factors
    return model
