"""How much the prediction suffers from each layer at each width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvm_vitq.calibrate.blocks import find_units
from tvm_vitq.calibrate.job import CHUNK, Job
from tvm_vitq.calibrate.simulate import FakeQuantize
from tvm_vitq.site_rules import layer_of

IMAGES = 64
"""Calibration images that predictions are compared on, at most."""


def divergences(job: Job, groups: Sequence[Sequence[str]], images: int = IMAGES) -> list[float]:
    """Mean Kullback-Leibler divergence KL(float || quantized), in nats, of the model's predictions with only
    the layers of one group quantized, for each group.

    Both predictions are those of the module as the recipe left it. Folded scales and rotations differ from
    width to width, but none changes the float function, so that divergences of different widths compare.

    Parameters
    ----------
    job : fitted.
    groups : layers that are quantized together; each lies within one unit (see `find_units`).
    """
    executor, result = job.executor, job.mod["main"].body.body.name
    chunk = max(CHUNK // executor.batch, 1) * executor.batch
    found: dict[int, float] = {}
    with torch.no_grad():
        x = job.images[:images]
        units = find_units(job.mod, "module")
        prediction = executor.run(x, chunk=chunk).flatten(1).double().log_softmax(-1)
        for unit in job.progress(units, "sensitivity"):
            for number, group in enumerate(groups):
                if group[0] not in unit.layers:
                    continue
                sites = {name: q for name, q in job.quantizers.items() if layer_of(name) in group}
                logits = executor.run_between(unit.start, result, x, FakeQuantize(sites), chunk)
                found[number] = _divergence(prediction, logits)
            if unit is not units[-1]:
                x = executor.run_between(unit.start, unit.stop, x, chunk=chunk)
    return [found[number] for number in range(len(groups))]


def _divergence(prediction: Tensor, logits: Tensor) -> float:
    other = logits.flatten(1).double().log_softmax(-1)
    return float((prediction.exp() * (prediction - other)).sum(-1).mean())
