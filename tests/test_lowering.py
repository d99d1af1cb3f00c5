"""Fusion passes, elementwise expressions, the default schedule and pass hygiene."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

import tvm_vitq
from tvm_vitq import numerics, ops
from tvm_vitq.compiler import _after_kernels
from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Output
from tvm_vitq.relax_passes.fuse_epilogues import fuse_epilogues
from tvm_vitq.relax_passes.fuse_views import MatrixView, fuse_views, matrix_view
from tvm_vitq.relax_passes.lower_elementwise import EXPRESSIONS, operands
from tvm_vitq.relax_passes.schedule_rest import schedule_rest
from tvm_vitq.relax_passes.verify import verify
from tvm_vitq.targets import parse


def graph(emit, *inputs):
    """A module whose main has `inputs` (name, shape, dtype) and the bindings that emit(builder, *vars)
    makes.
    """
    builder = relax.BlockBuilder()
    params = [relax.Var(name, relax.TensorType(shape, dtype)) for name, shape, dtype in inputs]
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(emit(builder, *params))
        builder.emit_func_output(result)
    return builder.get()


def names(mod):
    return [ops.op_name(b.value) for b in mod["main"].body.blocks[0].bindings]


def linear(x, n, out_dtype, rng=None):
    rng = rng or np.random.default_rng(0)
    k = ops.shape_of(x)[-1]
    operands_ = [
        rng.integers(-127, 128, (n, k)).astype("int8"),
        rng.integers(-99, 99, n).astype("int32"),
        np.full(n, 1e-2, "float32"),
        np.zeros(1, "int32"),
    ]
    limits = {"qmin": 0, "qmax": 4095} if out_dtype == "uint16" else {}
    args = [x, *(relax.const(v) for v in operands_)]
    return ops.call("vitq.int_linear", args, site="fc", out_dtype=out_dtype, kind="multiply", **limits)


def test_lookup_is_fused_into_the_layer_before_it():
    def emit(b, x):
        y = b.emit(linear(x, 8, "uint16"))
        return ops.call(
            "vitq.int_lookup", [y, relax.const(np.zeros(4096, "int8"))], site="act", out_dtype="int8"
        )

    fused = fuse_epilogues(graph(emit, ("x", (2, 5, 16), "int8")))
    assert names(fused) == ["vitq.fused_linear"]
    assert ops.dtype_of(fused["main"].body.blocks[0].bindings[0].var) == "int8"


@pytest.mark.parametrize(
    ("columns", "table", "again", "fuses"),
    [
        (8, "int32", False, True),
        (1, "int32", False, True),
        (8, "int8", False, False),
        (8, "int32", True, False),
    ],
    ids=["channels", "tensor", "codes_already", "second_reader"],
)
def test_codes_of_function_values_are_fused(columns, table, again, fuses):
    """Function values that nothing but a quantizer reads leave the layer as its codes."""
    numbers = np.full(columns, 0.5, "float32"), np.arange(columns, dtype="int32"), np.int32(0)

    def emit(b, x):
        y = b.emit(linear(x, 8, "uint16"))
        y = b.emit(
            ops.call("vitq.int_lookup", [y, relax.const(np.zeros(4096, table))], site="act", out_dtype=table)
        )
        limits = {"out_dtype": "int8", "qmin": -8, "qmax": 7, "kind": "multiply"}
        z = b.emit(ops.call("vitq.int_requantize", [y, *(relax.const(v) for v in numbers)], **limits))
        if not again:
            return z
        wide = b.emit(ops.call("vitq.int_requantize", [z, *(relax.const(v) for v in numbers)], **limits))
        return relax.op.concat([wide, b.emit(relax.op.astype(y, "int8"))], axis=0)

    fused = fuse_epilogues(graph(emit, ("x", (2, 5, 16), "int8")))
    found = names(fused)
    assert ("vitq.int_requantize" not in found[:2]) == fuses
    if fuses:
        assert found == ["vitq.fused_linear"]
        assert ops.dtype_of(fused["main"].body.blocks[0].bindings[0].var) == "int8"


def test_residual_is_fused_behind_a_reshape():
    def emit(b, x, r):
        y = b.emit(relax.op.reshape(b.emit(linear(x, 8, "int32")), (10, 8)))
        return ops.call("vitq.int_add", [r, y], out_dtype="int32")

    fused = fuse_epilogues(graph(emit, ("x", (2, 5, 16), "int8"), ("r", (10, 8), "int32")))
    assert names(fused) == ["vitq.fused_linear"]


def test_a_layer_with_a_second_reader_is_not_fused():
    def emit(b, x, r):
        y = b.emit(linear(x, 8, "int32"))
        z = b.emit(ops.call("vitq.int_add", [r, y], out_dtype="int32"))
        return ops.call("vitq.int_add", [z, y], out_dtype="int32")

    fused = fuse_epilogues(graph(emit, ("x", (2, 5, 16), "int8"), ("r", (2, 5, 8), "int32")))
    assert names(fused) == ["vitq.int_linear", "vitq.int_add", "vitq.int_add"]


def test_a_broadcast_residual_is_not_fused():
    def emit(b, x, r):
        return ops.call("vitq.int_add", [b.emit(linear(x, 8, "int32")), r], out_dtype="int32")

    fused = fuse_epilogues(graph(emit, ("x", (2, 5, 16), "int8"), ("r", (1, 5, 8), "int32")))
    assert names(fused) == ["vitq.int_linear", "vitq.int_add"]


def test_a_row_permutation_moves_in_front_of_the_layer():
    def emit(b, x, r):
        y = b.emit(linear(x, 8, "int32"))
        for step in (relax.op.reshape, None):
            y = b.emit(step(y, (2, 2, 3, 8)) if step else relax.op.permute_dims(y, [0, 2, 1, 3]))
        return ops.call("vitq.int_add", [b.emit(relax.op.reshape(y, (12, 8))), r], out_dtype="int32")

    mod = graph(emit, ("x", (12, 16), "int8"), ("r", (12, 8), "int32"))
    fused = fuse_epilogues(mod)
    assert names(fused) == ["relax.reshape", "relax.take", "vitq.fused_linear"]


def test_a_permutation_of_channels_stays():
    def emit(b, x, r):
        y = b.emit(relax.op.permute_dims(b.emit(linear(x, 12, "int32")), [1, 0]))
        return ops.call("vitq.int_add", [y, r], out_dtype="int32")

    fused = fuse_epilogues(graph(emit, ("x", (12, 16), "int8"), ("r", (12, 12), "int32")))
    assert names(fused) == ["vitq.int_linear", "relax.permute_dims", "vitq.int_add"]


def attention_on_qkv(batch=2, tokens=5, heads=3, depth=8):
    """Attention on a [B, T, 3HD] matrix in timm's order of movements, and the movements behind it."""

    def emit(b, qkv):
        five = b.emit(relax.op.reshape(qkv, (batch, tokens, 3, heads, depth)))
        moved = b.emit(relax.op.permute_dims(five, [2, 0, 3, 1, 4]))
        parts = []
        for i in range(3):
            part = b.emit(relax.op.strided_slice(moved, axes=[0], begin=[i], end=[i + 1]))
            parts.append(b.emit(relax.op.reshape(part, (batch, heads, tokens, depth))))
        per_head = [
            relax.const(np.full(heads, v, t)) for v, t in ((1.0, "float32"),) * 2 + ((0, "int32"),) * 3
        ]
        mixed = b.emit(
            ops.call(
                "vitq.int_attention", [*parts, *per_head], site="attn", probs="softmax", prob_max=255,
                numerator=255 << 23, shift=23, guard=8, zero_point=0, out_dtype="int8", qmin=-128, qmax=127,
            )
        )  # fmt: skip
        back = b.emit(relax.op.permute_dims(mixed, [0, 2, 1, 3]))
        return relax.op.reshape(back, (batch, tokens, heads * depth))

    return graph(emit, ("qkv", (batch, tokens, 3 * heads * depth), "int8"))


