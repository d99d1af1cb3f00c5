"""AdaRound of single layers against their own quantized input, without images in the loop.

Let x be the quantized input of a linear layer, as the quantized layers in front of it make it, W its float
weight and W^ the quantized one. The mean squared error of the output depends on x through its second moments
``H = E[x x^T]`` alone,

    E |(W^ - W) x|**2 = tr((W^ - W) H (W^ - W)^T),

so every step of training sees all tokens of all images at the cost of one product with H.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvm_vitq.calibrate.blocks import Unit
from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.job import Cost, Job
from tvm_vitq.calibrate.losses import CHUNK
from tvm_vitq.calibrate.prefix import Quantized, Taking
from tvm_vitq.calibrate.resume import Fitted, Store
from tvm_vitq.calibrate.rounding import AdaRound
from tvm_vitq.plan import SiteQuantizer


@dataclass(frozen=True)
class LayerRounding:
    """How roundings are trained: as in `reconstruct.Settings`."""

    iterations: int = 500
    rate: float = 1.0
    rounding: float = 1.0
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)


def round_layers(job: Job, units: Sequence[Unit], settings: LayerRounding, label: str = "rounding") -> None:
    """Round the weights of all linear layers, front to back; changes constants, ranges and costs.

    Parameters
    ----------
    units : all of `find_units`; every site has its quantizer.
    label : of this step, names its files in ``job.work``; a unit found there is not rounded again.

    Raises
    ------
    VitqError : ``job.work`` holds files of another calibration.
    """
    began, student = time.monotonic(), Executor(job.mod)
    store = Store(job, label, settings, units)
    changed: dict[str, Tensor] = {}
    quantized = job.images
    layers = sum(f"{layer}.weight" in student.constants for unit in units for layer in unit.layers)
    bar = job.progress(range(layers * settings.iterations), label)
    trained = 0
    for number, unit in enumerate(units):
        mine = {layer: f"{layer}.weight" for layer in unit.layers if f"{layer}.weight" in student.constants}
        found = store.load(number)
        if found is None:
            found = Fitted({}, {})
            for layer, site in mine.items():
                with torch.no_grad():
                    moments = _moments(student, unit, layer, job.quantizers, quantized)
                weight = _rounded(student.constants[site], job.quantizers[site], moments, settings, bar)
                found.constants[site] = student.constants[site] = weight
            store.save(number, found)
            trained += len(mine) * settings.iterations
        else:
            bar.update(len(mine) * settings.iterations)
        changed |= found.constants
        student.constants |= found.constants
        hooks = Quantized(job.quantizers)
        with torch.no_grad():
            quantized = student.run_between(unit.start, unit.stop, quantized, hooks, CHUNK)
        hooks.widen(job.ranges)
    bar.close()
    job.replace({name: value.numpy() for name, value in changed.items()})
    job.costs[label] = Cost(trained, time.monotonic() - began)


def _moments(
    student: Executor, unit: Unit, layer: str, quantizers: dict[str, SiteQuantizer], quantized: Tensor
) -> Tensor:
    """H [K, K] of a layer whose unit sees `quantized`, the mean over tokens and images."""
    (step,) = (s for s in student.steps if (s.op, s.layer) == ("vitq.linear", layer))
    taken = Taking(step.arguments[0].name, quantizers)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in quantized.split(CHUNK):
        student.run_between(unit.start, step.name, part, taken)
        total, count = total + (taken.rows.T @ taken.rows).double(), count + len(taken.rows)
    return (total / count).float()


def _rounded(
    weight: Tensor, quantizer: SiteQuantizer, moments: Tensor, settings: LayerRounding, bar: Any
) -> Tensor:
    """The weight with learned roundings, or with those to nearest if training did not lower the error."""
    rounding = AdaRound(weight, quantizer)

    def error(value: Tensor) -> Tensor:
        difference = value - weight
        return (difference @ moments * difference).sum()

    nearest = rounding.hardened()
    before = float(error(nearest))
    optimizer = torch.optim.Adam(rounding.trained, settings.rate * rounding.rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(settings.iterations, 1))
    for step in range(settings.iterations):
        loss = error(rounding.value()) / max(before, 1e-30)
        progress = step / settings.iterations
        if progress >= settings.warmup:
            done = (progress - settings.warmup) / (1 - settings.warmup)
            beta = settings.beta[0] + (settings.beta[1] - settings.beta[0]) * done
            loss = loss + settings.rounding / weight.numel() * rounding.penalty(beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        bar.update(1)
    learned = rounding.hardened()
    return learned if float(error(learned)) < before else nearest
