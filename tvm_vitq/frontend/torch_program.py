"""torch.export programs to Relax.

The program is functionalized and decomposed first, except for the operators that carry structure (linear,
layer_norm, scaled_dot_product_attention, ...). Whatever depends on parameters only, relative position bias
gathers, shifted-window masks, interpolated position embeddings, rotary tables, is computed here once, by
torch itself.
"""

from __future__ import annotations

from typing import Any

import torch
import tvm
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from tvm_vitq.errors import VitqError
from tvm_vitq.frontend.torch_operators import CONVERTERS, REPLACE
from tvm_vitq.relax_passes.rewriter import Expr, GraphBuilder

KEPT_WHOLE = (
    "linear",
    "layer_norm",
    "scaled_dot_product_attention",
    "matmul",
    "conv2d",
    "gelu",
    "silu",
    "hardswish",
    "hardsigmoid",
    "softmax",
    "roll",
    "group_norm",
    "leaky_relu",
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "pad",
    "upsample_bilinear2d",
    "upsample_nearest2d",
    "upsample_bicubic2d",
    "mean",
    "select",
)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program in core ATen without in-place updates; structured operators stay whole."""
    table = torch.export.default_decompositions()
    for operator in list(table):
        if operator.__name__.split(".")[0] in KEPT_WHOLE:
            del table[operator]
    return program.run_decompositions(table)


def layer_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made this node; empty at the top."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0]).split("@")[0]
    return path.removeprefix("L['self'].").removeprefix("L__self___")


class _EmitTo:
    """The part of relax.BlockBuilder that TVM's converters use, writing under the layer's name."""

    def __init__(self, graph: GraphBuilder) -> None:
        self.graph = graph
        self.name = ""

    def emit(self, expr: Expr, name_hint: str = "") -> Expr:
        return self.graph.emit(expr, self.name)


class ProgramImporter(ExportedProgramImporter):
    """TVM's converters driven node by node; torch evaluates constants, names remember layers."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = GraphBuilder()
        self.block_builder = _EmitTo(self.graph)
        self.values: dict[fx.Node, Any] = {}  # nodes that do not depend on the input
        self.parameter_names: dict[fx.Node, str] = {}

    def tensor(self, node: fx.Node | None) -> torch.Tensor | None:
        """The torch value of a node that does not depend on the input, else None."""
        return self.values.get(node) if node is not None else None

    def owner(self, weight: fx.Node, node: fx.Node) -> str:
        """The layer that a weight belongs to; for a computed weight, the layer that uses it."""
        name = self.parameter_names.get(weight, "")
        for suffix in (".weight", "_weight"):  # "qkv.weight", but "in_proj_weight" of nn.MultiheadAttention
            if name.endswith(suffix):
                return name.removesuffix(suffix)
        return name or layer_path(node)

    def emit(self, expr: Expr, name: str | None = None) -> Expr:
        return self.graph.emit(expr, self.block_builder.name if name is None else name)

    def constant(self, tensor: torch.Tensor) -> Expr:
        """A Relax constant; it shares the memory of a contiguous float32 tensor."""
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
        tensor = tensor.contiguous()
        if tensor.data_ptr() % 64:  # compiled code assumes aligned constants
            tensor = tensor.clone()
        return relax.const(tvm.runtime.from_dlpack(tensor))

    def run(self, program: ExportedProgram) -> tuple[tvm.IRModule, tuple[int, ...]]:
        images = self._bind_inputs(program)
        result: Any = None
        for node in program.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = getattr(program.graph_module, str(node.target))
            elif node.op == "call_function":
                self._convert(node)
            elif node.op == "output":
                result = self._result(node, program)
        function = self.graph.function([images], result)
        return tvm.IRModule({"main": function}), tuple(int(v) for v in images.ty.shape)

    def _bind_inputs(self, program: ExportedProgram) -> relax.Var:
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        state, constants = program.state_dict, program.constants
        images: relax.Var | None = None
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                if images is not None:
                    raise VitqError(
                        "the model takes more than one input", where=node.name, expected="one image tensor"
                    )
                images = self.env[node] = _image_var(node)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                name = str(spec.target)
                value = state[name] if name in state else constants[name]
                self.values[node], self.parameter_names[node] = value, name
                if any(True for _ in node.users):
                    check_finite(name, value, spec.kind == InputKind.PARAMETER)
        if images is None:
            raise VitqError("the model takes no input", expected="one image tensor")
        return images

    def _convert(self, node: fx.Node) -> None:
        operator = getattr(node.target, "__name__", str(node.target))
        layer = layer_path(node)
        if all(n in self.values for n in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise VitqError(
                    "the model draws random numbers",
                    where=f"{layer}: {node.target}",
                    fix="export it in eval mode",
                )
            self.values[node] = self._evaluate(node)
            return
        for used in node.all_input_nodes:
            if used not in self.env and isinstance(self.values.get(used), torch.Tensor):
                self.env[used] = self.constant(self.values[used])
        self.block_builder.name = f"{layer}:{operator.split('.')[0]}"
        try:
            if operator in CONVERTERS:
                self.env[node] = CONVERTERS[operator](self, node)
            elif operator in self.convert_map:
                self.env[node] = self.convert_map[operator](node)
            else:
                raise VitqError(
                    "torch operator is not supported",
                    where=layer or "top level",
                    got=str(node.target),
                    fix=REPLACE,
                )
        except VitqError:
            raise
        except (
            Exception
        ) as error:  # TVM's converters raise whatever comes; the user needs the layer and the operator
            raise VitqError(
                f"torch operator could not be imported: {type(error).__name__}: {error}",
                where=layer or "top level",
                got=str(node.target),
                fix=REPLACE,
            ) from error

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def _result(self, node: fx.Node, program: ExportedProgram) -> Expr:
        outputs = [
            arg
            for arg, spec in zip(node.args[0], program.graph_signature.output_specs, strict=True)
            if spec.kind == OutputKind.USER_OUTPUT and isinstance(arg, fx.Node)
        ]
        if len(outputs) != 1:
            raise VitqError(
                "the model must return one tensor",
                got=f"{len(outputs)} outputs",
                fix="wrap it in a module that returns the logits",
            )
        if outputs[0] not in self.env:
            raise VitqError(
                "the model's output does not depend on its input", expected="a graph from input to logits"
            )
        return self.env[outputs[0]]


def _image_var(node: fx.Node) -> relax.Var:
    value = node.meta.get("val")
    shape = getattr(value, "shape", None)
    if shape is None or any(not isinstance(s, int) for s in shape):
        raise VitqError(
            "the program has a dynamic or non-tensor input",
            where=node.name,
            got=shape,
            fix="export with a fixed shape",
        )
    if value.dtype != torch.float32:
        raise VitqError(
            "the program's input is not float32", where=node.name, got=value.dtype, expected="torch.float32"
        )
    return relax.Var("x", relax.TensorType(list(shape), "float32"))


def check_finite(name: str, value: torch.Tensor, parameter: bool = True) -> None:
    """Refuse NaN anywhere and, in parameters, infinity; masks kept as buffers may hold -inf."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return
    finite = bool(torch.isfinite(value).all()) if parameter else not bool(torch.isnan(value).any())
    if not finite:
        bad = int((~torch.isfinite(value)).sum())
        raise VitqError(
            "weights hold NaN or infinity",
            where=name,
            got=f"{bad} of {value.numel()} values",
            expected="finite weights",
            fix="check the checkpoint",
        )


def import_program(program: ExportedProgram) -> tuple[tvm.IRModule, tuple[int, ...]]:
    """An ExportedProgram as a plain Relax module (``main`` from images to logits) and its input shape.

    Raises
    ------
    VitqError : unsupported operator (naming it and its layer), dynamic shapes, several inputs or outputs,
        weights that are not finite.
    """
    return ProgramImporter().run(decompose(program))
