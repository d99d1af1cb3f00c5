"""tvm-vitq: uniform W8A8 with the default recipe, every instruction of this machine."""

from __future__ import annotations

from peer.interface import Job, Peer, Run


def prepare(job: Job) -> tuple[Run, str]:
    """Quantize and compile, or load `job.library`."""
    import tvm_vitq

    if job.library is not None:
        library = tvm_vitq.load_library(job.library)
        origin = "given library"
    else:
        quantized = tvm_vitq.quantize(
            job.torch_model(), bits="w8a8", calibration=job.images(), batch=job.batch, progress=False
        )
        library = tvm_vitq.compile(quantized, "llvm")
        origin = f"recipe {library.report['recipe']}"
    library.num_threads = job.threads
    coverage = library.report["integer_coverage"]
    return library, f"{origin}, {library.report['isa']}, {coverage:.1%} of MACs integer"


PEERS = (Peer("tvm-vitq", "tvm-vitq", "W8A8", ("tvm_vitq", "torch", "timm"), prepare),)
