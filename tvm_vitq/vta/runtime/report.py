"""What a program costs on its machine, by the cycle model: plain data for build reports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tvm_vitq.vta.runtime.device import SimulatedDevice
from tvm_vitq.vta.runtime.program import PlacedProgram, Program


def vta_report(program: Program, notes: Mapping[str, str], tuned: Collection[str] = ()) -> dict[str, Any]:
    """ "vta": configuration, cycles and utilization of all launches and of each, and why layers stay on the
    host. Utilization is the share of cycles in which the multipliers compute what the model asks for: not
    padding, biases or further bytes of probabilities.

    Raises
    ------
    VitqError : a stream that is not sound.
    """
    config = program.config
    placed = PlacedProgram(program, SimulatedDevice(config, program.memory))
    launches: list[dict[str, Any]] = []
    for name, launch in program.launches.items():
        cycles = placed.cycles(name)
        launches.append(
            {
                "name": name,
                "macs": launch.macs,
                "cycles": cycles.total,
                "utilization": launch.macs / config.block**2 / cycles.total,
                "busy": {stage: busy / cycles.total for stage, busy in cycles.busy.items()},
                "read": cycles.read,
                "written": cycles.written,
                "schedule": "tuned" if name in tuned else "default",
                "instructions": len(launch.stream.program),
            }
        )
    total = sum(row["cycles"] for row in launches)
    macs = sum(row["macs"] for row in launches)
    return {
        "vta": {
            "name": config.text,
            "config": config.to_json(),
            "megahertz": config.board.megahertz,
            "cycles": total,
            "milliseconds": 1e-3 * total / config.board.megahertz,
            "macs": macs,
            "utilization": macs / config.block**2 / total if total else 0.0,
            "launches": launches,
            "on_host": dict(notes),
        }
    }
