"""ONNX files to Relax, with TVM's converters driven node by node.

What depends on weights and shapes only is computed by ONNX's own reference evaluator. Layers are named
after the exporter's module scopes, else after node names, else after weights: exporters share equal weights
between layers, so a weight's name alone may be another layer's.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, onnx_input

from tvm_vitq.errors import VitqError
from tvm_vitq.frontend.onnx_operators import CONVERTERS
from tvm_vitq.ops import shape_of
from tvm_vitq.relax_passes.rewriter import Expr, GraphBuilder

SCOPES = "pkg.torch.onnx.name_scopes"


class _EmitTo:
    """The part of relax.BlockBuilder that TVM's ONNX converters use; every value gets its own binding."""

    def __init__(self, graph: GraphBuilder) -> None:
        self.graph = graph
        self.name = ""

    def emit(self, expr: Expr, name_hint: str = "") -> Expr:
        if isinstance(expr, relax.ShapeExpr):
            return expr
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.emit(f) for f in expr.fields])
        return self.graph.emit(expr, self.name)

    normalize = emit

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"it needs {name}, which has no place in a static graph")


class OnnxImporter(ONNXGraphImporter):
    """One ONNX graph; constants stay NumPy arrays until an operator that depends on the input reads them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__({}, None)
        self.model = model
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.graph = GraphBuilder()
        self.bb = _EmitTo(self.graph)
        self.values: dict[str, np.ndarray] = {}

    def run(self, shape: tuple[int, ...] | None, batch: int) -> tuple[tvm.IRModule, tuple[int, ...]]:
        for tensor in self.model.graph.initializer:
            self.values[tensor.name] = _finite(tensor.name, numpy_helper.to_array(tensor))
        images = self._image(shape, batch)
        for node in self.model.graph.node:
            if all(name in self.values for name in node.input if name):
                self._fold(node)
            elif node.op_type == "Shape" and not node.attribute:
                self.values[node.output[0]] = np.array(shape_of(self._nodes[node.input[0]]), "int64")
            else:
                self._convert(node)
        outputs = [o.name for o in self.model.graph.output]
        if len(outputs) != 1:
            raise VitqError(
                "the model must return one tensor", got=f"{len(outputs)} outputs: {', '.join(outputs)}"
            )
        if outputs[0] not in self._nodes:
            raise VitqError("the model's output does not depend on its input", where=outputs[0])
        result = self.graph.emit(self._nodes[outputs[0]], ":output")
        mod = tvm.IRModule({"main": self.graph.function([images], result)})
        return mod, tuple(shape_of(images))

    def _image(self, shape: tuple[int, ...] | None, batch: int) -> relax.Var:
        inputs = [i for i in self.model.graph.input if i.name not in self.values]
        if len(inputs) != 1:
            raise VitqError(
                "the model takes more than one input",
                got=", ".join(i.name for i in inputs),
                expected="one image tensor",
            )
        tensor = inputs[0].type.tensor_type
        if tensor.elem_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
            raise VitqError("the model's input is not float32", where=inputs[0].name, got=kind)
        stored = [
            int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None
            for d in tensor.shape.dim
        ]
        if len(stored) != 4:
            raise VitqError(
                "the model's input is not an image", where=inputs[0].name, got=stored, expected="[B, C, H, W]"
            )
        if shape is None:
            shape = tuple(v if v is not None else (batch if i == 0 else 0) for i, v in enumerate(stored))
            shape = (batch if stored[0] in (None, batch) else stored[0], *shape[1:])
            if batch not in (1, shape[0]):
                raise VitqError(
                    "the file was exported for another batch size",
                    where=inputs[0].name,
                    got=batch,
                    expected=stored[0],
                )
        if 0 in shape:
            raise VitqError(
                "the file leaves the image size open", where=inputs[0].name, fix="pass input_shape=(C, H, W)"
            )
        if any(have is not None and have != want for have, want in zip(stored, shape, strict=True)):
            raise VitqError(
                "the model was exported for another input shape",
                where=inputs[0].name,
                got=shape,
                expected=stored,
            )
        images = relax.Var("x", relax.TensorType(list(shape), "float32"))
        self._nodes[inputs[0].name] = images
        return images

    def _fold(self, node: onnx.NodeProto) -> None:
        """Evaluate a node that depends on constants only."""
        names = [n for n in dict.fromkeys(node.input) if n]
        infos = [
            helper.make_tensor_value_info(
                n, helper.np_dtype_to_tensor_dtype(self.values[n].dtype), self.values[n].shape
            )
            for n in names
        ]
        outputs = [helper.make_empty_tensor_value_info(o) for o in node.output if o]
        graph = helper.make_graph([node], "constant", infos, outputs)
        single = helper.make_model(
            graph, opset_imports=list(self.model.opset_import), ir_version=self.model.ir_version
        )
        try:
            results = ReferenceEvaluator(single).run(None, {n: self.values[n] for n in names})
        except Exception as error:  # the evaluator raises whatever its NumPy code raises
            raise self._refusal(node, error) from error
        self.values.update(zip((o for o in node.output if o), (np.asarray(r) for r in results), strict=True))

    def _convert(self, node: onnx.NodeProto) -> None:
        self.bb.name = f"{layer_path(node)}:{node.op_type}"
        inputs = onnx_input()
        for name in node.input:
            inputs.append(self.operand(name) if name else None)
        try:
            attributes = self._parse_attr(node.attribute)
            attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
            own = CONVERTERS.get(node.op_type)
            result = own(self, node, attributes) if own is not None else None
            if result is None:
                result = self._convert_operator(node.op_type, inputs, attributes, self.opset)
        except (
            Exception
        ) as error:  # TVM's converters raise whatever comes; the user needs the operator and the layer
            raise self._refusal(node, error) from error
        if len(node.output) == 1 and not isinstance(result, relax.Tuple):
            self._nodes[node.output[0]] = self.graph.emit(result, self.bb.name)
            return
        for index, name in enumerate(node.output):
            item = (
                result.fields[index] if isinstance(result, relax.Tuple) else relax.TupleGetItem(result, index)
            )
            if name:
                self._nodes[name] = self.graph.emit(item, self.bb.name)

    def operand(self, name: str) -> Expr:
        """A value by name, constants included."""
        if name not in self._nodes:
            value = self.values[name]
            self._nodes[name] = relax.const(np.asarray(value, order="C"), str(value.dtype))
        return self._nodes[name]

    @staticmethod
    def _refusal(node: onnx.NodeProto, error: Exception) -> VitqError:
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return VitqError(
            f"ONNX operator is not supported: {reason}",
            where=layer_path(node) or node.name or ", ".join(node.output),
            got=operator,
            fix="export the model with this layer expressed by other operators",
        )


def layer_path(node: onnx.NodeProto) -> str:
    """Dotted module path of the layer that a node was exported from, as far as the file tells."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            scopes = [str(s) for s in ast.literal_eval(entry.value)]
            return scopes[-2] if len(scopes) > 1 else ""
    if "/" in node.name:
        parts: list[str] = []
        for part in node.name.strip("/").split("/")[:-1]:
            if parts and part.startswith(parts[-1] + "."):  # members of a ModuleList repeat its name
                parts[-1] = part
            else:
                parts.append(part)
        return ".".join(parts)
    for name in node.input:
        owner, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias") and owner:
            return owner
    return ""


