"""C++ example that loads and runs an exported library without Python."""

if __name__ != "tvm_vitq.deploy":
    raise ImportError("import tvm_vitq.deploy, not runtime: this folder is mapped into the package tvm_vitq")
