"""Closed-form error reduction, layer by layer, without gradients: ERQ (Zhong et al. 2024), two steps.

Let x be the quantized input of a linear layer, as the quantized layers in front of it make it, with a 1 as
last entry for the bias, W its weight with the bias as last column, y the float model's output, and
``H = E[x x^T]`` over the calibration images.

Activations (Aqer): ridge regression moves the layer to what it should do on that input,

    W += E[(y - W x) x^T] (H + lambda I)^-1.

Weights (Wqer): columns are quantized by halves. For the half just quantized, d is its error. First each row's
roundings are refined: one element after the other goes to the neighbouring code that lowers ``d^T H d`` most.
Then the columns still in float, I2, take over what is left of the error of I1,

    W[:, I2] -= d H[I1, I2] (H[I2, I2] + lambda I)^-1,

and the bias, which is never quantized, is the last of them.

``lambda`` is `ridge` times the mean of H's diagonal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvm_vitq.calibrate.blocks import Unit
from tvm_vitq.calibrate.executor import Executor
from tvm_vitq.calibrate.fit import fit_weight
from tvm_vitq.calibrate.job import Cost, Job
from tvm_vitq.calibrate.losses import CHUNK
from tvm_vitq.calibrate.prefix import Quantized, Taking
from tvm_vitq.calibrate.searches import RangeRule
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.granularity import blocked_shape, fit_shape
from tvm_vitq.quantizers.uniform import integer_range


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's quantized input with a 1 behind it, [K + 1, K + 1], and of the float output
    with it, [N, K + 1], both means over tokens and images.
    """

    inputs: Tensor
    outputs: Tensor


def regress(
    job: Job,
    units: Sequence[Unit],
    rule: RangeRule,
    ridge: float = 0.5,
    refinements: int = 100,
    label: str = "regression",
) -> None:
    """Both steps for every linear layer, front to back; changes constants, weight quantizers, ranges, costs.

    Parameters
    ----------
    units : all of `find_units`; activations have their quantizers.
    rule : range of the weights, which change before they are quantized.
    refinements : roundings changed per row and half at most; 0: all to nearest.
    """
    began, teacher, student = time.monotonic(), Executor(job.mod), Executor(job.mod)
    changed: dict[str, Tensor] = {}
    exact = quantized = job.images
    with torch.no_grad():
        for unit in job.progress(list(units), label):
            for layer in unit.layers:
                if f"{layer}.weight" not in student.constants:
                    continue
                moments = _moments(unit, layer, job.quantizers, (teacher, exact), (student, quantized))
                made = _fit_layer(job, layer, student.constants, moments, rule, ridge, refinements)
                changed |= made
                student.constants |= made
            hooks = Quantized(job.quantizers)
            quantized = student.run_between(unit.start, unit.stop, quantized, hooks, CHUNK)
            exact = teacher.run_between(unit.start, unit.stop, exact, chunk=CHUNK)
            hooks.widen(job.ranges)
    job.replace({name: value.numpy() for name, value in changed.items()})
    job.costs[label] = Cost(0, time.monotonic() - began)


def _fit_layer(
    job: Job,
    layer: str,
    constants: dict[str, Tensor],
    moments: Moments,
    rule: RangeRule,
    ridge: float,
    refinements: int,
) -> dict[str, Tensor]:
    site = f"{layer}.weight"
    weight = torch.cat([constants[site], constants[f"{layer}.bias"][:, None]], 1).double()
    weight = reduce_activation_error(weight, moments, ridge)
    quantizer = fit_weight(job, job.sites[site], weight[:, :-1].float(), rule)
    job.quantizers[site] = quantizer
    codes, bias = quantize_columns(weight, moments.inputs, quantizer, ridge, refinements)
    scale = _numbers(quantizer, codes.shape)[0]
    return {site: codes.float() * scale, f"{layer}.bias": bias.float()}


