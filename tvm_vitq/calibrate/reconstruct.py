"""Fits a model unit by unit, so that each quantized unit gives what the float one gives (BRECQ, QDrop).

Trained are weights (`rounding`), biases, LayerNorms and scales of activations. Every trained number counts
in a unit of its own (a step of the weight's quantizer, the logarithm of a scale), so learning rates fit all
layers, widths and models, and a few hundred iterations suffice.

The input of a unit is that of the float model, that of the quantized units in front of it, or a mixture that
takes each element from either; the same share of the activations inside stays in float (QDrop), which keeps
the result from fitting the errors of the calibration images.

Each unit has its own random numbers, so a run that is interrupted and resumed ends like one that is not.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvm_vitq.calibrate.blocks import Unit
from tvm_vitq.calibrate.dropping import Mix, random_mask
from tvm_vitq.calibrate.executor import Executor, Hooks
from tvm_vitq.calibrate.job import Cost, Job
from tvm_vitq.calibrate.losses import CHUNK, Batch, Context, Loss, Measure, SquaredError
from tvm_vitq.calibrate.prefix import Quantized
from tvm_vitq.calibrate.resume import Fitted, Store
from tvm_vitq.calibrate.rounding import AdaRound, Weight
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import codec_of


@dataclass(frozen=True)
class Settings:
    """How units are trained.

    Parameters
    ----------
    iterations, batch : steps per unit, and images per step (whole batches of the graph).
    float_inputs : share of a unit's input that is the float model's; the rest is the quantized prefix's.
    drop : share of the activations in the unit that are not quantized in a step.
    weights : what is trained of them, a class of `rounding`.
    rate : factor of its learning rate;  rate_scales, rate_biases : learning rates of the logarithms of scales
        and of biases in units of their row's norm; 0: not trained.
    rounding : weight of the penalty for undecided roundings, summed over a unit's weights, relative to the
        loss before training; no penalty in the first `warmup` of the steps, then beta falls linearly.
    loss : see `losses`.
    """

    iterations: int = 300
    batch: int = 8
    float_inputs: float = 0.5
    drop: float = 0.5
    weights: type[Weight] = AdaRound
    rate: float = 1.0
    rate_scales: float = 2e-3
    rate_biases: float = 0.0
    rate_norms: float = 0.0
    rounding: float = 1.0
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    loss: Loss = field(default_factory=SquaredError)


def reconstruct(
    job: Job,
    units: Sequence[Unit],
    settings: Settings,
    teacher: Executor | None = None,
    label: str = "reconstruct",
) -> None:
    """Train all units front to back; changes the job's constants, quantizers, ranges and costs.

    Parameters
    ----------
    units : all of `find_units`; every site has its quantizer.
    teacher : the float model, if the job's constants no longer are.
    label : of this stage, names its files in ``job.work``; a unit found there is not trained again.

    Raises
    ------
    VitqError : ``job.work`` holds files of another calibration.
    """
    began, teacher = time.monotonic(), teacher or Executor(job.mod)
    student = Executor(job.mod)
    store = Store(job, label, settings, units)
    changed: dict[str, Tensor] = {}
    exact = quantized = job.images
    bar = job.progress(range(len(units) * settings.iterations), label)
    trained = 0
    for number, unit in enumerate(units):
        with torch.no_grad():
            target = teacher.run_between(unit.start, unit.stop, exact, chunk=CHUNK)
        found = store.load(number)
        if found is None:
            context = Context(unit, units[-1], teacher, exact, target)
            seed = zlib.crc32(f"{job.seed} {label} {number}".encode())
            training = _Training(job, student, context, quantized, settings, seed)
            found = training.run(bar)
            store.save(number, found)
            trained += settings.iterations
        else:
            bar.update(settings.iterations)
        changed |= found.constants
        student.constants |= found.constants
        for site, scale in found.scales.items():
            job.quantizers[site] = dataclasses.replace(job.quantizers[site], scale=scale.tolist())
        hooks = Quantized(job.quantizers)
        with torch.no_grad():
            quantized = student.run_between(unit.start, unit.stop, quantized, hooks, CHUNK)
        hooks.widen(job.ranges)
        exact = target
    bar.close()
    job.replace({name: value.numpy() for name, value in changed.items()})
    job.costs[label] = Cost(trained, time.monotonic() - began)


class _Training(Hooks):
    """One unit under training; as hooks, its quantizers."""

    def __init__(
        self, job: Job, student: Executor, context: Context, quantized: Tensor, settings: Settings, seed: int
    ) -> None:
        self.student, self.context, self.quantized = student, context, quantized
        self.settings, self.unit = settings, context.unit
        self.generator = torch.Generator().manual_seed(seed)
        self.quantizers = job.quantizers
        self.drop, self.maps = 0.0, dict[str, Tensor]()
        names = [f"{layer}.weight" for layer in self.unit.layers]
        originals = {name: student.constants[name] for name in names if name in student.constants}
        self.weights = {n: settings.weights(w, job.quantizers[n]) for n, w in originals.items()}
        biases = {n.replace(".weight", ".bias"): float(w.norm(dim=1).mean()) for n, w in originals.items()}
        self.units = (biases if settings.rate_biases else {}) | (self._norms() if settings.rate_norms else {})
        self.moves = {n: torch.zeros_like(student.constants[n], requires_grad=True) for n in self.units}
        self.numbers: dict[str, dict[str, Tensor]] = {}
        self.logs: dict[str, Tensor] = {}
        for site in [*self.unit.sites, *(f"{layer}.probs" for layer in self.unit.layers)]:
            if site in job.quantizers:
                self._add(site, job.quantizers[site])

    def _norms(self) -> dict[str, float]:
        """Affine parts of the unit's LayerNorms, with the unit that they are trained in."""
        steps = self.student.between(self.unit.start, self.unit.stop)
        sizes: dict[str, float] = {}
        for step in steps:
            if step.op == "vitq.layer_norm":
                size = float(self.student.constants[f"{step.layer}.gamma"].abs().mean())
                sizes |= {f"{step.layer}.{part}": size for part in ("gamma", "beta")}
        return sizes

    def _add(self, site: str, quantizer: SiteQuantizer) -> None:
        parameters = codec_of(quantizer).parameters(quantizer)
        self.numbers[site] = {key: torch.from_numpy(value) for key, value in parameters.items()}
        if "scale" in parameters:
            self.logs[site] = torch.zeros(len(parameters["scale"]), requires_grad=True)

    def run(self, bar: Any) -> Fitted:
        """Train; what the unit started from is kept if training did not lower the loss."""
        settings = self.settings
        measure = settings.loss.prepare(self.context)
        untrained = self.fitted()
        before = self.error(measure, untrained)
        rates = (
            ([p for w in self.weights.values() for p in w.trained], settings.rate * settings.weights.rate),
            (list(self.logs.values()), settings.rate_scales),
            ([m for n, m in self.moves.items() if n.endswith(".bias")], settings.rate_biases),
            ([m for n, m in self.moves.items() if not n.endswith(".bias")], settings.rate_norms),
        )
        groups = [{"params": params, "lr": rate} for params, rate in rates if params and rate]
        if not groups or not settings.iterations:
            return untrained
        optimizer = torch.optim.Adam(groups)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
        for index, progress in self.batches():
            loss = self.loss(measure, index, progress) / max(before, 1e-30)
            if progress >= settings.warmup and settings.rounding:
                done = (progress - settings.warmup) / (1 - settings.warmup)
                beta = settings.beta[0] + (settings.beta[1] - settings.beta[0]) * done
                count = sum(w.steps.numel() for w in self.weights.values())
                undecided = [w.penalty(beta) for w in self.weights.values()]
                loss = loss + settings.rounding / count * torch.stack(undecided).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            bar.update(1)
        fitted = self.fitted()
        return fitted if self.error(measure, fitted) < before else untrained

    def batches(self) -> Iterator[tuple[Tensor, float]]:
        """Images and progress, 0 to 1, of every step."""
        count, batch = len(self.quantized), self.student.batch
        size = min(max(1, self.settings.batch // batch), max(1, count // batch)) * batch
        for step in range(self.settings.iterations):
            index = torch.randperm(count, generator=self.generator)[:size]
            yield index, step / self.settings.iterations

    def loss(self, measure: Measure, index: Tensor, progress: float) -> Tensor:
        """The loss of some images as training sees them."""
        settings = self.settings
        x = self.quantized[index]
        if settings.float_inputs:
            exact = self.context.inputs[index]
            x = torch.lerp(x, exact, random_mask(x.shape, settings.float_inputs, self.generator))
        kept = {name: self.student.constants[name] for name in self.moves}
        self.student.constants |= {n: kept[n] + self.units[n] * move for n, move in self.moves.items()}
        self.drop, self.maps = settings.drop, {}
        output = self.student.run_between(self.unit.start, self.unit.stop, x, self)
        self.student.constants |= kept
        return measure(Batch(output, self.context.targets[index], index, self.maps, progress))

    def error(self, measure: Measure, fitted: Fitted) -> float:
        """The loss over all images as the plan will run."""
        quantizers = dict(self.quantizers)
        for site, scale in fitted.scales.items():
            quantizers[site] = dataclasses.replace(quantizers[site], scale=scale.tolist())
        kept = {name: self.student.constants[name] for name in fitted.constants}
        self.student.constants |= fitted.constants
        total = 0.0
        with torch.no_grad():
            for index in torch.arange(len(self.quantized)).split(CHUNK):
                hooks = Quantized(quantizers)
                x = self.quantized[index]
                output = self.student.run_between(self.unit.start, self.unit.stop, x, hooks)
                batch = Batch(output, self.context.targets[index], index, hooks.maps)
                total += len(index) * float(measure(batch))
        self.student.constants |= kept
        return total / len(self.quantized)

    def fitted(self) -> Fitted:
        """Where training stands, hardened."""
        constants = {name: weight.hardened() for name, weight in self.weights.items()}
        with torch.no_grad():
            for name, move in self.moves.items():
                constants[name] = self.student.constants[name] + self.units[name] * move
            scales = {site: self.numbers[site]["scale"] * log.exp() for site, log in self.logs.items()}
        return Fitted(constants, scales)

    def weight(self, site: str, weight: Tensor) -> Tensor:
        return self.weights[site].value()

    def quantize(self, site: str, x: Tensor) -> Tensor:
        quantizer, numbers = self.quantizers[site], dict(self.numbers[site])
        if site in self.logs and self.settings.rate_scales:
            numbers["scale"] = numbers["scale"] * self.logs[site].exp()
        quantized = codec_of(quantizer).fake_quantize(x, quantizer, numbers)
        if not self.drop:
            return quantized
        return Mix.apply(quantized, x, random_mask(x.shape, self.drop, self.generator))

    def probs(self, site: str, probs: Tensor) -> Tensor:
        self.maps[site] = probs
        return self.quantize(site, probs)
