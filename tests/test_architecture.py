"""The source as a whole: layers, cheap import, lengths, docstrings, settings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    ("errors",),
    (
        *("settings", "files", "numerics", "numerics_attention", "numerics_groups"),
        *("cpu", "ffi", "linker", "deploy", "tuning_logs"),
    ),
    ("site_statistics",),
    ("plan", "formats", "quantizers", "site_rules", "target_text", "targets", "library_format", "vta"),
    ("explain", "plotting", "render"),
    ("ops", "graph", "units", "macs", "integerize", "schedules", "reference", "refmodels"),
    ("relax_passes",),
    ("image_folders",),
    ("frontend", "calibrate", "recipes", "pipeline"),
    ("quantized_model", "runtime"),
    ("tuning",),
    ("report", "compiler", "api"),
    ("evaluation", "datasets", "artifacts", "deploy_kit", "emulate"),
    ("comparison", "demo", "doctor"),
    ("published", "sweep", "sweep_tables"),
    ("cli", "__main__"),
)
"""Lowest first. A module imports from its own layer and lower ones, also inside functions."""

NUMPY_ONLY = {name for layer in LAYERS[:5] for name in layer} | {"runtime", "evaluation"}
"""What a machine that only runs libraries imports: no torch, timm or TVM compiler comes along."""

HEAVY = {"torch", "torchvision", "timm", "tvm", "onnx"}

LONG_FILES = {"relax_passes/realize.py": "a method per operator, sharing the formats chosen for one graph"}
LINES = 400
SHORT_BODY = 4
TABLES = {"operators.py", "torch_operators.py", "lower_elementwise.py"}
"""Files of one table: its docstring says what its entries do."""

MAPPED = {
    "relax_passes": "relax_passes",
    "schedules": "schedules",
    "tuning_logs": "tuning_logs",
    "runtime": "deploy",
}


def sources() -> dict[str, Path]:
    """Module name -> file, of everything that is installed."""
    found = {}
    for folder in ("tvm_vitq", *MAPPED):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "tvm_vitq" else ("tvm_vitq", MAPPED[folder], *parts[1:])
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


SOURCES = sources()


def imports(file: Path, *, at_import_only: bool = False) -> Iterator[tuple[str, int]]:
    """(module or module.name, line) of every import that runs: not those under `if TYPE_CHECKING`."""
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def unit(module: str) -> str:
    """First part below tvm_vitq; what the package itself offers comes from `api`."""
    if module == "tvm_vitq":
        return "api"
    name = module.split(".")[1]
    known = {entry.split(".")[1] for entry in SOURCES if "." in entry}
    if name in known:
        return name
    return "errors" if name in ("__version__", "VitqError") else "api"


def layer(name: str) -> int:
    for number, names in enumerate(LAYERS):
        if name in names:
            return number
    raise AssertionError(f"{name} has no place in LAYERS")


def test_every_module_has_a_layer():
    for module in SOURCES:
        if module != "tvm_vitq":
            layer(unit(module))


def test_lower_layers_never_import_higher_ones():
    wrong = []
    for module, file in SOURCES.items():
        if module == "tvm_vitq":
            continue
        own = layer(unit(module))
        for target, line in imports(file):
            if target.split(".")[0] == "tvm_vitq" and layer(unit(target)) > own:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_light_modules_import_nothing_heavy():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {target}"
        for module, file in SOURCES.items()
        if module == "tvm_vitq" or unit(module) in NUMPY_ONLY
        for target, line in imports(file, at_import_only=True)
        if target.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("statement", ["import tvm_vitq", "import tvm_vitq.cli", "import tvm_vitq.runtime"])
def test_import_is_cheap(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_files_are_short():
    lengths = {
        str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in SOURCES.values()
    }
    assert [
        f"{name}: {count}" for name, count in lengths.items() if count > LINES and name not in LONG_FILES
    ] == []


def needs_docstring(node: ast.stmt, file: Path) -> bool:
    """Not: entries of a table, bodies shorter than a docstring, the one pass of a file about it."""
    if isinstance(node, ast.ClassDef):
        return node.name.lower() != file.stem.replace("_", "") and not node.name.startswith("_")
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or file.name in TABLES:
        return False
    return (node.end_lineno or 0) - node.body[0].lineno >= SHORT_BODY


def test_public_definitions_have_docstrings():
    missing = []
    for file in SOURCES.values():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            missing.append(f"{file.relative_to(ROOT)}")
        missing += [
            f"{file.relative_to(ROOT)}: {node.name}"
            for node in tree.body
            if needs_docstring(node, file) and not ast.get_docstring(node)
        ]
    assert not missing, "\n".join(missing)


def test_every_setting_is_declared():
    declared = set(re.findall(r"VITQ_[A-Z_]+", (ROOT / "tvm_vitq/settings.py").read_text(encoding="utf-8")))
    for file in SOURCES.values():
        used = set(re.findall(r"\bVITQ_[A-Z]+(?:_[A-Z]+)*\b", file.read_text(encoding="utf-8")))
        assert used <= declared, f"{file}: {used - declared}"


def test_environment_is_read_by_settings_only():
    """Besides where other programs' variables are followed or handed on."""
    allowed = {"settings.py", "deploy_kit.py", "doctor.py", "demo.py"}
    readers = [
        f.name
        for f in SOURCES.values()
        if re.search(r"os\.environ|os\.getenv", f.read_text(encoding="utf-8"))
    ]
    assert set(readers) <= allowed
