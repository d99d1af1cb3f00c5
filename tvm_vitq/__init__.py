"""Quantizes Vision Transformers after training and compiles them with TVM to bit-exact integer kernels.

The import is cheap: torch and tvm are loaded by the functions that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvm_vitq.errors import VitqError

if TYPE_CHECKING:
    from tvm_vitq.api import build, compile, load, quantize, tune
    from tvm_vitq.evaluation import evaluate
    from tvm_vitq.runtime import load_library

__version__ = "0.1.0"

_HOME = {
    "quantize": "tvm_vitq.api",
    "compile": "tvm_vitq.api",
    "tune": "tvm_vitq.api",
    "build": "tvm_vitq.api",
    "load": "tvm_vitq.api",
    "load_library": "tvm_vitq.runtime",
    "evaluate": "tvm_vitq.evaluation",
}

__all__ = [
    "VitqError",
    "__version__",
    "build",
    "compile",
    "evaluate",
    "load",
    "load_library",
    "quantize",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tvm_vitq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
