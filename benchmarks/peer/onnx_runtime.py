"""ONNX Runtime's CPU provider: int8 by static quantization (QDQ) and by dynamic quantization, and fp32.

Static quantization is timed as U8S8 and S8S8 activations and weights, with ONNX Runtime's default choice of
operators, and as U8S8 with only the matmuls quantized, which is more accurate. Weights have a scale per
output channel throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from peer.interface import Job, Peer, Run

FILE = "model.onnx"
MATMULS = ("MatMul", "Gemm", "Conv")
EXPORT = ("onnx", "onnxscript", "torch")
PACKAGES = ("onnxruntime", *EXPORT)


def float_model(job: Job) -> Path:
    """The model exported by torch's current exporter: LayerNorm and GELU stay single operators."""

    def make(folder: Path) -> None:
        import torch

        example = torch.from_numpy(job.images()[: job.batch])
        with torch.inference_mode():
            torch.onnx.export(
                job.torch_model(), (example,), folder / FILE, dynamo=True, external_data=False, verbose=False
            )

    return job.made_once("onnx", EXPORT, make) / FILE


def preprocessed_model(job: Job) -> Path:
    """The model after the shape inference and optimization that ONNX Runtime asks for before quantization."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def make(folder: Path) -> None:
        quant_pre_process(float_model(job), folder / FILE)

    return job.made_once("onnxruntime-preprocessed", PACKAGES, make) / FILE


def static_model(job: Job, activations: str, operators: tuple[str, ...] | None) -> Path:
    """Quantized on all images of the job; `activations`: "QUInt8" or "QInt8"; `operators`: None for all."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, np.ndarray]] = ({"x": batch} for batch in job.batches())

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    def make(folder: Path) -> None:
        quantize_static(
            preprocessed_model(job),
            folder / FILE,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType[activations],
            weight_type=QuantType.QInt8,
            op_types_to_quantize=operators,
        )

    chosen = "matmuls" if operators else "all"
    return job.made_once(f"onnxruntime-{activations}-{chosen}", PACKAGES, make) / FILE


def dynamic_model(job: Job) -> Path:
    """Weights quantized, activations at run time; signed weights, the faster kind."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def make(folder: Path) -> None:
        quantize_dynamic(
            preprocessed_model(job), folder / FILE, per_channel=True, weight_type=QuantType.QInt8
        )

    return job.made_once("onnxruntime-dynamic", PACKAGES, make) / FILE


def prepare(job: Job, *, model: partial[Path]) -> tuple[Run, str]:
    """A session on the file that `model` makes."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model(job), options, providers=["CPUExecutionProvider"])

    def run(x: np.ndarray) -> np.ndarray:
        return session.run(None, {"x": x})[0]

    return run, ""


def _peer(name: str, precision: str, model: partial[Path]) -> Peer:
    return Peer(f"onnxruntime-{name}", "ONNX Runtime", precision, PACKAGES, partial(prepare, model=model))


PEERS = (
    _peer("u8s8", "int8 static U8S8", partial(static_model, activations="QUInt8", operators=None)),
    _peer("s8s8", "int8 static S8S8", partial(static_model, activations="QInt8", operators=None)),
    _peer(
        "u8s8-matmuls", "int8 U8S8, matmuls", partial(static_model, activations="QUInt8", operators=MATMULS)
    ),
    _peer("dynamic", "int8 dynamic", partial(dynamic_model)),
    _peer("fp32", "fp32", partial(float_model)),
)
