"""The pages keep what they promise: Python blocks run, commands parse, files and links exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_vitq.cli import parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every command line of the shell blocks, without comments; `&&` separates commands."""
    found = []
    for block in blocks(page, "(?:bash|sh|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words:
                    found.append(words)
    return found


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_python_blocks_run(number, tmp_path):
    code = blocks(ROOT / "README.md", "python")[number]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page, capsys):
    for words in commands(page):
        if words[0] == "vitq":
            try:
                parser().parse_args(words[1:])
            except SystemExit as stop:
                assert stop.code == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
        if words[0] == "python" and words[1:2] and words[1].endswith(".py"):
            assert (page.parent / words[1]).is_file() or (ROOT / words[1]).is_file(), words[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_has_the_two_commands():
    words = commands(ROOT / "README.md")
    for line in (["pip", "install", "."], ["vitq", "demo"], ["pip", "install", ".[test]"], ["pytest"]):
        assert line in words


def test_architecture_names_every_folder():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for folder in ("relax_passes", "schedules", "tuning_logs", "runtime", "benchmarks", "tools", "tests"):
        assert f"{folder}/" in page
    for folder in (ROOT / "tvm_vitq").iterdir():
        if folder.is_dir() and (folder / "__init__.py").exists():
            assert f"{folder.name}/" in page, folder.name


def test_architecture_names_every_report_field():
    """Of build reports, as fields are added to report.py."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    source = (ROOT / "tvm_vitq/report.py").read_text(encoding="utf-8")
    part = source[source.index("def quantized_report") : source.index("def kernel_table")]
    for name in re.findall(r'^        "(\w+)":', part, re.MULTILINE):
        assert f"`{name}`" in page, name
