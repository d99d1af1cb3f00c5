"""Lowers integer operators to kernels of one target; constants are packed for them.

A rule maps an operator to a kernel specification of schedules/, which knows the function's arguments and
packs its constants; equal specifications share one function. Elementwise operators become tensor expressions,
which TVM fuses with data movement. Movement itself and float islands are left to the passes that follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Expr

from tvm_vitq.graph import value_of
from tvm_vitq.library_format import LOAD
from tvm_vitq.numerics import Array, Multiples, Output, Partial, inner_scales
from tvm_vitq.numerics_groups import GroupQuantizers
from tvm_vitq.ops import attrs, dtype_of, op_name, probabilities_of, shape_of
from tvm_vitq.relax_passes.attention_expressions import ATTENTION_EXPRESSIONS
from tvm_vitq.relax_passes.lower_elementwise import EXPRESSIONS, operands
from tvm_vitq.relax_passes.rewriter import Rewriter, constant
from tvm_vitq.schedules.attention import Attention, View
from tvm_vitq.schedules.group_codes import GroupCodes
from tvm_vitq.schedules.group_linear import GroupLinear
from tvm_vitq.schedules.group_operands import operands_of
from tvm_vitq.schedules.group_table import GroupTable
from tvm_vitq.schedules.kernel import Kernel
from tvm_vitq.schedules.layer_norm import LayerNorm
from tvm_vitq.schedules.linear import Linear
from tvm_vitq.schedules.unpack import Unpack
from tvm_vitq.schedules.weight_planes import WeightPlanes
from tvm_vitq.targets import TargetProfile

KERNEL_ATTRIBUTE = "vitq.macs"
"""Function attribute of kernels, which need no further scheduling: multiply-accumulates of one call."""

KERNEL_OPERATORS = ("vitq.int_linear", "vitq.fused_linear", "vitq.int_layer_norm", "vitq.fused_attention")
"""Operators that become kernels of schedules/."""

OPAQUE = 8
"""TVM's operator pattern that is fused with nothing."""


class Specification(Protocol):
    """What a rule makes: a kernel of schedules/."""

    @property
    def name(self) -> str: ...

    def kernel(self) -> Kernel: ...


@dataclass(frozen=True)
class Site:
    """One call of a kernel.

    spec : the kernel with its default schedule.
    node : the operator of the integer graph that it computes; None for a kernel that computes a part of one.
    pack : the constants of the call for this kernel under any schedule.
    planes : how the weights are packed that are unpacked when the library is loaded; None: no such ones.
    inputs : the kernel's inputs from the operator's, where other kernels make them of each other.
    """

    spec: Any
    node: Call | None
    pack: Callable[[Any], list[Array]]
    planes: WeightPlanes | None = None
    inputs: Callable[[list[Array]], list[Array]] = list


Choose = Callable[[Site], Specification]
"""Gives the kernel of a site its schedule."""


def default_schedule(site: Site) -> Specification:
    """The kernel as it is."""
    return site.spec


def lower_kernels(
    mod: tvm.IRModule, profile: TargetProfile, choose: Choose = default_schedule, packed: bool = True
) -> tvm.IRModule:
    """See the module; integer graph to kernel calls.

    Weights take as few bits as they need. `packed`: the kernels unpack them. Otherwise a function
    `LOAD` does that, once, and ``main`` takes what it returns behind its input.
    """
    return _Lowering(profile, choose, packed).module(mod)


def _output(info: dict[str, Any]) -> Output:
    """The conversion in an operator's attributes."""
    limits = {key: info[key] for key in ("qmin", "qmax", "kind") if key in info}
    return Output(info["out_dtype"], **limits)


