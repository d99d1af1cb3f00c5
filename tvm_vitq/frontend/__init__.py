"""Importers: timm names, torch modules and programs, ONNX files; all give a canonical float graph."""

from __future__ import annotations

from tvm_vitq.frontend.importing import import_model
from tvm_vitq.frontend.model import FloatModel

__all__ = ["FloatModel", "import_model"]
