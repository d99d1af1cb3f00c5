"""Loads the reference models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.refmodels.architectures import ARCHITECTURES, IMAGE_SIZE, build
from tvm_vitq.refmodels.images import MEAN, STD, data_file
from tvm_vitq.refmodels.outliers import add_outliers

if TYPE_CHECKING:
    from torch import nn

_OUTLIER = "_outlier"


def names() -> list[str]:
    """Every name that `load_model` knows."""
    return [name + suffix for name in ARCHITECTURES for suffix in ("", _OUTLIER)]


def load_model(name: str) -> nn.Module:
    """A trained reference model in eval mode, float32.

    Parameters
    ----------
    name : one of `names()`. The outlier variants are made at loading by `add_outliers` with its defaults.

    Raises
    ------
    VitqError
        Unknown name, or missing or damaged weights.
    """
    if name not in names():
        raise VitqError(
            "unknown reference model",
            got=name,
            expected=", ".join(names()),
            fix=f"nearest names: {nearest(name, names())}" if nearest(name, names()) else None,
        )
    from safetensors import SafetensorError
    from safetensors.torch import load

    base = name.removesuffix(_OUTLIER)
    path = data_file(f"{base}.safetensors")
    model = build(base)
    try:
        model.load_state_dict({key: value.float() for key, value in load(path.read_bytes()).items()})
    except (SafetensorError, RuntimeError) as error:
        raise VitqError(
            "the weights of a reference model cannot be read",
            where=str(path),
            got=str(error),
            fix="reinstall the package",
        ) from error
    # What timm's own models carry: the image size and how images are normalized.
    model.pretrained_cfg = {
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    model.eval().requires_grad_(False)
    return add_outliers(model) if name.endswith(_OUTLIER) else model