def test_attention_reads_qkv_in_place_and_writes_rows():
    fused = fuse_views(attention_on_qkv())
    assert [n for n in names(fused) if n != "relax.reshape"] == ["vitq.fused_attention"]
    node = next(
        b.value
        for b in fused["main"].body.blocks[0].bindings
        if ops.op_name(b.value) == "vitq.fused_attention"
    )
    assert ops.attrs(node)["q_view"] == [72, 0, 8, 5, 0]
    assert ops.attrs(node)["v_view"] == [72, 48, 8, 5, 0]


def test_matrix_view_finds_rows_and_columns_or_refuses():
    tokens_as_rows = np.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5).transpose(0, 2, 1, 3)
    assert matrix_view(tokens_as_rows, 120) == MatrixView(15, 0, 5, 4, 0)
    assert matrix_view(tokens_as_rows[:1, :, 1:], 120) == MatrixView(15, 0, 5, 0, 1)
    assert matrix_view(np.arange(120).reshape(2, 3, 4, 5), 120) is None  # heads are not columns
    assert matrix_view(tokens_as_rows[..., ::-1], 120) is None
    assert matrix_view(np.roll(tokens_as_rows, 1, axis=2), 120) is None


RNG = np.random.default_rng(7)
WIDE = RNG.integers(-numerics.WIDE_MAX, numerics.WIDE_MAX, (2, 7, 24)).astype("int32")
CODES = RNG.integers(-128, 128, (2, 7, 24)).astype("int8")
HALVES = (np.arange(2 * 7 * 24).reshape(2, 7, 24) * 64 - 5000).astype("int32")
I8 = Output("int8", -128, 127)


