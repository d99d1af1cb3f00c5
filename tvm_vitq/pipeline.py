"""The passes from a canonical float graph to an executable, in order: the whole compiler on one page.

canonical graph --annotate, calibrate--> annotated graph and plan      (tvm_vitq/calibrate)
                --REALIZE-->             integer graph, target independent: the QuantizedModel
                --LOWER-->               kernels of one target
                --TVM's own passes-->    virtual machine code with a static memory plan
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tvm
from tvm import relax

from tvm_vitq import settings
from tvm_vitq.library_format import LOAD
from tvm_vitq.plan import QuantPlan
from tvm_vitq.relax_passes.channels_last import channels_last
from tvm_vitq.relax_passes.decompose_canonical import decompose_canonical
from tvm_vitq.relax_passes.fuse_epilogues import fuse_epilogues
from tvm_vitq.relax_passes.fuse_views import fuse_views
from tvm_vitq.relax_passes.legalize_activations import ACTIVATIONS
from tvm_vitq.relax_passes.legalize_group_norm import legalize_group_norm
from tvm_vitq.relax_passes.lower_kernels import Choose, default_schedule, lower_kernels
from tvm_vitq.relax_passes.realize import realize
from tvm_vitq.relax_passes.schedule_rest import schedule_rest
from tvm_vitq.relax_passes.verify import verify
from tvm_vitq.targets import TargetProfile

LEGALIZATIONS = {**ACTIVATIONS, "relax.nn.group_norm": legalize_group_norm}
"""In place of TVM's own."""

Pass = Callable[[tvm.IRModule], tvm.IRModule]


def realize_passes(plan: QuantPlan) -> list[tuple[str, Pass]]:
    """From the annotated float graph to the integer graph."""
    return [("realize", lambda mod: realize(mod, plan))]


def lower_passes(
    profile: TargetProfile,
    choose: Choose = default_schedule,
    packed: bool = True,
    offload: Pass | None = None,
) -> list[tuple[str, Pass]]:
    """From the integer graph to kernels of one target, each under the schedule that `choose` gives it; see
    `lower_kernels`. `offload` hands a part of the graph to another machine.
    """
    return [
        ("decompose_canonical", decompose_canonical()),  # what realize left in float
        ("channels_last", channels_last),
        *([("offload_views", fuse_views), ("offload", offload)] if offload else []),
        ("fuse_epilogues", fuse_epilogues),
        ("fuse_views", fuse_views),
        ("lower_kernels", lambda mod: lower_kernels(mod, profile, choose, packed)),
        ("decompose", relax.transform.DecomposeOpsForInference()),
        ("legalize", relax.transform.LegalizeOps(LEGALIZATIONS)),
        (
            "free_reshapes",
            relax.transform.RewriteDataflowReshape(),
        ),  # before fusion would make copies of them
        ("annotate_patterns", relax.transform.AnnotateTIROpPattern()),
        ("fuse_ops", relax.transform.FuseOps()),
        ("fuse_tir", relax.transform.FuseTIR()),
        ("dead_code", _dead_code),
        ("schedule_rest", schedule_rest),
    ]


def _dead_code(mod: tvm.IRModule) -> tvm.IRModule:
    """Drops what neither of the functions that a library is called by needs."""
    names = {gvar.name_hint for gvar in mod.functions}
    return relax.transform.DeadCodeElimination([name for name in ("main", LOAD) if name in names])(mod)


def run_passes(mod: tvm.IRModule, passes: list[tuple[str, Pass]], first: int = 0) -> tvm.IRModule:
    """Run passes in order; VITQ_DUMP writes the module after each, VITQ_VERIFY checks it."""
    for number, (name, run) in enumerate(passes, first):
        mod = run(mod)
        if settings.DUMP.value:
            folder = Path(settings.DUMP.value)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}_{name}.py").write_text(mod.script())
        if settings.VERIFY.value:
            verify(mod, name)
    return mod
