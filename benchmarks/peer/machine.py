"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
from typing import Any

INSTRUCTIONS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)


def describe() -> dict[str, Any]:
    """CPU, usable cores, instruction sets that matter to quantized models, load, system."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux: the platform module says less
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    numbers = "/".join(fields[key] for key in ("cpu family", "model", "stepping") if key in fields)
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "family/model/stepping": numbers,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
