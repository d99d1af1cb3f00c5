"""The Relax operators of this package: canonical float ones, and the integer ones that realize makes of them.

Every operator carries its parameters as attributes (plain numbers and strings) and names its layer in `site`.
Type inference is registered here, once, so that a wrong graph is refused when it is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax
from tvm.ir.op import Op, register_op_attr

from tvm_vitq import ffi
from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.numerics_attention import Probabilities

Shape = list[int]

ffi.carry_errors()


def shape_of(expr: relax.Expr) -> Shape:
    """The static shape of a tensor expression."""
    return [int(v) for v in expr.ty.shape]


def dtype_of(expr: relax.Expr) -> str:
    return str(expr.ty.dtype)


def attrs(call: relax.Call) -> dict[str, Any]:
    """A call's attributes as plain Python values."""
    found: dict[str, Any] = {}
    if call.attrs is None:
        return found
    for key in call.attrs.keys():
        found[str(key)] = _plain(call.attrs[key])
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (tvm.tirx.IntImm, tvm.tirx.FloatImm)):
        return value.value
    if isinstance(value, (list, tuple, tvm.ir.Array)):
        return [_plain(v) for v in value]
    return value


def call(name: str, args: list[relax.Expr], **attributes: Any) -> relax.Call:
    """A call of one of our operators, e.g. ``call("vitq.linear", [x, w, b], site="head")``."""
    return relax.Call(Op.get(name), args, tvm.ir.make_node("ir.DictAttrs", **attributes))


def probabilities_of(info: dict[str, Any], rest: list[Array]) -> Probabilities:
    """The quantizer in the attributes of integer attention and in its operands behind zero_v, which it takes
    out of `rest`.
    """
    operands = {"sigmoid": ("table",), "codebook": ("edges", "values")}.get(info["probs"], ())
    return Probabilities(
        info["probs"],
        info["prob_max"],
        info["numerator"],
        info["shift"],
        info["guard"],
        **{name: rest.pop(0) for name in operands},
        zero=info.get("prob_zero", 0),
        relative=info.get("relative", False),
    )


def op_name(expr: relax.Expr) -> str:
    """Name of the operator that a call calls; empty for anything else."""
    return expr.op.name if isinstance(expr, relax.Call) and isinstance(expr.op, Op) else ""


def is_ours(expr: relax.Expr) -> bool:
    return op_name(expr).startswith("vitq.")


def _register(
    name: str, about: str, arguments: list[str], infer: Callable[[relax.Call], tuple[Shape, str]]
) -> None:
    tvm.get_global_func("ir.RegisterOp")(name, about)
    op = Op.get(name)
    op.set_num_inputs(-1)
    for argument in arguments:
        op.add_argument(argument, "Tensor", argument)

    def infer_type(node: relax.Call, ctx: Any = None) -> relax.TensorType:
        shape, dtype = infer(node)
        return relax.TensorType(shape, dtype)

    register_op_attr(name, "FInferType", infer_type)
    register_op_attr(name, "FPurity", True)


def _need(condition: bool, node: relax.Call, expected: str) -> None:
    if not condition:
        got = ", ".join(f"{dtype_of(a)}{shape_of(a)}" for a in node.args)
        raise VitqError(
            f"{op_name(node)} has unfitting operands",
            where=attrs(node).get("site"),
            got=got,
            expected=expected,
        )


def _same(node: relax.Call) -> tuple[Shape, str]:
    return shape_of(node.args[0]), dtype_of(node.args[0])


def _linear(node: relax.Call) -> tuple[Shape, str]:
    x, w, b = (shape_of(a) for a in node.args[:3])
    _need(len(w) == 2 and x[-1] == w[1] and b == [w[0]], node, "x[..., K], weight[N, K], bias[N]")
    return [*x[:-1], w[0]], attrs(node).get("out_dtype", "float32")


def _fused_linear(node: relax.Call) -> tuple[Shape, str]:
    shape, _ = _linear(node)
    info = attrs(node)
    extra = node.args[5]
    if info["epilogue"] == "residual":
        _need(math.prod(shape_of(extra)) == math.prod(shape), node, "a residual of the output's size")
        return shape_of(extra), "int32"
    return shape, info["codes_dtype"] if info["epilogue"] == "codes" else dtype_of(extra)


def _fused_attention(node: relax.Call) -> tuple[Shape, str]:
    info = attrs(node)
    batch, heads, queries, width = info["shape"]
    return [batch, queries, heads * width], info["out_dtype"]


def _layer_norm(node: relax.Call) -> tuple[Shape, str]:
    x, g, b = (shape_of(a) for a in node.args[:3])
    _need(g == b == [x[-1]], node, "x[..., C], gamma[C], beta[C]")
    return x, attrs(node).get("out_dtype", "float32")


