"""Tuning records, one folder per target."""

if __name__ != "tvm_vitq.tuning_logs":  # the repository root on sys.path would load a second copy of every registration
    raise ImportError("import tvm_vitq.tuning_logs, not tuning_logs: this folder is mapped into the package tvm_vitq")