def reduce_activation_error(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    """The [N, K + 1] weight and bias after ridge regression."""
    residual = moments.outputs - weight @ moments.inputs
    return weight + torch.linalg.solve(_regular(moments.inputs, ridge), residual.T).T


def quantize_columns(
    weight: Tensor, inputs: Tensor, quantizer: SiteQuantizer, ridge: float, refinements: int = 100
) -> tuple[Tensor, Tensor]:
    """Codes [N, K], as ``q - zero_point``, and bias [N] of a float64 weight [N, K + 1] whose last column is
    the bias.

    inputs : second moments [K + 1, K + 1].
    """
    weight, count = weight.clone(), weight.shape[1] - 1
    scale, low, high = (v.double() for v in _numbers(quantizer, (len(weight), count)))
    regular = _regular(inputs, ridge)
    codes = torch.empty(len(weight), count, dtype=torch.float64)
    first = 0
    while first < count:
        last = first + (count - first + 1) // 2
        now, later = slice(first, last), slice(last, None)
        steps = weight[:, now] / scale[:, now]
        ends = low[:, now], high[:, now]
        codes[:, now] = refine_roundings(steps, scale[:, now], inputs[now, now], ends, refinements)
        error = codes[:, now] * scale[:, now] - weight[:, now]
        weight[:, later] -= torch.linalg.solve(regular[later, later], inputs[later, now] @ error.T).T
        first = last
    return codes, weight[:, -1]


def refine_roundings(
    steps: Tensor, scale: Tensor, inputs: Tensor, ends: tuple[Tensor, Tensor], changes: int
) -> Tensor:
    """Codes of ``steps`` [N, K]: nearest first, then per row, while it helps, the one change to the code on
    the other side of `steps` that lowers ``d^T H d`` most; d is the error times `scale`, H `inputs`; `ends` :
    smallest and largest code of every element.
    """
    codes = steps.round().clamp(*ends)
    other = (codes + torch.where(steps > codes, 1.0, -1.0)).clamp(*ends)
    slope = ((codes - steps) * scale) @ inputs
    rows, curvature = torch.arange(len(steps)), inputs.diagonal()
    for _ in range(changes):
        move = (other - codes) * scale
        best, which = (2 * move * slope + move.square() * curvature).min(1)
        active = rows[best < 0]
        if not len(active):
            break
        at = active, which[active]
        slope[active] += move[at][:, None] * inputs[at[1]]
        codes[at], other[at] = other[at], codes[at]
    return codes


def _numbers(quantizer: SiteQuantizer, shape: Sequence[int]) -> list[Tensor]:
    """float32 scale, smallest and largest code of every element of a weight."""
    numbers = torch.tensor(quantizer.scale), *map(torch.from_numpy, integer_range(quantizer))
    blocked = (fit_shape(v.float(), quantizer, shape) for v in numbers)
    return [v.expand(blocked_shape(quantizer, shape)).reshape(*shape) for v in blocked]


def _regular(moments: Tensor, ridge: float) -> Tensor:
    mean = moments.diagonal().mean().clamp(min=1e-30)
    return moments + ridge * mean * torch.eye(len(moments), dtype=moments.dtype)


def _moments(
    unit: Unit,
    layer: str,
    quantizers: dict[str, SiteQuantizer],
    float_run: tuple[Executor, Tensor],
    run: tuple[Executor, Tensor],
) -> Moments:
    """Runs the unit up to the layer on all images, in float and quantized."""
    (step,) = (s for s in run[0].steps if (s.op, s.layer) == ("vitq.linear", layer))
    taken, wanted = Taking(step.arguments[0].name, quantizers), Taking(step.name, None)
    parts = []
    for exact, quantized in zip(float_run[1].split(CHUNK), run[1].split(CHUNK), strict=True):
        float_run[0].run_between(unit.start, step.name, exact, wanted)
        run[0].run_between(unit.start, step.name, quantized, taken)
        x = torch.nn.functional.pad(taken.rows, (0, 1), value=1.0)
        parts.append(torch.cat([x.T @ x, wanted.rows.T @ x]).double())
    mean = torch.stack(parts).sum(0)
    mean /= mean[x.shape[1] - 1, -1].clone()  # the sum of ones
    return Moments(mean[: x.shape[1]], mean[x.shape[1] :])
