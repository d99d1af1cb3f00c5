"""What the frontend tests share: small models, evaluation by TVM, structural questions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tvm_vitq.frontend import FloatModel, import_model
from tvm_vitq.frontend.canonicalize import bindings_of, float_islands
from tvm_vitq.ops import attrs, is_ours, op_name
from tvm_vitq.relax_passes.decompose_canonical import run_float

torch.set_num_threads(1)


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Eval mode, with vectors and tables away from their initial zeros and ones, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def images(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest_error(model: FloatModel, module: nn.Module, x: torch.Tensor) -> float:
    """Largest difference between graph and module, relative to the largest logit."""
    with torch.no_grad():
        expected = module(x).numpy()
    found = run_float(model.mod, x.numpy())
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def operators(model: FloatModel) -> Counter[str]:
    return Counter(op_name(b.value) for b in bindings_of(model.mod))


def calls(model: FloatModel, operator: str) -> dict[str, Any]:
    """Calls of one operator by variable name."""
    return {b.var.name: b.value for b in bindings_of(model.mod) if op_name(b.value) == operator}


def check(
    module: nn.Module | str | Path,
    shape: tuple[int, ...],
    torch_module: nn.Module | None = None,
    **options: Any,
) -> FloatModel:
    """Import, compare with torch, and require that nothing but the canonical vocabulary is left."""
    model = import_model(module, input_shape=shape, **options)
    reference = torch_module or model.torch_module
    assert reference is not None
    assert largest_error(model, reference, images(shape)) < 1e-5
    assert not float_islands(model.mod)
    check_names(model)
    return model


def check_names(model: FloatModel) -> None:
    """Unique variable names; operators of ours are called like their site."""
    names = [b.var.name for b in bindings_of(model.mod)]
    assert len(set(names)) == len(names)
    for binding in bindings_of(model.mod):
        if is_ours(binding.value):
            assert attrs(binding.value)["site"] == binding.var.name
