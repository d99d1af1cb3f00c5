"""The stream runs to its end, which is FINISH, and leaves the machine as it was found."""

from __future__ import annotations

from collections.abc import Sequence

from tvm_vitq.vta.check.findings import Finding
from tvm_vitq.vta.machine.isa import Finish, Instruction, Stage
from tvm_vitq.vta.machine.order import QUEUE_NAMES, QUEUED, TOKENS, Order


def check_tokens(program: Sequence[Instruction], order: Order) -> list[Finding]:
    """Instructions that wait for ever, FINISH elsewhere than at the very end, tokens left over or lost."""
    found = []
    for position, queue in order.stuck.items():
        why = (
            f"no token {QUEUE_NAMES[queue]} ever comes"
            if queue
            else f"it is never fetched: a stage has {QUEUED} instructions waiting in front of it"
        )
        found.append(Finding("deadlock", position, why))
    last = len(program) - 1
    for queue, count in order.left.items():
        if count and not order.stuck:
            found.append(
                Finding("token-left", last, f"{count} tokens {QUEUE_NAMES[queue]} remain for the next run")
            )
    for queue, count in order.most.items():
        if count > TOKENS:
            found.append(
                Finding(
                    "token-lost",
                    last,
                    f"up to {count} tokens {QUEUE_NAMES[queue]}, of which {TOKENS} are kept",
                )
            )
    return found + _check_finish(program, order)


def _check_finish(program: Sequence[Instruction], order: Order) -> list[Finding]:
    ends = [position for position, entry in enumerate(program) if isinstance(entry, Finish)]
    last = len(program) - 1
    if not ends:
        return [Finding("finish", max(last, 0), "the stream has no FINISH")]
    found = [Finding("finish", position, "a second FINISH") for position in ends[1:]]
    if ends[0] != last and len(ends) == 1:
        found.append(Finding("finish", ends[0], "instructions follow FINISH"))
    if order.stuck or found:
        return found
    for at in Stage:
        count = sum(1 for entry in order.stages if entry == at) - (at is Stage.COMPUTE)
        if order.before[last][at] < count:
            found.append(
                Finding(
                    "finish",
                    last,
                    f"FINISH does not wait for the last instruction of the {at.name.lower()} stage",
                )
            )
    return found