def _finite(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype in (np.float16, np.float64):
        value = value.astype("float32")
    if value.dtype == np.float32 and np.isnan(value).any():
        raise VitqError(
            "weights hold NaN or infinity",
            where=name,
            got=f"{int(np.isnan(value).sum())} NaN",
            expected="finite weights",
            fix="check the model that was exported",
        )
    if value.dtype == np.float32 and name.endswith((".weight", ".bias")) and not np.isfinite(value).all():
        raise VitqError(
            "weights hold NaN or infinity",
            where=name,
            got=f"{int(np.isinf(value).sum())} infinite",
            expected="finite weights",
            fix="check the model that was exported",
        )
    return value


def import_onnx(
    path: Path, shape: tuple[int, ...] | None, batch: int
) -> tuple[tvm.IRModule, tuple[int, ...]]:
    """An ONNX file as a plain Relax module and its input shape.

    Raises
    ------
    VitqError : missing, truncated or foreign file, unsupported operator (naming it and its layer), another
        shape than the file was exported for, weights that are not finite.
    """
    if not path.is_file():
        raise VitqError("ONNX file does not exist", where=path, fix="check the path")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, checker and missing external data each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VitqError(
            "file cannot be read as an ONNX model", where=path, got=reason, fix="export it again"
        ) from error
    return OnnxImporter(model).run(shape, batch)
