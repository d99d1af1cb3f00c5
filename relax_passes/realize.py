"""Realize: from the annotated float graph and its plan to the integer graph.

Every float tensor gets one integer format, chosen from what its consumers ask for (see formats.py); every
canonical operator becomes the integer operator of the same name, whose output conversion produces that
format. Operators that have no integer form keep their float inputs and outputs: float islands, listed in the
build report.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax

from tvm_vitq.errors import VitqError
from tvm_vitq.formats import CodebookFormat, Format, codebook_format, codes_format, gate_format, wide_format
from tvm_vitq.graph import (
    Dataflow,
    Leaf,
    channels_stay,
    columns_read,
    data_operands,
    is_constant,
    is_movement,
    rebuild_movement,
    value_of,
)
from tvm_vitq.integerize.activation import activation_input, activation_table, codebook_table
from tvm_vitq.integerize.attention import additive_scores, attention_constants, site_probabilities
from tvm_vitq.integerize.groups import GroupLinearConstants, group_linear_constants
from tvm_vitq.integerize.layer_norm import gain_fits, layer_norm_constants
from tvm_vitq.integerize.linear import LinearConstants, linear_constants
from tvm_vitq.integerize.multiples import multiple_constants
from tvm_vitq.numerics import Array, Multiples
from tvm_vitq.ops import attrs, call, op_name, shape_of
from tvm_vitq.plan import QuantPlan
from tvm_vitq.quantizers import Uniform, codec_of
from tvm_vitq.quantizers.codebook import Codebook
from tvm_vitq.quantizers.multiples import whole_scales
from tvm_vitq.quantizers.uniform import integer_range
from tvm_vitq.units import wide_ranges


def realize(mod: tvm.IRModule, plan: QuantPlan) -> tvm.IRModule:
    """The integer graph of an annotated module.

    Raises VitqError for a plan that does not fit the graph and for layers whose accumulators could overflow.
    """
    return _Realizer(mod, plan).run()


def const(value: Array) -> relax.Expr:
    value = np.asarray(value)
    # The dtype is named because int64 would become int32.
    return relax.const(np.ascontiguousarray(value).reshape(value.shape), str(value.dtype))


def _no_range(var: relax.Var) -> VitqError:
    return VitqError(
        "the plan has no range for a tensor of the graph", where=var.name, fix="quantize the model anew"
    )


class _WideFormats(dict[relax.Var, Format]):
    """Wide format of each variable; a variable without a calibrated range has none."""

    def __missing__(self, var: relax.Var) -> Format:
        raise _no_range(var)


class _Realizer:
    def __init__(self, mod: tvm.IRModule, plan: QuantPlan) -> None:
        self.graph = Dataflow(mod)
        self.plan = plan
        self.builder = relax.BlockBuilder()
        self.wide = _WideFormats({var: wide_format(r) for var, r in wide_ranges(self.graph, plan).items()})
        self.native: dict[relax.Var, tuple[relax.Expr, Format | None]] = {}
        self.converted: dict[tuple, relax.Expr] = {}
        # Quantize bindings whose codes a linear layer already produces.
        self.mixed: dict[relax.Var, Format] = {}
        self.choice: dict[relax.Var, Format | None] = {}
        self.rules: dict[str, Callable[[relax.Var, relax.Call], tuple[relax.Expr, Format | None] | None]] = {
            "vitq.quantize": self.quantize,
            "vitq.linear": self.linear,
            "vitq.layer_norm": self.layer_norm,
            "vitq.activation": self.activation,
            "vitq.attention": self.attention,
            "vitq.mean": self.mean,
            "relax.add": self.add,
            "relax.multiply": self.multiply,
        }

    def run(self) -> tvm.IRModule:
        inputs = [relax.Var(v.name, v.ty) for v in self.graph.inputs]
        with self.builder.function("main", inputs):
            with self.builder.dataflow():
                for old, new in zip(self.graph.inputs, inputs, strict=True):
                    self.native[old] = (new, None)
                    if self.wanted(old) is not None:
                        self.native[old] = (self.get(old, self.wanted(old)), self.wanted(old))
                for binding in self.graph.bindings:
                    self.native[binding.var] = self.visit(binding.var, binding.value)
                result = self.builder.emit_output(self.get(self.graph.result, None))
            self.builder.emit_func_output(result)
        return self.builder.get()

    def visit(self, var: relax.Var, value: relax.Expr) -> tuple[relax.Expr, Format | None]:
        if isinstance(value, relax.Var):
            return self.native[value]
        if is_movement(value):
            return self.movement(var, value)
        rule = self.rules.get(op_name(value))
        done = rule(var, value) if rule else None
        return done or (self.island(var, value), None)

    # Formats ------------------------------------------------------------------------------------------------

    def wanted(self, var: relax.Var) -> Format | None:
        """The one format that all consumers of `var` ask for; the wide one if they differ; None for float."""
        if var not in self.choice:
            asked = [self.demand(leaf) for leaf in self.graph.leaves(var)]
            keys = {None if f is None else f.key for f in asked}
            same_for_all = len(keys) == 1 and (
                asked[0] is None or asked[0].granularity == "tensor" or self.by_channel(var, asked[0])
            )
            chosen = asked[0] if same_for_all else self.wide[var]
            if (
                isinstance(chosen, CodebookFormat)
                and op_name(self.graph.definition.get(var)) != "vitq.activation"
            ):
                chosen = self.book_index(chosen)  # only tables of functions produce levels
            self.choice[var] = chosen
        return self.choice[var]

    def by_channel(self, var: relax.Var, chosen: Format) -> bool:
        """Whether `var` is a LayerNorm that can write codes with scales for groups of its channels."""
        value = self.graph.definition.get(var)
        if op_name(value) != "vitq.layer_norm" or chosen.granularity != "group":
            return False
        shape = shape_of(var)
        stay = all(channels_stay(leaf.path, shape) for leaf in self.graph.leaves(var))
        return stay and gain_fits(value_of(value.args[1]), chosen)

    def demand(self, leaf: Leaf) -> Format | None:
        """Format in which a consumer reads its operand."""
        if leaf.consumer is None:
            return None
        value, var = leaf.consumer.value, leaf.consumer.var
        name = op_name(value)
        if name == "vitq.quantize":
            site = attrs(value)["site"]
            return self.wide[leaf.value] if self.by_instance(site) else self.codes(site)
        if name == "vitq.activation":
            site = attrs(value)["site"]
            kind, out = attrs(value)["kind"], self.wanted(var)
            return None if out is None else self.index(kind, leaf.value, out, site)
        if name == "relax.multiply" and not any(is_constant(a) for a in value.args):
            return self.gate(leaf.value)
        if name in ("vitq.layer_norm", "vitq.mean", "relax.add", "relax.multiply"):
            return self.wide[leaf.value]
        if name == "relax.concat":
            return self.wanted(var)
        return None

    def index(self, kind: str, x: relax.Var, out: Format, site: str) -> Format:
        return activation_input(kind, self.range_of(x), out, site, self.plan.requantize == "shift")

    def codes(self, site: str) -> Format:
        q = self.plan[site]
        codec = codec_of(q)
        if isinstance(codec, Codebook):
            return codebook_format(q, site)
        limits = codec.limits(q) if isinstance(codec, Uniform) else None
        return codes_format(q.bits, q.scale, q.zero_point, q.granularity, limits)

    def by_instance(self, site: str) -> bool:
        """Whether channels choose their quantizers at run time, from a wide tensor."""
        return self.plan[site].granularity == "instance"

    def book_index(self, book: CodebookFormat) -> Format:
        return book.index(self.plan.requantize == "shift")

    def range_of(self, var: relax.Var) -> float:
        if var.name not in self.plan.ranges:
            raise _no_range(var)
        return self.plan.ranges[var.name]

    def get(self, expr: relax.Expr, to: Format | None) -> relax.Expr:
        """A tensor in the format `to` (None: float32), converted where it is in another one."""
        if is_constant(expr):
            return expr if to is None else const(to.encode(value_of(expr)))
        native, have = self.native[expr]
        if (have is None and to is None) or (have is not None and to is not None and have.key == to.key):
            return native
        slot = (expr, None if to is None else to.key)
        if slot not in self.converted:
            self.converted[slot] = self.builder.emit(
                self.levels(expr, to) if isinstance(to, CodebookFormat) else self.convert(native, have, to),
                name_hint=f"{expr.name}_converted",
            )
        return self.converted[slot]

    def levels(self, expr: relax.Expr, to: CodebookFormat) -> relax.Call:
        """Levels of a codebook by table."""
        index = self.book_index(to)
        table = const(codebook_table(index, to))
        return call("vitq.int_lookup", [self.get(expr, index), table], out_dtype=to.dtype)

    def convert(self, native: relax.Expr, have: Format | None, to: Format | None) -> relax.Call:
        shape = shape_of(native)
        if to is None:
            assert have is not None
            scale, zero = have.broadcast(shape)
            return call(
                "vitq.int_dequantize", [native, const(np.float32(scale)), const(zero)], out_dtype="float32"
            )
        scale, zero = to.broadcast(shape)
        limits = {"out_dtype": to.dtype, "qmin": to.qmin, "qmax": to.qmax}
        if have is None:
            return call("vitq.int_quantize", [native, const(np.float32(1.0 / scale)), const(zero)], **limits)
        ratio, have_zero = have.broadcast(shape)
        args = [native, const(np.float32(ratio / scale)), const(zero), const(have_zero)]
        return call("vitq.int_requantize", args, kind=self.rounding(ratio / scale, "conversion"), **limits)

    def rounding(self, multiplier: Array, site: str) -> str:
        """How an operator rounds: "shift" in shift plans, whose constants are powers of two.

        Multiplying by 2**s, s > 0, has nothing to round; operators in which that occurs keep kind "multiply".
        """
        if self.plan.requantize == "multiply":
            return "multiply"
        exponent = np.log2(np.asarray(multiplier, np.float64))
        if np.any(exponent != np.rint(exponent)) or np.any(exponent < -31):
            raise VitqError(
                "a requantization constant of a shift plan is not a power of two from 2**-31 on",
                where=site,
                got=", ".join(f"{v:.6g}" for v in np.ravel(multiplier)[:3]),
                fix="calibrate with requantize='shift', which makes all scales powers of two",
            )
        return "shift" if exponent.max() <= 0 else "multiply"

    # Operators ----------------------------------------------------------------------------------------------

    def emit(self, var: relax.Var, value: relax.Call) -> relax.Var:
        return self.builder.emit(value, name_hint=var.name)

    def movement(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format | None]:
        operands = data_operands(value)
        formats = [None if is_constant(a) else self.native[a][1] for a in operands]
        if len(operands) == 1:
            to = formats[0]
            moved = [self.native[operands[0]][0] if not is_constant(operands[0]) else operands[0]]
        else:
            to = self.wanted(var) if any(f is not None for f in formats) else None
            moved = [self.get(a, to) for a in operands]
        return self.emit(var, rebuild_movement(value, moved)), to

    def island(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        if isinstance(value, relax.TupleGetItem):
            return self.builder.emit(
                relax.TupleGetItem(self.native[value.tuple_value][0], value.index), var.name
            )
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self.get(a, None) for a in value.fields])
        args = [self.island_operand(a) for a in value.args]
        return self.emit(var, relax.Call(value.op, args, value.attrs, value.ty_args))

    def island_operand(self, arg: relax.Expr) -> relax.Expr:
        if isinstance(arg, relax.Tuple):
            return relax.Tuple([self.island_operand(a) for a in arg.fields])
        return self.get(arg, None) if isinstance(arg, relax.Var) and arg in self.native else arg

    def quantize(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format]:
        if var in self.mixed:
            return self.native[value.args[0]][0], self.mixed[var]
        site = attrs(value)["site"]
        to = self.wide[value.args[0]] if self.by_instance(site) else self.codes(site)
        return self.get(value.args[0], to), to

    def linear(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format | None]:
        site = attrs(value)["site"]
        codes, x = self.native[value.args[0]]
        chosen = self.by_instance(f"{site}.input")
        if x is None or x.dtype != ("int32" if chosen else "int8"):
            raise VitqError(
                "the input of a linear layer has no quantizer", where=site, fix="run annotate first"
            )
        weight, bias = (value_of(a).astype(np.float64) for a in value.args[1:])
        quantizer = self.plan[f"{site}.weight"]
        parts = len(quantizer.scale) // len(weight) if quantizer.granularity == "group" else 1
        numbers = (np.asarray(quantizer.scale), *integer_range(quantizer))
        scale, *ends = (np.broadcast_to(v.reshape(-1, parts), (len(weight), parts)) for v in numbers)
        lowest, highest = ends
        native, out = self.column_formats(var), self.wanted(var)
        largest = self.range_of(var)
        if chosen:
            given = self.plan[f"{site}.input"]
            groups = group_linear_constants(
                weight, bias, scale, (lowest, highest), given, x, native or out, largest, site
            )
            return self.emit(var, self.group_linear(codes, groups, native or out, site)), out
        whole = whole_scales(quantizer, x.scale, x.granularity, len(weight), f"{site}.weight")
        if whole is not None:
            made = multiple_constants(weight, bias, scale, (lowest, highest), whole, x, native or out, site)
        else:
            made = linear_constants(weight, bias, scale, (lowest, highest), x, native or out, largest, site)
        return self.emit(var, self.int_linear(codes, made, native or out, site)), out

    def int_linear(self, x: relax.Expr, made: LinearConstants, out: Format | None, site: str) -> relax.Call:
        args = [x, *map(const, (made.weight, made.bias, made.multiplier, made.zero_point))]
        p = made.inner
        if isinstance(p, Multiples):
            args.append(const(p.count))
        elif p is not None:
            args += [const(p.multiplier), const(p.bias)]
            if p.row_multiplier is not None:
                args += [const(p.row_multiplier), const(p.row_zero_point), const(p.colsum)]
        return call("vitq.int_linear", args, site=site, **self.output(made.multiplier, out, site))

    def group_linear(
        self, x: relax.Expr, made: GroupLinearConstants, out: Format | None, site: str
    ) -> relax.Call:
        if self.plan.requantize == "shift":
            raise VitqError(
                "groups that channels choose at run time have scales that are no powers of two, which a "
                "shift plan does not have",
                where=f"{site}.input",
                fix="use another recipe for a shift plan",
            )
        q = made.quantizers
        args = [x, *map(const, (made.weight, made.bias, made.multiplier, made.zero_point))]
        args += map(const, (q.low, q.high, q.multiplier, q.zero_point, made.group_multiplier))
        codes = {"tokens": q.tokens, "code_min": q.qmin, "code_max": q.qmax}
        return call("vitq.int_linear", args, site=site, **codes, **self.output(made.multiplier, out, site))

    def output(self, multiplier: Array, out: Format | None, site: str) -> dict[str, object]:
        """Attributes of a layer's output conversion."""
        if out is None:
            return {"out_dtype": "float32", "kind": "multiply"}
        limits = {"qmin": out.qmin, "qmax": out.qmax}
        return {"out_dtype": out.dtype, "kind": self.rounding(multiplier, site), **limits}

    def column_formats(self, var: relax.Var) -> Format | None:
        """One format with scales per output channel, if all uses are quantizers that read different channels.

        So q, k and v of one layer, or single heads, get their codes from the layer's own requantization.
        """
        leaves = list(self.graph.leaves(var))
        formats = [self.demand(leaf) for leaf in leaves]
        quantizers = [
            leaf.consumer is not None and op_name(leaf.consumer.value) == "vitq.quantize" for leaf in leaves
        ]
        if (
            not all(quantizers)
            or not leaves
            or any(f is None or f.granularity not in ("tensor", "head") for f in formats)
        ):
            return None
        chosen: list[Format] = [f for f in formats if f is not None]
        if len({f.key for f in chosen}) == 1 and chosen[0].granularity == "tensor":
            return None
        if len({(f.dtype, f.qmin, f.qmax) for f in chosen}) > 1:
            return None
        shape = shape_of(var)
        scale, zero = np.full(shape[-1], np.nan), np.zeros(shape[-1], np.int32)
        for leaf, wanted in zip(leaves, chosen, strict=True):
            columns = columns_read(leaf.path, shape)
            s, z = (np.broadcast_to(v, columns.shape) for v in wanted.broadcast(list(columns.shape)))
            before = scale[columns], zero[columns]
            scale[columns], zero[columns] = s, z
            settled = np.array_equal(scale[columns], s) and np.array_equal(zero[columns], z)
            if not settled or np.any(~np.isnan(before[0]) & ((before[0] != s) | (before[1] != z))):
                return None  # two quantizers want the same channel
        scale[np.isnan(scale)] = 1.0
        for leaf, wanted in zip(leaves, chosen, strict=True):
            assert leaf.consumer is not None
            self.mixed[leaf.consumer.var] = wanted
        return Format(chosen[0].dtype, scale, zero, chosen[0].qmin, chosen[0].qmax, "channel")

    def layer_norm(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format]:
        site, eps = attrs(value)["site"], attrs(value)["eps"]
        x = self.wide[value.args[0]]
        out = self.wanted(var) or self.wide[var]
        gamma, beta = (value_of(a).astype(np.float64) for a in value.args[1:])
        made = layer_norm_constants(gamma, beta, eps, x, out, site)
        node = call(
            "vitq.int_layer_norm",
            [self.get(value.args[0], x), const(made.gain), const(made.offset)],
            site=site,
            shift=made.shift,
            epsilon=made.epsilon,
            out_dtype=out.dtype,
            qmin=out.qmin,
            qmax=out.qmax,
        )
        return self.emit(var, node), out

    def activation(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format] | None:
        out = self.wanted(var)
        if out is None:
            return None
        site, kind = attrs(value)["site"], attrs(value)["kind"]
        x = self.index(kind, value.args[0], out, site)
        table = const(activation_table(kind, x, out, site))
        node = call("vitq.int_lookup", [self.get(value.args[0], x), table], site=site, out_dtype=out.dtype)
        return self.emit(var, node), out

    def attention(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format]:
        info, site = attrs(value), attrs(value)["site"]
        operands = [self.native[a] for a in value.args[:3]]
        if any(f is None or f.dtype != "int8" for _, f in operands):
            raise VitqError("an operand of attention has no quantizer", where=site, fix="run annotate first")
        (_, heads, _, depth), keys = shape_of(value.args[0]), shape_of(value.args[1])[2]
        out = self.wanted(var) or self.wide[var]
        quantizer = self.plan[f"{site}.probs"]
        probs, step = site_probabilities(info["kind"], quantizer, keys, f"{site}.probs")
        if probs.by_row and self.plan.requantize == "shift":
            raise VitqError(
                "probabilities relative to their row need a division, which a shift plan does not have",
                where=f"{site}.probs",
                fix='ask for granularity "tensor" of this site',
            )
        made = attention_constants(
            *(f for _, f in operands), out, probs, step,  # type: ignore[arg-type]
            heads=heads, depth=depth, keys=keys, scale=info["scale"], site=site,
        )  # fmt: skip
        args = [e for e, _ in operands]
        args += map(const, (made.score_multiplier, made.multiplier, made.zero_q, made.zero_k, made.zero_v))
        args += [const(a) for a in (probs.table, probs.edges, probs.values) if a is not None]
        args += [const(additive_scores(value_of(a))) for a in value.args[3:]]
        node = call(
            "vitq.int_attention",
            args,
            site=site,
            probs=probs.kind,
            prob_max=probs.qmax,
            numerator=probs.numerator,
            shift=probs.shift,
            guard=probs.guard,
            prob_zero=probs.zero,
            relative=probs.relative,
            zero_point=int(out.zero_point),
            out_dtype=out.dtype,
            qmin=out.qmin,
            qmax=out.qmax,
            kind=self.rounding(made.multiplier, site),
        )
        return self.emit(var, node), out

    def mean(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format] | None:
        x = value.args[0]
        if self.native[x][1] is None:
            return None
        node = call(
            "vitq.int_mean", [self.get(x, self.wide[x])], axis=attrs(value)["axis"], out_dtype="int32"
        )
        return self.emit(var, node), self.wide[x]

    def add(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format] | None:
        if self.all_float(value):
            return None
        a, b = (self.get(v, self.wide[var]) for v in value.args)
        return self.emit(var, call("vitq.int_add", [a, b], out_dtype="int32")), self.wide[var]

    def multiply(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, Format] | None:
        if self.all_float(value):
            return None
        out = self.wanted(var) or self.wide[var]
        limits = {"out_dtype": out.dtype, "qmin": out.qmin, "qmax": out.qmax}
        constant = [v for v in value.args if is_constant(v)]
        if constant:
            x = next(v for v in value.args if not is_constant(v))
            ratio = value_of(constant[0]) * self.wide[x].scale / out.scale
            args = [
                self.get(x, self.wide[x]),
                const(np.float32(ratio)),
                const(out.zero_point),
                const(np.int32(0)),
            ]
            kind = "multiply"  # by the model's own constant, which no plan makes a power of two
            return self.emit(var, call("vitq.int_requantize", args, kind=kind, **limits)), out
        gates = [self.gate(v) for v in value.args]
        factors = [self.get(v, g) for v, g in zip(value.args, gates, strict=True)]
        ratio = gates[0].scale * gates[1].scale / out.scale
        args = [*factors, const(np.float32(ratio)), const(out.zero_point)]
        return self.emit(
            var, call("vitq.int_multiply", args, kind=self.rounding(ratio, var.name), **limits)
        ), out

    def gate(self, var: relax.Var) -> Format:
        return gate_format(self.range_of(var), self.plan.requantize == "shift")

    def all_float(self, value: relax.Call) -> bool:
        return all(is_constant(v) or self.native[v][1] is None for v in value.args)


def float_islands(mod: tvm.IRModule) -> list[tuple[str, str]]:
    """Variable name and operator of everything in an integer graph that computes in float."""
    return [
        (b.var.name, op_name(b.value))
        for b in Dataflow(mod).bindings
        if isinstance(b.value, relax.Call)
        and not is_movement(b.value)
        and not op_name(b.value).startswith("vitq.int_")
    ]
