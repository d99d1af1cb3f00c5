"""What this machine can do with tvm-vitq: versions, instruction sets, tools, settings; what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from tvm_vitq import settings
from tvm_vitq.errors import VitqError
from tvm_vitq.render import fields, table

PACKAGES = ("tvm-vitq", "apache-tvm", "apache-tvm-ffi", "torch", "torchvision", "timm", "numpy", "ziglang")
PEERS = ("onnx", "onnxruntime", "openvino", "nncf")
TOOLS = {
    "g++": "compiles runtime/vitq_run for this machine",
    "aarch64-linux-gnu-g++": "compiles runtime/vitq_run for AArch64",
    "qemu-aarch64": "runs AArch64 libraries here",
}

_ROUND_TRIP = """
import tvm
from tvm import relax
b = relax.BlockBuilder()
x = relax.Var("x", relax.TensorType((1, 4), "float32"))
with b.function("main", [x]):
    with b.dataflow():
        out = b.emit_output(relax.op.add(x, relax.const([1.0, 2.0, 3.0, 4.0], "float32")))
    b.emit_func_output(out)
mod = b.get()
tvm.ir.assert_structural_equal(tvm.ir.load_json(tvm.ir.save_json(mod)), mod)
"""


@dataclass(frozen=True)
class Target:
    """One instruction set: whether its code runs here, is emulated, or can only be compiled."""

    key: str
    instruction: str
    state: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found, plain data.

    ready : what works; missing : what does not, with the reason or the remedy. `healthy`: models can be
    quantized and compiled, and the libraries run here.
    """

    machine: dict[str, str]
    versions: dict[str, str]
    targets: list[Target]
    recipes: list[str]
    codecs: list[str]
    tools: dict[str, str]
    settings: dict[str, str]
    healthy: bool
    ready: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        parts = {
            "machine": fields(self.machine),
            "versions": fields(self.versions),
            "targets": table(
                ("target", "instruction", "state"), [(t.key, t.instruction, t.state) for t in self.targets]
            ),
            "methods": fields({"recipes": ", ".join(self.recipes), "codecs": ", ".join(self.codecs)}),
            "tools": fields(self.tools),
            "settings": fields(self.settings),
        }
        text = "\n\n".join(f"{name}\n{_indented(part)}" for name, part in parts.items())
        ready, missing = (", ".join(names) or "nothing" for names in (self.ready, self.missing))
        return f"{text}\n\nready for: {ready}; missing: {missing}"


def diagnose() -> Diagnosis:
    """Look at everything; never raises for what it finds wrong, but reports it."""
    from tvm_vitq.quantizers import CODECS

    ready: list[str] = []
    missing: list[str] = []
    versions = _versions()
    missing += [f"{name} (pip install {name})" for name in PACKAGES if versions[name] == "not installed"]
    fault = _tvm_fault()
    if fault:
        missing.append(f"a working TVM: {fault}")
    targets = _targets()
    runs = [target.key for target in targets if target.state == "runs here"]
    if not fault:
        ready += [target.key for target in targets if target.state in ("runs here", "emulated")]
        if not runs:
            missing.append("an instruction set that has kernels")
    missing += [f"{t.key} ({t.state})" for t in targets if not fault and t.state.startswith("compiles")]
    tools = {name: shutil.which(name) or f"not found ({use})" for name, use in TOOLS.items()}
    return Diagnosis(
        machine=_machine(),
        versions=versions,
        targets=targets,
        recipes=_recipes(),
        codecs=sorted(CODECS),
        tools=tools,
        settings={s.name: f"{_setting(s)}  ({s.meaning})" for s in settings.ALL},
        healthy=not fault and bool(runs) and all(versions[name] != "not installed" for name in PACKAGES),
        ready=ready,
        missing=missing,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES + PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _tvm_fault() -> str | None:
    """Why TVM cannot be used: its FFI crashes the process where the versions do not fit, hence a child."""
    if importlib.util.find_spec("tvm") is None:
        return "apache-tvm is not installed"
    done = subprocess.run([sys.executable, "-c", _ROUND_TRIP], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return f"saving a module as JSON fails ({last[0]}); pip install apache-tvm-ffi=={_ffi_pin()}"


def _ffi_pin() -> str:
    """The version that this package asks for."""
    for requirement in importlib.metadata.requires("tvm-vitq") or []:
        name, _, version = requirement.partition("==")
        if name == "apache-tvm-ffi":
            return version
    return "(see pyproject.toml)"


def _machine() -> dict[str, str]:
    from tvm_vitq import cpu

    found = {"system": f"{platform.system()} {platform.machine()}", "usable cores": str(cpu.usable_cores())}
    try:
        found["features"] = " ".join(sorted(cpu.host().llvm_features))
    except VitqError as error:
        found["features"] = error.what
    return found


def _targets() -> list[Target]:
    from tvm_vitq import cpu, emulate, targets

    try:
        here: Any = cpu.host()
    except VitqError:
        here = None
    found = []
    for isa in targets.ISAS:
        if here is not None and isa.arch == here.arch:
            known = cpu.KERNEL_NAME[isa.arch].keys() & set(isa.needs)
            lacking = sorted(known - here.llvm_features)
            state = f"compiles; this CPU lacks {' '.join(lacking)}" if lacking else "runs here"
        elif isa.arch == "aarch64":
            reason = emulate.missing()
            state = f"compiles; {reason}" if reason else "emulated"
        else:
            state = "compiles"
        found.append(Target(isa.key, isa.summary, state))
    return found


def _recipes() -> list[str]:
    try:
        from tvm_vitq.recipes import RECIPES
    except ImportError as error:
        return [f"none ({error})"]
    return sorted(RECIPES)


def _setting(setting: settings.Setting[Any]) -> str:
    set_here = os.environ.get(setting.name)
    try:
        return f"{setting.value!r}" + ("" if set_here is None else " set")
    except VitqError as error:
        return f"{error.got!r}: {error.what}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
