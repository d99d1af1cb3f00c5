"""Integer kernels as TIR and the instruction sets that they are written for."""

if (
    __name__ != "tvm_vitq.schedules"
):  # the repository root on sys.path would load a second copy of every registration
    raise ImportError(
        "import tvm_vitq.schedules, not schedules: this folder is mapped into the package tvm_vitq"
    )
