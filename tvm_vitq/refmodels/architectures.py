"""The two reference architectures, built from timm's own classes."""

from __future__ import annotations

from typing import Any

IMAGE_SIZE = 32
CLASS_COUNT = 36

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": (
        "timm.models.vision_transformer",
        "VisionTransformer",
        {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
    "swin": (
        "timm.models.swin_transformer",
        "SwinTransformer",
        {"patch_size": 2, "embed_dim": 48, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "window_size": 4},
    ),
}
"""Name: (module, class, arguments beyond image size and class count).

The ViT sees 8x8 patches and a class token; the three Swin stages see 16x16, 8x8 and 4x4 tokens through 4x4
windows, shifted in every second block of the first two.
"""


def build(name: str) -> Any:
    """The untrained torch module of an architecture in `ARCHITECTURES`."""
    import importlib

    module, cls, arguments = ARCHITECTURES[name]
    return getattr(importlib.import_module(module), cls)(
        img_size=IMAGE_SIZE, num_classes=CLASS_COUNT, **arguments
    )
