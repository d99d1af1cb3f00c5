"""Small trained models with their images: something real to quantize without a download.

`names()` lists a ViT and a Swin, each also as a variant of the same function with the outlier channels of
large pretrained Transformers (see `add_outliers`). The images are procedural, 32x32, 36 classes; test images
come from sources the models never saw. The image accessors need only NumPy; `load_model` loads torch and
timm. Images and weights are made by tools/refmodels of the repository.
"""

from __future__ import annotations

from tvm_vitq.refmodels.images import (
    MEAN,
    STD,
    calibration_images,
    calibration_images_uint8,
    class_names,
    meta,
    more_test_images,
    normalize,
    test_set,
    test_set_uint8,
)
from tvm_vitq.refmodels.models import load_model, names
from tvm_vitq.refmodels.outliers import add_outliers

__all__ = [
    "MEAN",
    "STD",
    "add_outliers",
    "calibration_images",
    "calibration_images_uint8",
    "class_names",
    "load_model",
    "meta",
    "more_test_images",
    "names",
    "normalize",
    "test_set",
    "test_set_uint8",
]
