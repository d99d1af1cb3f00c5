"""Replaces GELU by ReLU and refits the layers around it: the "MLP reconstruction" of APHQ-ViT.

A hidden activation behind ReLU has no negative part, so all codes of an unsigned uniform quantizer are used.
The module (LayerNorm, fc1, fc2) is trained in float to give what it gave with GELU, and to give it as well if
its hidden activations are clamped at a percentile of their positive values, which pulls in the long tail:

    loss = direct + 2 clamped
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvm_vitq.calibrate.blocks import Unit, find_units
from tvm_vitq.calibrate.executor import Executor, Hooks, Step
from tvm_vitq.calibrate.fit import GELUS
from tvm_vitq.calibrate.job import PARAMETERS, Cost, Job
from tvm_vitq.calibrate.losses import CHUNK, Batch, Context, Loss, Measure, SquaredError
from tvm_vitq.calibrate.resume import Fitted, Store

SAMPLED = 2**14
"""Hidden values, about, that a step takes its percentile from."""

CLAMPS, OTHER_CLAMP = {3: 0.99}, 0.98
"""Percentiles by the bits of the hidden activations: APHQ-ViT's for 3 bits; for 2, 4 and here all others."""


@dataclass(frozen=True)
class Refit:
    """How modules are refitted.

    Parameters
    ----------
    iterations, batch : steps per module, and images per step (whole batches of the graph).
    rate : learning rate, relative to the root mean square of each trained tensor.
    clamped : weight of the loss with clamped hidden activations;  percentile : of their positive values at
        which they are; None: see `CLAMPS`.
    loss : see `losses`.
    """

    iterations: int = 400
    batch: int = 16
    rate: float = 2e-3
    clamped: float = 2.0
    percentile: float | None = None
    loss: Loss = field(default_factory=SquaredError)


def gelu_to_relu(job: Job, settings: Refit, label: str = "relu") -> Executor:
    """Replace every GELU that linear layers read and refit its module, front to back; others, such as those
    of gated MLPs, are noted. Changes the job's module, constants and costs.

    Call it before anything is observed. Each module gets the input that the refitted modules in front of it
    make.

    Parameters
    ----------
    label : of this stage, names its files in ``job.work``; a module found there is not refitted again.

    Returns
    -------
    The model as it was, with GELU.

    Raises
    ------
    VitqError : ``job.work`` holds files of another calibration.
    """
    began, teacher = time.monotonic(), Executor(job.mod)
    units = find_units(job.mod, "module")
    found = {unit: _gelus(job, teacher, unit) for unit in units}
    limits = {unit: _percentiles(job, steps, settings) for unit, steps in found.items()}
    job.replace_activations({step.layer: "relu" for steps in found.values() for step in steps})
    student, store = Executor(job.mod), Store(job, label, (settings, [*limits.values()]), units)
    changed: dict[str, Tensor] = {}
    trained, exact, refitted = 0, job.images, job.images
    bar = job.progress(range(sum(map(bool, found.values())) * settings.iterations), label)
    for number, unit in enumerate(units):
        with torch.no_grad():
            target = teacher.run_between(unit.start, unit.stop, exact, chunk=CHUNK)
        if found[unit]:
            fitted = store.load(number)
            if fitted is None:
                context = Context(unit, units[-1], teacher, exact, target)
                generator = torch.Generator().manual_seed(zlib.crc32(f"{job.seed} {label} {number}".encode()))
                training = _Refitting(student, context, limits[unit], refitted, settings, generator)
                fitted = Fitted(training.run(bar), {})
                store.save(number, fitted)
                trained += settings.iterations
            else:
                bar.update(settings.iterations)
            changed |= fitted.constants
            student.constants |= fitted.constants
        with torch.no_grad():
            refitted = student.run_between(unit.start, unit.stop, refitted, chunk=CHUNK)
        exact = target
    bar.close()
    job.replace({name: value.numpy() for name, value in changed.items()})
    job.costs[label] = Cost(trained, time.monotonic() - began)
    return teacher


def _gelus(job: Job, executor: Executor, unit: Unit) -> list[Step]:
    read = {site.variable for site in job.sites.values() if site.role == "input"}
    found = []
    for step in executor.between(unit.start, unit.stop):
        if step.op == "vitq.activation" and step.attributes["kind"] in GELUS:
            if step.name in read:
                found.append(step)
            else:
                job.notes[step.layer] = "GELU stays: no linear layer reads its output"
    return found


def _percentiles(job: Job, activations: Sequence[Step], settings: Refit) -> dict[str, float]:
    """Where the values of each activation are clamped, by its variable."""
    found = {}
    for step in activations:
        bits = [job.specs[site.name].bits for site in job.sites.values() if site.variable == step.name]
        by_bits = CLAMPS.get(min(bits, default=0), OTHER_CLAMP)
        found[step.name] = by_bits if settings.percentile is None else settings.percentile
    return found


class _Refitting(Hooks):
    """One module; as hooks, what clamps its hidden activations."""

    def __init__(
        self,
        student: Executor,
        context: Context,
        percentiles: dict[str, float],
        inputs: Tensor,
        settings: Refit,
        generator: torch.Generator,
    ) -> None:
        self.student, self.context, self.inputs = student, context, inputs
        self.settings, self.generator, self.percentiles = settings, generator, percentiles
        layers = {step.layer for step in student.between(context.unit.start, context.unit.stop)}
        names = [f"{layer}.{role}" for layer in sorted(layers) for role in PARAMETERS]
        self.start = {name: student.constants[name] for name in names if name in student.constants}
        self.moves = {name: torch.zeros_like(value, requires_grad=True) for name, value in self.start.items()}

    def run(self, bar: Any) -> dict[str, Tensor]:
        """Train; the constants that come out."""
        settings = self.settings
        measure = settings.loss.prepare(self.context)
        optimizer = torch.optim.Adam(self.moves.values(), settings.rate)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.iterations))
        for index in self.batches():
            self.student.constants |= self.moved()
            loss = self.loss(measure, index, Hooks())
            if settings.clamped:
                loss = loss + settings.clamped * self.loss(measure, index, self)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            bar.update(1)
        with torch.no_grad():
            return {name: value.detach() for name, value in self.moved().items()}

    def batches(self) -> Iterator[Tensor]:
        count, batch = len(self.inputs), self.student.batch
        size = min(max(1, self.settings.batch // batch), max(1, count // batch)) * batch
        for _ in range(self.settings.iterations):
            yield torch.randperm(count, generator=self.generator)[:size]

    def moved(self) -> dict[str, Tensor]:
        return {name: value + self.size(name) * self.moves[name] for name, value in self.start.items()}

    def size(self, name: str) -> float:
        """What a move of 1 is: of biases a typical output of the layer, of beta a typical gamma."""
        layer, _, role = name.rpartition(".")
        owner = self.start[{"bias": f"{layer}.weight", "beta": f"{layer}.gamma"}.get(role, name)]
        return float(owner.norm(dim=-1).mean() if role == "bias" else owner.square().mean().sqrt())

    def loss(self, measure: Measure, index: Tensor, hooks: Hooks) -> Tensor:
        unit = self.context.unit
        output = self.student.run_between(unit.start, unit.stop, self.inputs[index], hooks)
        return measure(Batch(output, self.context.targets[index], index, {}))

    def value(self, name: str, x: Tensor) -> Tensor:
        if name not in self.percentiles:
            return x
        sample = x.detach().flatten()[:: max(1, x.numel() // SAMPLED)]
        positive = sample[sample > 0]
        if not len(positive):
            return x
        return x.clamp(max=float(positive.quantile(self.percentiles[name])))
