"""The build report: what was compiled, how much of it is integer, with which instructions, and what to know
about it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import numpy as np
import tvm

from tvm_vitq.graph import Dataflow, is_constant, is_movement, value_of
from tvm_vitq.macs import count_macs
from tvm_vitq.ops import op_name
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.relax_passes.lower_kernels import KERNEL_ATTRIBUTE
from tvm_vitq.targets import TargetProfile
from tvm_vitq.tuning.apply import TunedSchedules

INSTRUCTIONS = (
    "vpdpbusd",
    "smmla",
    "usmmla",
    "sdot",
    "udot",
    "vpmaddwd",
    "pmaddwd",
    "smlal",
    "smlal2",
    "smull",
)
"""Dot-product and multiply instructions, the one that does most per lane first."""


def quantized_report(quantized: QuantizedModel) -> dict[str, Any]:
    """What is known before a target is: plain data, see docs/architecture.md for the fields."""
    layers = count_macs(quantized.mod)
    total = sum(layer.macs for layer in layers)
    integer = sum(layer.macs for layer in layers if layer.integer)
    islands = [
        {
            "name": name,
            "op": op,
            "reason": "no integer form",
            "macs": next((v.macs for v in layers if v.name == name), 0),
        }
        for name, op in quantized.float_islands
    ]
    plan = quantized.plan
    report = {
        "model": quantized.name,
        "bits": plan.bits,
        "recipe": plan.recipe,
        "plan_hash": plan.hash,
        "input_shape": list(quantized.input_shape),
        "macs": total,
        "integer_coverage": integer / total if total else 1.0,
        "float_islands": islands,
        "weight_count": weight_count(quantized.mod),
        "weight_bytes": weight_bytes(quantized.mod),
        "calibration": {"source": plan.calibration.source, "count": plan.calibration.count},
    }
    report["warnings"] = _warnings(quantized, report)
    return report


def build_report(
    quantized: QuantizedModel,
    lowered: tvm.IRModule,
    executable: Any,
    profile: TargetProfile,
    seconds: float,
    schedules: TunedSchedules,
) -> dict[str, Any]:
    """`quantized_report` and what the compiler did for one target."""
    report = quantized_report(quantized)
    report["warnings"] += [f"{kernel}: {note}" for kernel, note in schedules.notes.items()]
    return {
        **report,
        "target": str(profile),
        "isa": profile.isa,
        "kernels": kernel_table(lowered, executable, schedules.tuned),
        "compile_seconds": round(seconds, 2),
    }


def kernel_table(lowered: tvm.IRModule, executable: Any, tuned: Collection[str] = ()) -> list[dict[str, Any]]:
    """Each kernel: name, calls per inference, layers of the model that it computes, multiply-accumulates and
    bytes per call, instruction, and how it is scheduled.
    """
    calls: dict[str, list[str]] = {}
    for binding in Dataflow(lowered).bindings:
        if op_name(binding.value) == "relax.call_tir":
            calls.setdefault(binding.value.args[0].name_hint, []).append(binding.var.name)
    found = instructions_of(assembly(executable))
    table = []
    for gvar, function in lowered.functions.items():
        name = gvar.name_hint
        if name in calls:
            kernel = KERNEL_ATTRIBUTE in function.attrs  # calls are named after layers by lower_kernels
            table.append(
                {
                    "name": name,
                    "calls": len(calls[name]),
                    "layers": [layer for layer in calls[name] if kernel and layer != name],
                    "macs": int(function.attrs[KERNEL_ATTRIBUTE]) if kernel else 0,
                    "bytes": bytes_touched(function),
                    "instruction": found.get(name, "-"),
                    "schedule": "tuned" if name in tuned else "default",
                }
            )
    return sorted(table, key=lambda row: -row["macs"] * row["calls"])


def bytes_touched(function: tvm.tirx.PrimFunc) -> int:
    """Bytes of inputs, constants and result that one call touches, each counted once.

    Kernels of schedules/ read their arguments whole; of what a slice reads, the box around it counts.
    """
    touched = tvm.get_global_func("s_tir.DomainTouched")
    total = 0
    for buffer in function.params:
        sizes = [int(v) for v in buffer.shape]
        if KERNEL_ATTRIBUTE not in function.attrs:
            box = touched(function.body, buffer, True, True)
            sizes = [_extent(size, span) for size, span in zip(sizes, box, strict=True)]
        total += math.prod(sizes) * np.dtype(str(buffer.dtype)).itemsize
    return total


def _extent(size: int, span: tvm.ir.Range | None) -> int:
    """Elements of `span` on an axis of `size`; all of them where the range depends on more than the shape."""
    if span is None or not isinstance(span.extent, tvm.tirx.IntImm):
        return size
    return min(size, int(span.extent))


def assembly(executable: Any) -> str:
    """Generated assembly of all kernels."""
    pending, text = [executable.mod], []
    while pending:
        module = pending.pop()
        pending += list(module.imports)
        if module.kind == "llvm":
            text.append(module.inspect_source("asm"))
    return "\n".join(text)


def instructions_of(text: str) -> dict[str, str]:
    """The first of INSTRUCTIONS that each function of an assembly text contains, its parallel bodies
    included.
    """
    found: dict[str, str] = {}
    rank = {name: n for n, name in enumerate(INSTRUCTIONS)}
    current = ""
    for line in text.splitlines():
        label = re.match(r"^(?:__tvm_ffi_)?([A-Za-z_][\w.$]*):", line)
        if label:
            current = re.sub(r"(_compute_|\.?__tvm_parallel_lambda).*$", "", label[1])
            continue
        word = re.match(r"^\s+([a-z]\w*)", line)
        mnemonic = word[1] if word else ""
        if mnemonic in rank and rank[mnemonic] < rank.get(found.get(current, ""), len(rank)):
            found[current] = mnemonic
    return found


def _constants(mod: tvm.IRModule) -> list[Any]:
    return [
        value_of(a)
        for b in Dataflow(mod).bindings
        if not isinstance(b.value, type(b.var)) and not is_movement(b.value) and hasattr(b.value, "args")
        for a in b.value.args
        if is_constant(a)
    ]


def weight_count(mod: tvm.IRModule) -> int:
    """Weights of all integer matmuls."""
    return sum(
        value_of(b.value.args[1]).size
        for b in Dataflow(mod).bindings
        if op_name(b.value) == "vitq.int_linear"
    )


def weight_bytes(mod: tvm.IRModule) -> int:
    """Bytes of all constants of the integer graph."""
    return sum(v.nbytes for v in _constants(mod))


def _warnings(quantized: QuantizedModel, report: dict[str, Any]) -> list[str]:
    warnings = []
    if report["calibration"]["source"].startswith("synth"):
        warnings.append("calibrated on synthesized images: pass calibration= real ones for best accuracy")
    if report["float_islands"]:
        share = 100 * (1 - report["integer_coverage"])
        warnings.append(f"{len(report['float_islands'])} operators stay in float ({share:.1f} % of MACs)")
    warnings += [f"{where}: {note}" for where, note in quantized.plan.notes.items()]
    return warnings