def numbers(*values):
    return [np.array(v[0], v[1]) for v in values]


CASES = {
    "int_quantize": (
        [(RNG.normal(size=(2, 3, 8, 8)) * 3).astype("float32"), *numbers((20.5, "float32"), (-3, "int32"))],
        {"out_dtype": "int8", "qmin": -128, "qmax": 127},
        lambda x, m, z: numerics.int_quantize(x, m, z, I8),
    ),
    "int_requantize": (
        [WIDE, *numbers((1e-5, "float32"), (4, "int32"), (9, "int32"))],
        {"out_dtype": "int8", "qmin": -128, "qmax": 127, "kind": "multiply"},
        lambda x, m, z, i: numerics.int_requantize(x, m, z, i, I8),
    ),
    "int_requantize shift": (
        [HALVES, *numbers((2.0**-7, "float32"), (0, "int32"), (0, "int32"))],
        {"out_dtype": "int8", "qmin": -128, "qmax": 127, "kind": "shift"},
        lambda x, m, z, i: numerics.int_requantize(x, m, z, i, Output("int8", -128, 127, "shift")),
    ),
    "int_requantize per token": (
        [
            CODES,
            (RNG.random((7, 1)) * 3).astype("float32"),
            np.arange(7, dtype="int32")[:, None],
            np.array(-5, "int32"),
        ],
        {"out_dtype": "int8", "qmin": -128, "qmax": 127, "kind": "multiply"},
        lambda x, m, z, i: numerics.int_requantize(x, m, z, i, I8),
    ),
    "int_dequantize": (
        [CODES, *numbers((0.03, "float32"), (-7, "int32"))],
        {"out_dtype": "float32"},
        numerics.int_dequantize,
    ),
    "int_lookup": (
        [RNG.integers(0, 4096, (3, 40)).astype("uint16"), RNG.integers(-128, 128, 4096).astype("int8")],
        {"out_dtype": "int8"},
        numerics.int_lookup,
    ),
    "int_add": ([WIDE, WIDE[:1]], {"out_dtype": "int32"}, numerics.int_add),
    "int_multiply": (
        [WIDE >> 9, (WIDE >> 10)[::-1].copy(), *numbers((1e-6, "float32"), (1, "int32"))],
        {"out_dtype": "int8", "qmin": -128, "qmax": 127, "kind": "multiply"},
        lambda a, b, m, z: numerics.int_multiply(a, b, m, z, I8),
    ),
    "int_mean": ([WIDE], {"out_dtype": "int32", "axis": 1}, lambda x: numerics.int_mean(x, 1)),
}


