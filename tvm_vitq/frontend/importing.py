"""One entry for every kind of model."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_vitq.errors import VitqError
from tvm_vitq.frontend.model import FloatModel

if TYPE_CHECKING:
    import torch
    import tvm

MAX_IMAGE = 4096
REFMODEL = "refmodel:"
"""Before the names of the models that the package brings along, which are no names of timm's."""


def import_model(
    model: Any,
    *,
    input_shape: tuple[int, ...] | None = None,
    batch: int = 1,
    checkpoint: str | PathLike[str] | None = None,
    pretrained: bool = False,
) -> FloatModel:
    """Import a model as a canonical float graph.

    Parameters
    ----------
    model : a timm name, "refmodel:vit" and the other names of `tvm_vitq.refmodels`, an nn.Module, a
        torch.export.ExportedProgram, or the path of an .onnx file.
    input_shape : (H, W), (C, H, W) or (B, C, H, W). Default: what the model is made for; an nn.Module that
        timm did not make needs it. An ExportedProgram or ONNX file has its shape already.
    batch : images per call, fixed from here on.
    checkpoint : .safetensors, .pth or .pt file with the weights of a timm name or nn.Module.
    pretrained : take timm's pretrained weights.

    Raises
    ------
    VitqError : unknown name, unreadable or unfitting checkpoint, weights with NaN or infinity, an operator
        that is not supported (naming it and its layer), a shape that the model does not take.
    """
    import torch

    shape = _checked_shape(input_shape, batch)
    if isinstance(model, (str, Path)) and Path(model).suffix == ".onnx":
        _only_weights_inside(model, checkpoint, pretrained)
        return _onnx(Path(model), shape, batch)
    if isinstance(model, str) and model.startswith(REFMODEL):
        from tvm_vitq.refmodels import load_model

        _only_weights_inside(model, checkpoint, pretrained)
        return _module(load_model(model.removeprefix(REFMODEL)), model, shape, batch, None)
    if isinstance(model, str):
        from tvm_vitq.frontend.timm_models import create

        module = create(model, (shape[-2], shape[-1]) if shape else None, checkpoint, pretrained)
        return _module(module, model, shape, batch, None)
    if isinstance(model, torch.export.ExportedProgram):
        _only_weights_inside("ExportedProgram", checkpoint, pretrained)
        return _program(model, shape)
    if isinstance(model, torch.nn.Module):
        if pretrained:
            raise VitqError("pretrained weights exist for timm names only", got=type(model).__name__)
        return _module(model, type(model).__name__, shape, batch, checkpoint)
    raise VitqError(
        "cannot import this kind of model",
        got=type(model).__name__,
        expected="a timm name, nn.Module, torch.export.ExportedProgram or .onnx path",
    )


def _checked_shape(input_shape: tuple[int, ...] | None, batch: int) -> tuple[int, ...] | None:
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise VitqError("the batch size is not a positive whole number", got=batch)
    if input_shape is None:
        return None
    shape = tuple(input_shape)
    numbers = all(isinstance(v, int) and not isinstance(v, bool) and 0 < v <= MAX_IMAGE for v in shape)
    if not numbers or len(shape) not in (2, 3, 4):
        raise VitqError("unusable input shape", got=input_shape, expected="(H, W), (C, H, W) or (B, C, H, W)")
    shape = (3, *shape) if len(shape) == 2 else shape
    if len(shape) == 4:
        if batch not in (1, shape[0]):
            raise VitqError(
                "input_shape and batch disagree", got=f"{shape} and {batch}", fix="give the batch size once"
            )
        return shape
    return (batch, *shape)


def _only_weights_inside(where: object, checkpoint: object, pretrained: bool) -> None:
    if checkpoint is not None or pretrained:
        raise VitqError(
            "this kind of model holds its weights already",
            where=where,
            fix="leave checkpoint and pretrained out",
        )


def _module(
    module: torch.nn.Module,
    name: str,
    shape: tuple[int, ...] | None,
    batch: int,
    checkpoint: str | PathLike[str] | None,
) -> FloatModel:
    import torch

    from tvm_vitq.frontend.checkpoints import load_into
    from tvm_vitq.frontend.timm_models import default_image, preprocessing_of
    from tvm_vitq.frontend.torch_program import check_finite, import_program

    if checkpoint is not None or any(
        p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()
    ):
        module = copy.deepcopy(module).float()
    if checkpoint is not None:
        load_into(module, checkpoint)
    for key, parameter in module.named_parameters():
        check_finite(key, parameter)
    if shape is None:
        image = default_image(module)
        if image is None:
            raise VitqError(
                "the module does not say its input size", where=name, fix="pass input_shape=(3, H, W)"
            )
        shape = (batch, *image)
    program = _export(module, name, shape)
    mod, input_shape = import_program(program)
    del program
    return FloatModel(_canonical(mod), name, input_shape, preprocessing_of(module), module)


def _export(module: torch.nn.Module, name: str, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """The module traced in eval mode; its own mode is put back."""
    import torch

    modes = {m: m.training for m in module.modules()}
    example = torch.zeros(shape, device=next(module.parameters(), torch.zeros(0)).device)
    module.eval()
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,))
    except Exception as error:  # whatever the module's forward or torch.export raises
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise VitqError(
            "the module could not be traced with this input",
            where=name,
            got=lines[0],
            expected=f"a forward that takes {shape}",
            fix="check input_shape, or pass a torch.export.ExportedProgram",
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode


def _program(program: torch.export.ExportedProgram, shape: tuple[int, ...] | None) -> FloatModel:
    from tvm_vitq.frontend.torch_program import import_program

    mod, found = import_program(program)
    _same_shape(found, shape, "the ExportedProgram")
    return FloatModel(_canonical(mod), "exported_program", found)


def _onnx(path: Path, shape: tuple[int, ...] | None, batch: int) -> FloatModel:
    from tvm_vitq.frontend.onnx_model import import_onnx

    mod, found = import_onnx(path, shape, batch)
    return FloatModel(_canonical(mod), path.stem, found)


def _same_shape(found: tuple[int, ...], asked: tuple[int, ...] | None, where: str) -> None:
    if asked is not None and asked != found:
        raise VitqError(
            "the model was exported for another input shape", where=where, got=asked, expected=found
        )


def _canonical(mod: tvm.IRModule) -> tvm.IRModule:
    from tvm_vitq.frontend.canonicalize import canonicalize

    canonical = canonicalize(mod)
    main = canonical["main"]
    shape = getattr(main.ret_ty, "shape", None)
    if shape is None or len(shape) != 2:
        raise VitqError(
            "the model does not return one matrix of logits",
            got=main.ret_ty,
            expected="float32 [batch, classes]",
        )
    return canonical
