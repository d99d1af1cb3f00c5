"""Relax passes, IRModule to IRModule, one per file; tvm_vitq/pipeline.py lists them in order."""

# The repository root on sys.path would load a second copy of every registration.
if __name__ != "tvm_vitq.relax_passes":
    raise ImportError(
        "import tvm_vitq.relax_passes, not relax_passes: this folder is mapped into the package tvm_vitq"
    )
