"""torch: eager fp32, compiled fp32, and dynamic int8 of the linear layers."""

from __future__ import annotations

from functools import partial

import numpy as np

from peer.interface import Job, Peer, Run, Unsupported


def prepare(job: Job, *, kind: str) -> tuple[Run, str]:
    """`kind`: "eager", "compile" or "dynamic"."""
    import torch

    torch.set_num_threads(job.threads)
    model, note = job.torch_model(), ""
    if kind == "dynamic":
        model, note = _dynamic(model)
    elif kind == "compile":
        model = torch.compile(model)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return run, note


def _dynamic(model):  # type: ignore[no-untyped-def]
    """The linear layers with int8 weights; torch may drop this interface for torchao's any time."""
    import torch

    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise Unsupported("this torch has no torch.ao.quantization.quantize_dynamic") from error
    return quantize_dynamic(
        model, {torch.nn.Linear}, dtype=torch.qint8
    ), f"engine {torch.backends.quantized.engine}"


PEERS = (
    Peer("torch-dynamic", "torch", "int8 dynamic", ("torch", "timm"), partial(prepare, kind="dynamic")),
    Peer(
        "torch-compile",
        "torch.compile",
        "fp32",
        ("torch", "timm"),
        partial(prepare, kind="compile"),
        by_default=False,
    ),
    Peer("torch-fp32", "torch eager", "fp32", ("torch", "timm"), partial(prepare, kind="eager")),
)
