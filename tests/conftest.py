"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import signal

import pytest

# A shell starts background jobs with interrupts ignored, which they and their children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _pool_of_threads():
    """TVM's pool of the thread that runs the tests, large enough for all of them: it cannot grow later."""
    from tvm_vitq import cpu, ffi

    ffi.use_threads(max(3, cpu.usable_cores()))


@pytest.fixture
def use_threads():
    """`ffi.use_threads`, until the end of a test."""
    from tvm_vitq import cpu, ffi

    yield ffi.use_threads
    ffi.use_threads(cpu.usable_cores())


@pytest.fixture(scope="session")
def toy_module():
    """float32 (1, 3, 8, 8) -> (1, 96): a matmul of small whole numbers, exact in any order."""
    import numpy as np
    from tvm import relax
    from tvm.script import tirx as T
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as TB

    inner, outer = 3 * 8 * 8, 96
    weight = np.random.default_rng(0).integers(-8, 9, (inner, outer)).astype("float32")
    with IRBuilder() as builder, TB.prim_func(s_tir=True):
        TB.func_name("dense")
        a = TB.arg("A", TB.Buffer((1, inner), "float32"))
        w = TB.arg("W", TB.Buffer((inner, outer), "float32"))
        o = TB.arg("O", TB.Buffer((1, outer), "float32"))
        TB.func_attr({"global_symbol": "dense", "tirx.noalias": True})
        with TB.parallel(0, outer // 16) as j:
            lanes = TB.ramp(j * 16, 1, 16)
            TB.buffer_store(o, T.broadcast(T.float32(0), 16), [0, lanes])
            with TB.serial(0, inner) as k:
                product = T.broadcast(a[0, k], 16) * w.vload([k, j * 16], "float32x16")
                TB.buffer_store(o, o.vload([0, j * 16], "float32x16") + product, [0, lanes])
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32"))
    dense = block.add_func(builder.get(), "dense")
    with block.function("main", [x]):
        with block.dataflow():
            flat = block.emit(relax.op.reshape(x, (1, inner)))
            type_ = relax.TensorType((1, outer), "float32")
            out = block.emit_output(relax.call_tir(dense, [flat, relax.const(weight)], type_))
        block.emit_func_output(out)
    return block.get(), weight


@pytest.fixture(scope="session")
def toy_library(toy_module):
    """Makes the toy's library for a target: `toy_library("x86-64")`."""
    import tvm

    from tvm_vitq import targets
    from tvm_vitq.library_format import LibraryInfo
    from tvm_vitq.runtime import Library

    def make(target="llvm", **options):
        profile = targets.parse(target)
        executable = tvm.compile(toy_module[0], profile.target)
        info = LibraryInfo("toy", profile, (1, 3, 8, 8), 96, report={"note": "µ"})
        return Library(info, executable=executable, **options)

    return make


@pytest.fixture(scope="session")
def run_under_qemu():
    """`tvm_vitq.emulate.run_aarch64`; where it cannot work, skips here and fails in CI (CI set)."""
    from tvm_vitq import emulate

    reason = emulate.missing()
    if reason:
        text = f"AArch64 cannot be emulated, {reason}: apt-get install qemu-user g++-aarch64-linux-gnu"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return emulate.run_aarch64