def _attention(node: relax.Call) -> tuple[Shape, str]:
    q, k, v = (shape_of(a) for a in node.args[:3])
    fits = len(q) == len(k) == len(v) == 4 and q[:2] == k[:2] == v[:2] and q[3] == k[3] and k[2] == v[2]
    _need(fits, node, "q[B, H, Tq, D], k[B, H, Tk, D], v[B, H, Tk, Dv]")
    return [*q[:3], v[3]], attrs(node).get("out_dtype", "float32")


def _mean(node: relax.Call) -> tuple[Shape, str]:
    x, axis = shape_of(node.args[0]), attrs(node)["axis"]
    return x[:axis] + x[axis + 1 :], attrs(node).get("out_dtype", "float32")


def _converted(node: relax.Call) -> tuple[Shape, str]:
    return shape_of(node.args[0]), attrs(node)["out_dtype"]


def _binary(node: relax.Call) -> tuple[Shape, str]:
    a, b = shape_of(node.args[0]), shape_of(node.args[1])
    rank = max(len(a), len(b))
    a, b = ([1] * (rank - len(shape)) + shape for shape in (a, b))
    _need(all(x == y or 1 in (x, y) for x, y in zip(a, b, strict=True)), node, "shapes that broadcast")
    return [max(x, y) for x, y in zip(a, b, strict=True)], attrs(node)["out_dtype"]


def _scores(node: relax.Call) -> tuple[Shape, str]:
    batch, heads, tokens, _ = (int(size) for size in attrs(node)["shape"])
    return [batch, heads, tokens, tokens], "int32"


def _row_terms(node: relax.Call) -> tuple[Shape, str]:
    batch, heads, tokens, _ = shape_of(node.args[0])
    return [batch * heads, tokens], "int32"


def _values(node: relax.Call) -> tuple[Shape, str]:
    batch, heads, tokens, width = (int(size) for size in attrs(node)["shape"])
    return [batch, tokens, heads * width], attrs(node)["out_dtype"]


# Canonical float operators
_register("vitq.linear", "x @ weight.T + bias", ["x", "weight", "bias"], _linear)
_register("vitq.layer_norm", "LayerNorm over the last axis", ["x", "gamma", "beta"], _layer_norm)
_register("vitq.activation", "elementwise function `kind`", ["x"], _same)
_register("vitq.attention", "kind(scale * q @ k.T + sum(additive)) @ v", ["q", "k", "v"], _attention)
_register("vitq.mean", "mean over `axis`, which is removed", ["x"], _mean)
_register("vitq.quantize", "puts the plan's quantizer `site` on a tensor", ["x"], _same)

# Integer operators; their semantics are the functions of the same name in tvm_vitq/numerics.py
_register("vitq.int_quantize", "float32 to codes", ["x"], _converted)
_register("vitq.int_dequantize", "integers to float32", ["x"], _converted)
_register("vitq.int_requantize", "integers to other integers", ["x", "multiplier"], _converted)
_register(
    "vitq.int_linear", "x @ weight.T + bias, requantized", ["x", "weight", "bias", "multiplier"], _linear
)
_register("vitq.int_lookup", "table[x]", ["x", "table"], _converted)
_register("vitq.int_add", "saturating a + b", ["a", "b"], _binary)
_register("vitq.int_multiply", "a * b, requantized", ["a", "b"], _binary)
_register("vitq.int_layer_norm", "integer LayerNorm, requantized", ["x", "gain", "offset"], _layer_norm)
_register("vitq.int_attention", "integer attention", ["q", "k", "v"], _attention)
_register("vitq.int_mean", "integer mean", ["x"], _mean)

# Attention between its matrix products, where these are another machine's; made by offload_vta
_register("vitq.int_scores", "base-2 scores of q @ k.T", ["acc", "codes", "multiplier"], _scores)
_register("vitq.int_probabilities", "codes of probabilities of scores", ["t"], _converted)
_register("vitq.int_byte", "a byte of codes", ["p"], _converted)
_register("vitq.int_row_terms", "what rows of p add to their sums", ["p", "zero_v", "constant"], _row_terms)
_register("vitq.int_values", "p @ v, requantized", ["acc", "p"], _values)

# Integer operators as one kernel runs them, made by fuse_epilogues and fuse_views
_register(
    "vitq.fused_linear", "int_linear with int_lookup or int_add", ["x", "weight", "bias"], _fused_linear
)
_register("vitq.fused_attention", "int_attention on views of matrices", ["q", "k", "v"], _fused_attention)
