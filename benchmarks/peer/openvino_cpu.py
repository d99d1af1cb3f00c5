"""OpenVINO's CPU plugin: int8 by NNCF's post-training quantization for transformers, fp32, and bf16.

The model is converted from torch, which is OpenVINO's documented way (from ONNX it runs equally fast).
NNCF quantizes OpenVINO's own graph; `model_type=TRANSFORMER` is what its documentation asks for, without it
the int8 model is slower. On CPUs with bf16 dot products the plugin computes in bf16 what is not int8, unless
told otherwise: int8 keeps that default, fp32 is told otherwise.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peer.interface import Job, Peer, Run, Unsupported

FLOAT, INT8 = "float.xml", "int8.xml"


def float_model(job: Job) -> Path:
    """The converted model."""
    import openvino

    def make(folder: Path) -> None:
        import torch

        example = torch.from_numpy(job.images()[: job.batch])
        model = openvino.convert_model(job.torch_model(), example_input=example, input=list(example.shape))
        openvino.save_model(model, folder / FLOAT, compress_to_fp16=False)

    return job.made_once("openvino", ("openvino", "torch"), make) / FLOAT


def int8_model(job: Job) -> Path:
    """The model quantized by NNCF on all images of the job."""
    import nncf
    import openvino

    def make(folder: Path) -> None:
        batches = list(job.batches())
        quantized = nncf.quantize(
            openvino.Core().read_model(float_model(job)),
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
        )
        openvino.save_model(quantized, folder / INT8, compress_to_fp16=False)

    return job.made_once("openvino-nncf", ("openvino", "nncf", "torch"), make) / INT8


def prepare(job: Job, *, kind: str) -> tuple[Run, str]:
    """`kind`: "int8", "fp32" or "bf16"."""
    import openvino

    core = openvino.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    if kind == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unsupported("this CPU has no bf16 dot products")
    if kind != "int8":
        settings["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[kind]
    file = int8_model(job) if kind == "int8" else float_model(job)
    compiled = core.compile_model(core.read_model(file), "CPU", settings)
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> np.ndarray:
        # Shared: without the copies of input and output, which OpenVINO can do without.
        return request.infer({0: x}, share_inputs=True, share_outputs=True)[0]

    rest = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    streams = compiled.get_property("NUM_STREAMS")
    return run, f"not quantized: {rest}, {streams} stream(s)" if kind == "int8" else f"{streams} stream(s)"


PEERS = (
    Peer(
        "openvino-int8",
        "OpenVINO, NNCF",
        "int8",
        ("openvino", "nncf", "torch"),
        partial(prepare, kind="int8"),
    ),
    Peer("openvino-bf16", "OpenVINO", "bf16", ("openvino", "torch"), partial(prepare, kind="bf16")),
    Peer("openvino-fp32", "OpenVINO", "fp32", ("openvino", "torch"), partial(prepare, kind="fp32")),
)