@pytest.mark.parametrize("target", ["x86-64", "x86-avx2", "llvm"])
@pytest.mark.parametrize("case", CASES)
def test_elementwise_expressions_equal_numerics(case, target):
    profile = parse(target)
    if profile.missing_here():
        pytest.skip(f"this CPU lacks {', '.join(profile.missing_here())}")
    arrays, info, reference = CASES[case]
    name = "vitq." + case.split()[0]
    x, rest = arrays[0], arrays[1:]

    def emit(builder, var):
        node = builder.normalize(ops.call(name, [var, *(relax.const(v) for v in rest)], **info))
        tensors, expression = operands(node)
        return builder.call_te(expression, *tensors)

    mod = graph(emit, ("x", x.shape, str(x.dtype)))
    executable = relax.build(schedule_rest(mod), target=profile.target, relax_pipeline=_after_kernels())
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    want = reference(*arrays)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_every_elementwise_operator_is_tested():
    assert {f"vitq.{case.split()[0]}" for case in CASES} == set(EXPRESSIONS)


def test_default_schedule_leaves_no_plain_loop_nest_and_keeps_values():
    def emit(b, x):
        y = b.emit(relax.op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1)))
        y = b.emit(
            relax.op.nn.conv2d(y, relax.const(RNG.normal(size=(8, 4, 3, 3)).astype("float32")), padding=1)
        )
        return relax.op.nn.softmax(b.emit(relax.op.nn.relu(y)), axis=1)

    mod = graph(emit, ("x", (1, 4, 32, 32), "float32"))
    mod = tvm.transform.Sequential(
        [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps(),
         relax.transform.FuseTIR(), relax.transform.DeadCodeElimination(["main"])]
    )(mod)  # fmt: skip
    scheduled = schedule_rest(mod)
    for gvar, function in scheduled.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            assert "T.vectorized" in function.script(), gvar
    x = RNG.normal(size=(1, 4, 32, 32)).astype("float32")
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})  # no FMA: products and sums stay apart
    results = []
    for module in (mod, scheduled):
        executable = relax.build(module, target=target, relax_pipeline=_after_kernels())
        results.append(relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy())
    np.testing.assert_array_equal(*results)


def test_verify_names_the_pass_that_broke_the_contract():
    def emit(b, x):
        args = [x, *(relax.const(v) for v in (np.full((4, 16), -128, "int8"), np.zeros(4, "int32")))]
        args += [relax.const(np.ones(4, "float32")), relax.const(np.zeros(1, "int32"))]
        return ops.call("vitq.int_linear", args, site="fc", out_dtype="int32", kind="multiply")

    with pytest.raises(VitqError, match=r"(?s)-128.*fc, after some_pass"):
        verify(graph(emit, ("x", (2, 16), "int8")), "some_pass")


@pytest.mark.parametrize("recipe", ["minmax", "igq-vit"])
@pytest.mark.parametrize("model", ["refmodel:vit", "refmodel:swin"])
def test_every_pass_keeps_the_invariants(model, recipe, monkeypatch):
    monkeypatch.setenv("VITQ_VERIFY", "1")
    options = {"recipe": recipe, "calibration_count": 4, "progress": False}
    quantized = tvm_vitq.quantize(model, "w4a4", **options)
    assert tvm_vitq.compile(quantized).report["integer_coverage"] == 1
