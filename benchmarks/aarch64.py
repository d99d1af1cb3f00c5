"""What can be said about AArch64 kernels without an AArch64 machine.

python benchmarks/aarch64.py                              # innermost loops of the linear kernels
python benchmarks/aarch64.py --model deit_tiny --core neoverse-n1
python benchmarks/aarch64.py --count deit_tiny_patch16_224    # instructions of a whole model

Innermost loops are cut from the assembly that the compiler emits for a core and timed by llvm-mca, LLVM's
model of that core, against its time for a loop of independent dot products. The model knows issue ports,
latencies and dispatch; it assumes that all loads hit the first level cache and that branches are predicted.
LLVM has no model of its own for the Cortex-A76 and takes the narrower one of the Cortex-A57.

A kernel has a loop for each height of its register tile: rows are cut into tiles of the default height and
a few that are one row lower.

Instructions of whole models are counted by qemu while it executes them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import tvm
from arm import instructions, loops
from kernels import MODELS, kernels

import tvm_vitq
from tvm_vitq import targets
from tvm_vitq.schedules.isa import isa
from tvm_vitq.schedules.linear import Linear

CORES = ("cortex-a76", "neoverse-n1", "neoverse-v1", "neoverse-n2")


def target_of(core: str) -> str:
    """The target that a user would write."""
    return f"llvm -mtriple=aarch64-linux-gnu -mcpu={core}"


def loops_of(core: str, model: str, batch: int) -> list[dict[str, Any]]:
    """Every innermost loop of dot products in the linear kernels of a block."""
    profile = targets.parse(target_of(core))
    instruction = isa(profile.isa).instruction
    peak = loops.peak(instruction, core)
    records = []
    for label, spec in kernels(profile.isa, MODELS[model], batch).items():
        if not isinstance(spec, Linear):
            continue
        kernel = spec.kernel()
        executable = tvm.compile(tvm.IRModule({kernel.name: kernel.func}), profile.target)
        for body in loops.innermost(executable.mod.inspect_source("asm"), instruction):
            timing = loops.time(body, instruction, core)
            records.append(
                {
                    "core": core, "model": model, "batch": batch, "kernel": label, "name": kernel.name,
                    "instruction": instruction, "instructions": timing.instructions, "dots": timing.dots,
                    "cycles": timing.cycles, "rate": timing.rate, "peak": peak, "share": timing.rate / peak,
                }
            )  # fmt: skip
    return records


def count(core: str, model: str, bits: str) -> dict[str, Any]:
    """Instructions per multiply-accumulate of a whole model; random weights do not change them."""
    quantized = tvm_vitq.quantize(model, bits, "minmax", calibration_count=8, progress=False)
    library = tvm_vitq.compile(quantized, target_of(core))
    with tempfile.TemporaryDirectory(prefix="vitq-aarch64-") as folder:
        executed = instructions.per_batch(library.export_library(Path(folder) / "library.so"))
    macs = library.report["macs"]
    return {"core": core, "model": model, "bits": bits, "instructions": executed, "macs": macs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--core", nargs="*", default=CORES, help="names that -mcpu and llvm-mca know")
    parser.add_argument("--model", choices=MODELS, nargs="*", default=["deit_small", "deit_base"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--count", nargs="*", metavar="MODEL", help="count instructions of these timm models")
    parser.add_argument("--bits", default="w8a8", help="of the models that are counted")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    if options.count is not None:
        counts = [count(core, model, options.bits) for core in options.core for model in options.count]
        if options.json:
            print(json.dumps(counts, indent=1))
            return
        print(f"{'core':12} {'model':26} {'bits':5} {'M instructions':>14} {'M MACs':>8} {'per MAC':>8}")
        for row in counts:
            executed, macs = row["instructions"], row["macs"]
            print(f"{row['core']:12} {row['model']:26} {row['bits']:5} {executed * 1e-6:14.1f}", end=" ")
            print(f"{macs * 1e-6:8.1f} {executed / macs:8.4f}")
        return

    records = []
    if not options.json:
        print(loops.tool())
        print(f"{'core':12} {'model':12} {'kernel':16} {'instr.':>6} {'dots':>5} {'cycles':>7}", end=" ")
        print(f"{'dots/cycle':>10} {'peak':>5} {'share':>6}")
    for core in options.core:
        for model in options.model:
            for row in loops_of(core, model, options.batch):
                records.append(row)
                if not options.json:
                    print(f"{core:12} {model:12} {row['kernel']:16} {row['instructions']:6}", end=" ")
                    print(f"{row['dots']:5} {row['cycles']:7.2f} {row['rate']:10.2f}", end=" ")
                    print(f"{row['peak']:5.2f} {row['share']:6.1%}", flush=True)
    if options.json:
        print(json.dumps({"tool": loops.tool(), "batch": options.batch, "loops": records}, indent=1))


if __name__ == "__main__":
    main()
