"""Proof that a stream is sound, without running it: every way in which one is known to hang, to read or write
what it should not, or to give another result on another implementation is a rule here.

    form       each instruction by itself: codes, sides of tokens, bounds of scratchpads and device memory
    tokens     every instruction runs, FINISH last, no token is left over or lost
    data       what is read was written before, and by whom; nothing is overwritten while it is in use
    portable   what all implementations do alike, hazards between micro-ops

A run that gives the right bytes proves none of this: a race often does.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.check.data import check_data
from tvm_vitq.vta.check.findings import Finding, Region
from tvm_vitq.vta.check.form import check_form
from tvm_vitq.vta.check.portable import check_portable
from tvm_vitq.vta.check.tokens import check_tokens
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.machine.isa import Instruction
from tvm_vitq.vta.machine.order import follow

__all__ = ["Finding", "Region", "check", "require_sound"]


def check(program: Sequence[Instruction], config: VtaConfig, regions: Sequence[Region]) -> list[Finding]:
    """Everything that is wrong with a stream, in the order of the stream.

    Parameters
    ----------
    program : the whole stream of a launch, on a machine whose scratchpads hold nothing.
    regions : the device memory that it may use.
    """
    found = check_form(program, config, regions)
    if found:
        return found  # the rest assumes that each instruction alone makes sense
    order = follow(program)
    found = check_tokens(program, order) + check_portable(program, config)
    found += check_data(program, order, config, regions)
    return sorted(found, key=lambda finding: finding.position)


def require_sound(
    program: Sequence[Instruction], config: VtaConfig, regions: Sequence[Region], name: str
) -> None:
    """VitqError with the first findings unless there are none."""
    found = check(program, config, regions)
    if found:
        shown = "; ".join(map(str, found[:3])) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        raise VitqError("VTA stream is not sound", where=name, got=shown)
