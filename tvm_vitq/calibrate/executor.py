"""Runs a float graph in torch: differentiable, observable, with any number of images.

Graphs have a fixed batch B. The executor gives every tensor one more axis in front, [n, B, ...], and runs n
batches at once: every operator works on the static shape behind that axis, so this is the graph's own
meaning whatever it does with its batch axis. Constants have extent 1 there. Axes of the graph are shifted by
one (`operators.py`); axes counted from the end, as in plans, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_vitq.calibrate.operators import HANDLERS
from tvm_vitq.errors import VitqError
from tvm_vitq.ops import attrs, is_ours, op_name, shape_of
from tvm_vitq.relax_passes.sites import bindings


class Hooks:
    """What happens to the values of a run. The defaults change nothing; subclasses observe or replace.

    Tensors have the extra axis in front, [n, *shape in the graph]; weights have not.
    """

    def value(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Called with the value of every variable."""
        return x

    def quantize(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """Called at every vitq.quantize."""
        return x

    def weight(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """Called with the [N, K] weight of every vitq.linear; `site` ends in ".weight"."""
        return weight

    def probs(self, site: str, probs: torch.Tensor) -> torch.Tensor:
        """Called with the probabilities of every vitq.attention; `site` ends in ".probs"."""
        return probs


@dataclass(frozen=True)
class Reference:
    """An argument that is a variable or a constant of the executor."""

    name: str
    constant: bool


@dataclass
class Step:
    """One binding: which handler runs on which arguments."""

    name: str
    op: str
    layer: str
    arguments: list[Any]
    attributes: Any
    dead: list[str] = field(default_factory=list)


ROLES = {"vitq.linear": ("input", "weight", "bias"), "vitq.layer_norm": ("x", "gamma", "beta")}


class Executor:
    """A float graph, canonical or annotated, as a torch function.

    Parameters
    ----------
    mod : the module; its constants are shared, not copied, until `constants` entries are replaced.

    Attributes
    ----------
    constants : tensors by name: "<site>.weight", ".bias", ".gamma", ".beta", else "<variable>.<argument
        index>". Replace an entry to change the function; set ``requires_grad`` to train it.
    batch : images per batch of the graph.

    Raises
    ------
    VitqError : at construction, for an operator that has no torch form here, with its name and layer.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        function = mod["main"]
        (self.input,) = function.params
        self.input_shape = tuple(shape_of(self.input))
        self.batch = self.input_shape[0]
        self.constants: dict[str, torch.Tensor] = {}
        self._parts: dict[tuple[str, str], list[Step]] = {}
        self.steps = [self._step(binding) for binding in bindings(mod)]
        self.output = _Arguments(self, "result", "").parse(function.body.body, "")
        self._find_last_uses()

    def _step(self, binding: relax.VarBinding) -> Step:
        value, name = binding.value, binding.var.name
        op = op_name(value) or type(value).__name__
        attributes: Any = attrs(value) if is_ours(value) else getattr(value, "attrs", None)
        layer = attributes["site"] if is_ours(value) else name
        if op not in HANDLERS:
            raise VitqError(
                "operator without a torch form", where=layer, got=op, fix="calibrate needs a handler for it"
            )
        parser = _Arguments(self, name, layer if op in ROLES else "")
        if isinstance(value, relax.Call):
            roles = ROLES.get(op, ())
            arguments = [
                parser.parse(a, roles[i] if i < len(roles) else str(i)) for i, a in enumerate(value.args)
            ]
        elif isinstance(value, relax.TupleGetItem):
            arguments = [parser.parse(value.tuple_value, "0"), int(value.index)]
        elif isinstance(value, tvm.ir.Tuple):
            arguments = [parser.parse(item, str(i)) for i, item in enumerate(value.fields)]
        else:
            arguments = [parser.parse(value, "0")]
        return Step(name, op, layer, arguments, attributes)

    def _find_last_uses(self) -> None:
        seen = {r.name for r in _references(self.output)}
        for step in reversed(self.steps):
            used = {r.name for r in _references(step.arguments) if not r.constant} | {step.name}
            step.dead = [name for name in used if name not in seen]
            seen |= used

    def run(self, images: torch.Tensor, hooks: Hooks | None = None, chunk: int | None = None) -> torch.Tensor:
        """Results for any number of images.

        Parameters
        ----------
        images : float32 [N, 3, H, W]; the last batch is filled up by repeating images, whose results are
            dropped.
        hooks : see Hooks.
        chunk : images computed at once (about; whole batches); bounds memory. None: all.

        Returns
        -------
        float32 [N, ...]
        """
        if tuple(images.shape[1:]) != self.input_shape[1:]:
            raise VitqError(
                "input of the wrong shape", got=tuple(images.shape), expected=("N", *self.input_shape[1:])
            )
        return self._in_batches(images, self.input.name, self.steps, self.output, hooks, chunk)

    def between(self, start: str, stop: str) -> list[Step]:
        """The bindings that make variable `stop` of variable `start` and constants, in program order;
        VitqError if that takes more.
        """
        if (start, stop) in self._parts:
            return self._parts[start, stop]
        wanted, steps = {stop}, []
        for step in reversed(self.steps):
            if step.name in wanted and step.name != start:
                wanted |= {r.name for r in _references(step.arguments) if not r.constant}
                steps.append(step)
        if self.input.name in wanted and start != self.input.name:
            raise VitqError("the result depends on more than the start", where=stop, got=start)
        self._parts[start, stop] = steps[::-1]
        return self._parts[start, stop]

    def run_between(
        self, start: str, stop: str, x: torch.Tensor, hooks: Hooks | None = None, chunk: int | None = None
    ) -> torch.Tensor:
        """Values [N, ...] of variable `stop` from those of `start`; in the graph both have the batch first.

        `hooks` and `chunk` as in `run`; differentiable in x.
        """
        steps = self.between(start, stop)
        return self._in_batches(x, start, steps, Reference(stop, False), hooks, chunk)

    def _in_batches(
        self,
        x: torch.Tensor,
        start: str,
        steps: list[Step],
        result: Any,
        hooks: Hooks | None,
        chunk: int | None,
    ) -> torch.Tensor:
        count = len(x)
        if count % self.batch:
            fill = torch.arange(self.batch - count % self.batch) % count
            x = torch.cat([x, x[fill]])
        batches = x.unflatten(0, (-1, self.batch))
        at_once = len(batches) if chunk is None else max(1, chunk // self.batch)
        parts = [self._run(part, start, steps, result, hooks or Hooks()) for part in batches.split(at_once)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(0, 1)[:count]

    def _run(self, batches: torch.Tensor, start: str, steps: list[Step], result: Any, hooks: Hooks) -> Any:
        values: dict[str, Any] = {start: hooks.value(start, batches)}
        for step in steps:
            arguments = [self._fetch(a, values) for a in step.arguments]
            outcome = HANDLERS[step.op](hooks, step.layer, step.attributes, *arguments)
            if isinstance(outcome, torch.Tensor):
                outcome = hooks.value(step.name, outcome)
            values[step.name] = outcome
            for name in step.dead:
                del values[name]
        return self._fetch(result, values)

    def _fetch(self, argument: Any, values: dict[str, Any]) -> Any:
        if isinstance(argument, Reference):
            return self.constants[argument.name].unsqueeze(0) if argument.constant else values[argument.name]
        if isinstance(argument, list):
            return [self._fetch(item, values) for item in argument]
        return argument


class _Arguments:
    """Turns Relax arguments of one binding into references, numbers and lists of them."""

    def __init__(self, executor: Executor, variable: str, site: str) -> None:
        self.constants = executor.constants
        self.owner = site or variable

    def parse(self, value: Any, role: str) -> Any:
        if isinstance(value, relax.Var):
            return Reference(value.name, False)
        if isinstance(value, GenericConst):
            name = f"{self.owner}.{role}"
            self.constants[name] = torch.from_dlpack(value.value)
            return Reference(name, True)
        if isinstance(value, tvm.ir.Tuple):
            return [self.parse(item, f"{role}.{i}") for i, item in enumerate(value.fields)]
        if isinstance(value, relax.ShapeExpr):
            return [int(v) for v in value.values]
        if isinstance(value, (tvm.tirx.IntImm, tvm.tirx.FloatImm)):
            return value.value
        raise VitqError("argument that calibration cannot read", where=self.owner, got=type(value).__name__)


def _references(argument: Any) -> list[Reference]:
    if isinstance(argument, Reference):
        return [argument]
    if isinstance(argument, list):
        return [r for item in argument for r in _references(item)]
    return []
