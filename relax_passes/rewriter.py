"""What the canonicalization passes share: building one dataflow block, and rewriting one call at a time.

Until `name_bindings` gives the final names, a variable is called ``<module path>:<operator>``; the part
before the colon is the layer that the value comes from. Variables are told apart by identity, names may
repeat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Expr, GenericConst, Var

from tvm_vitq.errors import VitqError
from tvm_vitq.graph import is_constant, value_of
from tvm_vitq.ops import op_name, shape_of


def constant(value: np.ndarray) -> GenericConst:
    """A Relax constant; float64 becomes float32, as everything canonical is float32."""
    value = np.asarray(value, dtype="float32" if value.dtype == np.float64 else None, order="C")
    return relax.const(value, str(value.dtype))


def scalar_of(expr: Expr) -> float | None:
    """The number that a one-element constant holds, else None."""
    if not is_constant(expr) or int(np.prod(shape_of(expr))) != 1:
        return None
    return float(value_of(expr).reshape(()))


def layer_of(name: str) -> str:
    """The module path inside a working variable name."""
    return name.split(":", 1)[0]


def int_list(values: Expr | Sequence[int]) -> list[int]:
    """Plain integers of a shape, a tuple of IntImm, or an attribute array."""
    fields = values.fields if isinstance(values, relax.Tuple) else values
    return [int(v) for v in fields]


class GraphBuilder:
    """The bindings of one dataflow block under construction, with every definition at hand."""

    def __init__(self) -> None:
        self._block = relax.BlockBuilder()
        self.bindings: list[relax.VarBinding] = []
        self._definitions: dict[Var, Expr] = {}

    def emit(self, expr: Expr, name: str = "") -> Expr:
        """Bind `expr` to a new variable and return it; variables and constants come back as they are."""
        if isinstance(expr, Var) or is_constant(expr):
            return expr
        if isinstance(expr, Call):
            expr = self._flat(expr, name)
        expr = self._block.normalize(expr)
        var = relax.DataflowVar(name, expr.ty)
        self.bindings.append(relax.VarBinding(var, expr))
        self._definitions[var] = expr
        return var

    def _flat(self, call: Call, name: str) -> Call:
        """`call` with nested calls, also those inside tuples, bound to variables of their own."""

        def bound(arg: Expr) -> Expr:
            if isinstance(arg, relax.Tuple):
                if any(isinstance(f, (Call, relax.TupleGetItem)) for f in arg.fields):
                    return relax.Tuple([bound(f) for f in arg.fields])
                return arg
            if isinstance(arg, (Call, relax.TupleGetItem)):
                return self.emit(arg, f"{layer_of(name)}:{op_name(arg).rpartition('.')[2] or 'item'}")
            return arg

        if any(isinstance(a, (Call, relax.Tuple, relax.TupleGetItem)) for a in call.args):
            return Call(call.op, [bound(a) for a in call.args], call.attrs, call.ty_args)
        return call

    def definition(self, expr: Expr) -> Expr:
        """The call that a variable of this block is bound to; anything else is its own definition."""
        return self._definitions.get(expr, expr) if isinstance(expr, Var) else expr

    def call_of(self, expr: Expr, *names: str) -> Call | None:
        """The call of one of the operators `names` that `expr` stands for, else None."""
        found = self.definition(expr)
        return found if op_name(found) in names else None

    def function(self, params: list[Var], result: Expr, attrs: object = None) -> relax.Function:
        """The function that returns `result`; bindings that it does not need are dropped."""
        if is_constant(result) or not isinstance(result, Var) or result not in self._definitions:
            raise VitqError(
                "the model's output does not depend on its input", expected="a graph from input to logits"
            )
        needed = {result}
        kept: list[relax.VarBinding] = []
        for binding in reversed(self.bindings):
            if binding.var in needed:
                needed.update(variables(binding.value))
                kept.append(binding)
        kept.reverse()
        last = kept[-1]  # a dataflow block hands its value out through an ordinary variable
        output = relax.Var(last.var.name, last.var.ty)
        kept[-1] = relax.VarBinding(output, last.value)
        body = self._block.normalize(relax.SeqExpr([relax.DataflowBlock(kept)], output))
        function = relax.Function(params, body, output.ty, is_pure=True)
        return function.with_attr("global_symbol", "main")


def variables(expr: Expr) -> list[Var]:
    """The variables that `expr` reads directly."""
    if isinstance(expr, Var):
        return [expr]
    if isinstance(expr, Call):
        return [v for a in expr.args for v in variables(a)]
    if isinstance(expr, relax.Tuple):
        return [v for f in expr.fields for v in variables(f)]
    if isinstance(expr, relax.TupleGetItem):
        return variables(expr.tuple_value)
    return []


class Rewriter(GraphBuilder):
    """One forward walk over ``main``; subclasses override `rewrite`.

    A pattern is matched at its last operator, looking back through `definition`. What a match no longer
    needs is dropped when the function is put together, so an intermediate value that has another reader
    simply stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._renamed: dict[Var, Expr] = {}
        self._readers: dict[Var, int] = {}

    def rewrite(self, call: Call, name: str) -> Expr | None:
        """A replacement for `call`, whose arguments are those of the new graph, or None to keep it."""
        raise NotImplementedError

    def readers(self, expr: Expr) -> int:
        """How many calls of the old graph read the value that `expr` was made for."""
        return self._readers.get(expr, 0) if isinstance(expr, Var) else 0

    def substitute(self, expr: Expr) -> Expr:
        if isinstance(expr, Var):
            return self._renamed.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.substitute(f) for f in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.substitute(expr.tuple_value), expr.index)
        if isinstance(expr, Call):
            return Call(expr.op, [self.substitute(a) for a in expr.args], expr.attrs, expr.ty_args)
        return expr

    def transform(self, function: relax.Function) -> relax.Function:
        counts: dict[Var, int] = {}
        for block in function.body.blocks:
            for binding in block.bindings:
                for var in variables(binding.value):
                    counts[var] = counts.get(var, 0) + 1
        for block in function.body.blocks:
            for binding in block.bindings:
                value, name = self.substitute(binding.value), binding.var.name
                replaced = None
                if isinstance(value, Call):
                    value = self._block.normalize(value)
                    replaced = self.rewrite(value, name)
                elif isinstance(value, relax.TupleGetItem):
                    replaced = self.rewrite_item(value, name)
                new = self.emit(value if replaced is None else replaced, name)
                self._renamed[binding.var] = new
                if isinstance(new, Var):
                    self._readers[new] = self._readers.get(new, 0) + counts.get(binding.var, 0)
        return self.function(list(function.params), self.substitute(function.body.body))

    def rewrite_item(self, item: relax.TupleGetItem, name: str) -> Expr | None:
        """As `rewrite`, for one element of a tuple."""
        return None


def rewriting_pass(rewriter: type[Rewriter], name: str, repeat: bool = False) -> tvm.transform.Pass:
    """A module pass that runs `rewriter` over ``main``; with `repeat`, until nothing changes."""

    def run(mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        main, before = mod["main"], -1
        while True:
            main = rewriter().transform(main)
            count = len(main.body.blocks[0].bindings)
            if not repeat or count == before:
                return tvm.IRModule({"main": main})
            before = count

    return tvm.transform.module_pass(run, opt_level=0, name=name)


def broadcast_vector(expr: Expr, axis: int, size: int) -> np.ndarray | None:
    """The `size` values of a constant that varies along `axis` (negative, from the end) only, else None.

    A one-element constant counts: it is repeated.
    """
    if not is_constant(expr):
        return None
    shape = shape_of(expr)
    if int(np.prod(shape)) == 1:
        return np.full(size, value_of(expr).reshape(()), dtype="float32")
    if len(shape) < -axis or shape[axis] != size or int(np.prod(shape)) != size:
        return None
    return value_of(expr).reshape(size)
