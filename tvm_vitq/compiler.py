"""From a quantized model to a library: lowering, TVM's build, and the report of what came out."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from typing import Any

import tvm
from tvm import relax

from tvm_vitq import settings
from tvm_vitq.errors import VitqError
from tvm_vitq.library_format import LibraryInfo
from tvm_vitq.pipeline import lower_passes, run_passes
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.relax_passes.offload_vta import Offload
from tvm_vitq.render import kernels_text
from tvm_vitq.report import assembly, build_report
from tvm_vitq.runtime import Library
from tvm_vitq.targets import TargetProfile, parse
from tvm_vitq.tuning.apply import TunedSchedules, TunedTiles, find_runs
from tvm_vitq.vta.runtime.report import vta_report

PACKAGES = ("tvm-vitq", "apache-tvm", "apache-tvm-ffi", "torch", "timm", "numpy")


WEIGHTS = ("packed", "unpacked")
"""Forms of weights below 8 bits, see tvm_vitq.compile."""


def compile_library(
    quantized: QuantizedModel, target: Any, tuning_logs: Any = None, weights: str = "packed"
) -> Library:
    """See tvm_vitq.compile."""
    check_weights(weights)
    profile = parse(target)
    runs = find_runs(profile, tuning_logs)
    schedules, tiles = TunedSchedules(runs, profile.threads), TunedTiles(runs)
    offload = Offload(profile.vta, tiles, profile.residual) if profile.vta else None
    start = time.perf_counter()
    with profile.target:
        passes = lower_passes(profile, schedules, weights == "packed", offload)
        lowered = run_passes(quantized.mod, passes, first=1)
    executable = relax.build(lowered, target=profile.target, relax_pipeline=_after_kernels())
    seconds = time.perf_counter() - start
    report = build_report(quantized, lowered, executable, profile, seconds, schedules)
    if offload:
        report |= vta_report(offload.program, offload.notes, tiles.tuned)
        report["warnings"] += [f"{product}: {note}" for product, note in tiles.notes.items()]
    _show(profile, lowered, executable, report)
    info = LibraryInfo(
        model=quantized.name,
        target=profile,
        input_shape=quantized.input_shape,
        classes=quantized.classes,
        plan_hash=quantized.plan.hash,
        preprocessing=quantized.plan.preprocessing,
        versions=versions(),
        report=report,
    )
    return Library(info, executable=executable, program=offload.program if offload else None)


def check_weights(weights: str) -> None:
    """VitqError unless it is one of `WEIGHTS`."""
    if weights not in WEIGHTS:
        raise VitqError(
            "no such form of weights", where="weights", got=weights, expected=" or ".join(WEIGHTS)
        )


def _show(profile: TargetProfile, lowered: tvm.IRModule, executable: Any, report: dict[str, Any]) -> None:
    """What VITQ_DEBUG asks for, each level with those below it, on standard error."""
    level = settings.DEBUG.value
    if level >= 1:
        print(f"target {profile}", file=sys.stderr)
    if level >= 2:
        print(kernels_text(report["kernels"]), file=sys.stderr)
    if level >= 3:
        functions = {g.name_hint: f for g, f in lowered.functions.items() if g.name_hint != "main"}
        print(tvm.IRModule(functions).script(), file=sys.stderr)
    if level >= 4:
        print(assembly(executable), file=sys.stderr)


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _after_kernels() -> tvm.ir.transform.Pass:
    """TVM's own passes from scheduled kernels to virtual machine code; memory is planned statically."""

    @tvm.transform.module_pass(opt_level=0, name="vitq_after_kernels")
    def run(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return tvm.transform.Sequential(
            [
                relax.transform.RewriteDataflowReshape(),
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
                relax.transform.LowerAllocTensor(),
                relax.transform.KillAfterLastUse(),
                relax.transform.LowerRuntimeBuiltin(),
                relax.transform.ComputePrimValue(),
                relax.transform.VMShapeLower(),
                relax.transform.AttachGlobalSymbol(),
            ]
        )(mod)

    return run
