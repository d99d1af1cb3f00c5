"""The kernels of a quantized model that tuning has decisions about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_vitq.graph import Dataflow
from tvm_vitq.numerics import Array
from tvm_vitq.ops import op_name
from tvm_vitq.pipeline import lower_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.relax_passes.lower_kernels import KERNEL_OPERATORS, Site, default_schedule
from tvm_vitq.schedules.space import space_of
from tvm_vitq.targets import TargetProfile
from tvm_vitq.tuning.expected import example


@dataclass(frozen=True)
class Task:
    """One kernel, however many layers call it.

    name : of the kernel under its default schedule; the key of its records.
    spec : the kernel, see schedules/.
    calls : per inference.
    operands : of one call, in the order of the kernel's arguments without the result, for any schedule.
    expected : what numerics.py gives for them.
    """

    name: str
    spec: Any
    calls: int
    operands: Callable[[Any], list[Array]]
    expected: Array


def find_tasks(quantized: QuantizedModel, profile: TargetProfile, seed: int = 0) -> list[Task]:
    """Tasks of a model for a target, those with the most multiply-accumulates first.

    Each is made of the first layer that calls the kernel, on random operands.
    """
    sites: list[Site] = []

    def record(site: Site) -> Any:
        sites.append(site)
        return default_schedule(site)

    passes = lower_passes(profile, record)
    before = next(n for n, (name, _) in enumerate(passes) if name == "lower_kernels")
    with profile.target:
        fused = run_passes(quantized.mod, passes[:before], first=1)
        run_passes(fused, passes[before : before + 1], first=before + 1)
    graph = Dataflow(fused)
    nodes = [b.value for b in graph.bindings if op_name(b.value) in KERNEL_OPERATORS]
    made = [site for site in sites if site.node is not None]
    calls = Counter(site.spec.name for site in made)
    first: dict[str, tuple[Site, Any]] = {}
    for site, node in zip(made, nodes, strict=True):
        first.setdefault(site.spec.name, (site, node))
    rng = np.random.default_rng(seed)
    tasks = [
        _task(name, site, calls[name], *example(graph, node, rng))
        for name, (site, node) in first.items()
        if space_of(site.spec)
    ]
    return sorted(tasks, key=lambda task: -task.calls * task.spec.kernel().macs)


def _task(name: str, site: Site, calls: int, inputs: list[Array], expected: Array) -> Task:
    own = site.inputs(inputs)

    def operands(spec: Any) -> list[Array]:
        waiting = {"input": iter(own), "constant": iter(site.pack(spec))}
        arguments = spec.arguments()[:-1]
        return [np.ascontiguousarray(next(waiting[a.role])).reshape(a.shape) for a in arguments]

    out = site.spec.arguments()[-1]
    return Task(name, site.spec, calls, operands, np.ascontiguousarray(expected).reshape(out.shape))