class _Lowering(Rewriter):
    def __init__(self, profile: TargetProfile, choose: Choose, packed: bool) -> None:
        super().__init__()
        self.isa, self.choose, self.packed = profile.isa, choose, packed
        self.loaded: list[tuple[relax.Var, Call]] = []
        """Weights that are unpacked at load: the parameters of ``main``, and what makes them."""
        self.made: dict[str, tuple[tvm.ir.GlobalVar, Kernel]] = {}
        self.grouped: dict[tuple, tuple[Expr, Expr]] = {}
        self.rules: dict[str, Callable[[Call, dict[str, Any]], Expr]] = {
            "vitq.int_linear": self.linear,
            "vitq.fused_linear": self.linear,
            "vitq.int_layer_norm": self.layer_norm,
            "vitq.fused_attention": self.attention,
            **{name: self.elementwise for name in EXPRESSIONS},
            **{name: self.attention_part for name in ATTENTION_EXPRESSIONS},
        }

    def module(self, mod: tvm.IRModule) -> tvm.IRModule:
        main = self.transform(mod["main"])
        if self.loaded:
            weights, calls = zip(*self.loaded, strict=True)
            body = relax.SeqExpr(main.body.blocks, main.body.body)
            main = relax.Function([*main.params, *weights], body, main.ret_ty, attrs=main.attrs)
            with self._block.function(LOAD, []):
                with self._block.dataflow():
                    made = self._block.emit_output(relax.Tuple([self._block.emit(call) for call in calls]))
                self._block.emit_func_output(made)
        functions = dict(self._block.get().functions)
        return tvm.IRModule({**functions, "main": main})

    def rewrite(self, node: Call, name: str) -> Expr | None:
        rule = self.rules.get(op_name(node))
        return None if rule is None else rule(node, attrs(node))

    def call_kernel(self, site: Site, tensors: list[Expr]) -> Expr:
        """A call with inputs in the order of the kernel's arguments; the result has the operator's shape."""
        return self.shaped(self.result_of(site, tensors), tuple(shape_of(site.node)))

    def result_of(self, site: Site, tensors: list[Expr]) -> Expr:
        """As `call_kernel`, with the result as the kernel shapes it."""
        spec = self.choose(site)
        if spec.name not in self.made:
            kernel = spec.kernel()
            function = kernel.func.with_attr("op_pattern", OPAQUE).with_attr(KERNEL_ATTRIBUTE, kernel.macs)
            self.made[spec.name] = self._block.add_func(function, kernel.name), kernel
        function_name, kernel = self.made[spec.name]
        waiting = {"input": list(tensors), "constant": self.constants(site, spec)}
        args = []
        for argument in kernel.arguments[:-1]:
            value = waiting[argument.role].pop(0)
            args.append(self.shaped(value, argument.shape))
        out = kernel.arguments[-1]
        layer = spec.name if site.node is None else attrs(site.node)["site"]  # for the report
        return self.emit(relax.call_tir(function_name, args, relax.TensorType(out.shape, out.dtype)), layer)

    def constants(self, site: Site, spec: Any) -> list[Expr]:
        """Constants of a call; weights that are unpacked at load are parameters."""
        if site.planes is None:
            return [constant(c) for c in site.pack(spec)]
        packed = replace(spec, planes=site.planes)
        weight, base, *rest = [constant(c) for c in site.pack(packed)]
        unpack = Unpack(packed)
        if unpack.name not in self.made:
            kernel = unpack.kernel()
            function = kernel.func.with_attr("op_pattern", OPAQUE).with_attr(KERNEL_ATTRIBUTE, 0)
            self.made[unpack.name] = self._block.add_func(function, kernel.name), kernel
        out = unpack.arguments()[-1]
        type_ = relax.TensorType(out.shape, out.dtype)
        call = relax.call_tir(self.made[unpack.name][0], [weight, base], type_)
        self.loaded.append((relax.Var(f"weight_{len(self.loaded)}", type_), call))
        return [self.loaded[-1][0], *rest]

    def shaped(self, value: Expr, shape: tuple[int, ...]) -> Expr:
        """`value` as another shape of the same elements: no copy, and none of the reshapes on the way."""
        while (reshape := self.call_of(value, "relax.reshape")) is not None:
            value = reshape.args[0]
        if tuple(shape_of(value)) == tuple(shape):
            return value
        return self.emit(relax.op.reshape(value, shape), "reshaped")

    def linear(self, node: Call, info: dict[str, Any]) -> Expr:
        epilogue = info.get("epilogue")
        x, *rest = node.args
        weight, bias, multiplier, zero = (value_of(a) for a in rest[:4])
        extra = [rest.pop(4)] if epilogue else []
        if "tokens" in info:
            return self.group_linear(node, info, extra, [value_of(a) for a in rest])
        codes = [value_of(rest.pop(4)).reshape(-1) for _ in range(2)] if epilogue == "codes" else []
        inner = inner_scales([value_of(a) for a in rest[4:]])
        partial = inner if isinstance(inner, Partial) else None
        out, planes = _output(info), WeightPlanes.of(weight)
        spec = Linear(
            self.isa,
            m=math.prod(shape_of(x)[:-1]),
            n=len(weight),
            k=weight.shape[1],
            out=out,
            lookup=dtype_of(extra[0]) if epilogue in ("lookup", "codes") else None,
            codes=Output(*(info[f"codes_{v}"] for v in ("dtype", "qmin", "qmax"))) if codes else None,
            residual=epilogue == "residual",
            zero_point=_kind_of_zero(zero, out),
            groups=0 if inner is None else _groups(inner),
            multiples=isinstance(inner, Multiples),
            row_scales=partial is not None and partial.row_multiplier is not None,
            row_zero_points=partial is not None and partial.row_zero_point is not None,
            planes=planes if self.packed else None,
        )
        zeros = zero if zero.size > 1 else int(zero.reshape(-1)[0])

        def pack(spec: Linear) -> list[Array]:
            constants = spec.pack(weight, bias, multiplier, zeros, inner)
            return constants + (spec.pack_codes(*codes) if codes else [])

        return self.call_kernel(Site(spec, node, pack, None if self.packed else planes), [x, *extra])

    def group_linear(
        self, node: Call, info: dict[str, Any], extra: list[Expr], constants: list[Array]
    ) -> Expr:
        x, epilogue, out = node.args[0], info.get("epilogue"), _output(info)
        weight, bias, multiplier, zero, low, high, inverse, code_zero, scales = constants
        limits = info["code_min"], info["code_max"]
        quantizers = GroupQuantizers(info["tokens"], low, high, inverse, code_zero, *limits)
        table, codes = self.groups_of(x, quantizers)
        spec = GroupLinear(
            self.isa,
            m=math.prod(shape_of(x)[:-1]),
            n=len(weight),
            k=weight.shape[1],
            out=out,
            lookup=dtype_of(extra[0]) if epilogue == "lookup" else None,
            residual=epilogue == "residual",
            zero_point=_kind_of_zero(zero, out),
            tokens=quantizers.tokens,
            choices=len(scales),
        )
        zeros = zero if zero.size > 1 else int(zero.reshape(-1)[0])

        def pack(spec: GroupLinear) -> list[Array]:
            return spec.pack_groups(weight, bias, multiplier, zeros, scales, quantizers.zero_point)

        def inputs(values: list[Array]) -> list[Array]:
            return [*operands_of(spec, values[0], quantizers), *values[1:]]

        return self.call_kernel(Site(spec, node, pack, inputs=inputs), [codes, table, *extra])

    def groups_of(self, x: Expr, quantizers: GroupQuantizers) -> tuple[Expr, Expr]:
        """Table and codes of a wide tensor, made once for all layers that read them."""
        q = quantizers
        key = (x, q.tokens, *(v.tobytes() for v in (q.low, q.high, q.multiplier, q.zero_point)))
        if key not in self.grouped:
            m, k = math.prod(shape_of(x)[:-1]), shape_of(x)[-1]
            sizes = {"m": m, "k": k, "tokens": q.tokens, "groups": len(q.low)}
            spec = GroupTable(self.isa, **sizes)
            table = self.result_of(Site(spec, None, lambda spec: spec.pack(q)), [x])
            made = GroupCodes(self.isa, **sizes, out=q.codes)
            codes = self.result_of(Site(made, None, lambda spec: []), [x, table])
            self.grouped[key] = table, codes
        return self.grouped[key]

    def layer_norm(self, node: Call, info: dict[str, Any]) -> Expr:
        x, gain, offset = node.args
        spec = LayerNorm(math.prod(shape_of(x)[:-1]), shape_of(x)[-1], _output(info))

        def pack(spec: LayerNorm) -> list[Array]:
            return spec.pack(value_of(gain), value_of(offset), info["shift"], info["epsilon"])

        return self.call_kernel(Site(spec, node, pack), [x])

    def attention(self, node: Call, info: dict[str, Any]) -> Expr:
        batch, heads, queries, width = info["shape"]
        operands = list(node.args[:3])
        sources = [s for n, s in enumerate(operands) if not any(s.same_as(t) for t in operands[:n])]
        views, widths = [], {}
        for letter, operand in zip("qkv", operands, strict=True):
            source = next(n for n, s in enumerate(sources) if s.same_as(operand))
            columns, column, head_stride, rows, row = info[f"{letter}_view"]
            widths[source] = columns
            views.append(View(source, column, head_stride, rows, row))
        score, multiplier, zero_q, zero_k, zero_v, *rest = (value_of(a) for a in node.args[3:])
        probs = probabilities_of(info, rest)
        additive = [_additive(term, info["keys"]) for term in rest]
        spec = Attention(
            self.isa, batch, heads, queries, info["keys"], info["depth"], width,
            sources=tuple((math.prod(shape_of(s)) // widths[n], widths[n]) for n, s in enumerate(sources)),
            q=views[0], k=views[1], v=views[2],
            probs=probs,
            out=_output(info),
            additive=tuple(term.shape[:3] for term in additive),
        )  # fmt: skip
        zeros = (zero_q, zero_k, zero_v, info["zero_point"])

        def pack(spec: Attention) -> list[Array]:
            return spec.pack(score, multiplier, *zeros, additive=tuple(additive))

        return self.call_kernel(Site(spec, node, pack), sources)

    def elementwise(self, node: Call, info: dict[str, Any]) -> Expr:
        tensors, expression = operands(node)
        return self._block.call_te(expression, *tensors, primfunc_name_hint=op_name(node).replace(".", "_"))

    def attention_part(self, node: Call, info: dict[str, Any]) -> Expr:
        expression = partial(ATTENTION_EXPRESSIONS[op_name(node)], info)
        return self._block.call_te(expression, *node.args, primfunc_name_hint=op_name(node).replace(".", "_"))


def _groups(inner: Partial | Multiples) -> int:
    return len(inner.count if isinstance(inner, Multiples) else inner.multiplier)


def _kind_of_zero(zero: Array, out: Output) -> str:
    if out.dtype == "float32" or not zero.any():
        return "none"
    return "scalar" if zero.size == 1 else "vector"


def _additive(term: Array, keys: int) -> Array:
    """An additive term as [nb, nh, tq or 1, keys]."""
    four = term.reshape((1,) * (4 - term.ndim) + term.shape)
    return np.broadcast_to(four, (*four.shape[:3], keys))
