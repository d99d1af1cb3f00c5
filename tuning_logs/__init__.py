"""Tuning records, one folder per target."""

# The repository root on sys.path would load a second copy of every registration.
if __name__ != "tvm_vitq.tuning_logs":
    raise ImportError(
        "import tvm_vitq.tuning_logs, not tuning_logs: this folder is mapped into the package tvm_vitq"
    )
