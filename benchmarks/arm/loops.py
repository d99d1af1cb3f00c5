"""Innermost loops of compiled code, and what LLVM's model of a core says about them (llvm-mca)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass

from tvm_vitq.errors import VitqError

NEWEST, OLDEST = 40, 17
"""Versions of llvm-mca to look for; the oldest one that knows all cores of the benchmark."""

ITERATIONS = 400


@dataclass(frozen=True)
class Timing:
    """An innermost loop on a core: per iteration, once the loop has settled."""

    instructions: int
    dots: int
    cycles: float

    @property
    def rate(self) -> float:
        """Dot product instructions per cycle."""
        return self.dots / self.cycles


def tool() -> str:
    """The newest llvm-mca; raises VitqError where there is none."""
    names = [f"llvm-mca-{version}" for version in range(NEWEST, OLDEST - 1, -1)] + ["llvm-mca"]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        raise VitqError(
            "the model of the cores is missing",
            where="PATH",
            got="no llvm-mca",
            fix="apt-get install llvm-22 (or the newest llvm-NN of this system)",
        )
    return found


def innermost(assembly: str, instruction: str) -> list[list[str]]:
    """Instructions of each innermost loop that uses `instruction`: from a label to the branch back to it."""
    lines = assembly.splitlines()
    label = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L\w+):", line))}
    bodies = []
    for i, line in enumerate(lines):
        match = re.match(r"\s+(?:b\.\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)
        if match and label.get(match[1], i) < i:
            body = lines[label[match[1]] + 1 : i + 1]
            if not any(line.startswith(".L") for line in body) and count(body, instruction):
                bodies.append([line for line in body if not re.match(r"\s*(\.|//|$)", line)])
    return bodies


def count(body: list[str], instruction: str) -> int:
    """How often an instruction occurs."""
    return sum(line.split()[:1] == [instruction] for line in body)


def time(body: list[str], instruction: str, core: str) -> Timing:
    """The loop on a core, with all data in the first level cache."""
    command = [tool(), "-mtriple=aarch64", f"-mcpu={core}", f"-iterations={ITERATIONS}", "-json"]
    done = subprocess.run(command, input="\n".join(body) + "\n", capture_output=True, text=True, check=False)
    if done.returncode != 0 or "not a recognized processor" in done.stderr:
        raise VitqError("llvm-mca refuses the loop", where=" ".join(command), got=done.stderr.strip()[:500])
    summary = json.loads(done.stdout[done.stdout.index("{") :])["CodeRegions"][0]["SummaryView"]
    return Timing(len(body), count(body, instruction), summary["TotalCycles"] / ITERATIONS)


def peak(instruction: str, core: str) -> float:
    """Dot products per cycle of a loop of nothing else: 24 independent sums."""
    last = {"sdot": "v31.4b[0]", "smmla": "v31.16b"}[instruction]
    body = [f"\t{instruction} v{i}.4s, v30.16b, {last}" for i in range(24)]
    return time(body, instruction, core).rate
