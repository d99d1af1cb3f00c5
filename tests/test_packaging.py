"""Wheel, source archive and editable install hold everything and work from any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

NEEDED = (
    "tvm_vitq/py.typed",
    "tvm_vitq/cli/__init__.py",
    "tvm_vitq/relax_passes/realize.py",
    "tvm_vitq/schedules/linear.py",
    "tvm_vitq/tuning_logs/__init__.py",
    "tvm_vitq/deploy/vitq_run.cc",
    "tvm_vitq/deploy/metadata.h",
    "tvm_vitq/deploy/CMakeLists.txt",
    "tvm_vitq/refmodels/data/images.npz",
    "tvm_vitq/refmodels/data/meta.json",
    "tvm_vitq/refmodels/data/vit.safetensors",
    "tvm_vitq/refmodels/data/swin.safetensors",
)

USE = """
import sys
from pathlib import Path
import tvm_vitq
from tvm_vitq import deploy_kit, refmodels, relax_passes, schedules, tuning_logs
import importlib.resources
home = Path(tvm_vitq.__file__).parent
assert str(home).startswith(sys.argv[1]), home
images, labels = refmodels.test_set_uint8()
assert len(images) == len(labels) >= 2000
assert (importlib.resources.files("tvm_vitq.deploy") / "vitq_run.cc").is_file()
import tvm_vitq.schedules.linear, tvm_vitq.relax_passes.realize, tvm_vitq.api
"""


def run(*command: object, folder: Path, **environment: str) -> str:
    """Output of a command that must succeed, run in `folder`."""
    env = {**os.environ, **environment}
    done = subprocess.run([str(c) for c in command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources without what earlier builds left, so that nothing stale is packed."""
    folder = tmp_path_factory.mktemp("tree") / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "venv*", "*.so")
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def built(hook: str, tree: Path, into: Path) -> Path:
    """What a PEP 517 hook of setuptools makes of the tree."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    return into / run(sys.executable, "-c", code, into, folder=tree).splitlines()[-1]


def install(wheel: Path, into: Path) -> None:
    run(
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            into,
            wheel,
        ),
        folder=into.parent,
    )


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, tree, folder=folder)
    (path,) = folder.glob("tvm_vitq-*.whl")
    return path


def test_wheel_holds_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert set(NEEDED) <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    foreign = {name.split("/")[0] for name in names if not name.startswith("tvm_vitq")}
    assert not foreign, "top-level names beside the package"


def test_wheel_works_from_any_directory(wheel, tmp_path):
    site = tmp_path / "site"
    install(wheel, site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-c", USE, tmp_path, folder=elsewhere, PYTHONPATH=str(site))
    version = run(sys.executable, site / "bin" / "vitq", "--version", folder=elsewhere, PYTHONPATH=str(site))
    assert version.startswith("vitq ")


def test_source_archive_makes_the_same_wheel(tree, wheel, tmp_path):
    archive = built("build_sdist", tree, tmp_path)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    for name in ("LICENSE", "README.md", "setup.py", "tests/conftest.py", "runtime/vitq_run.cc"):
        assert (source / name).is_file(), name
    again = built("build_wheel", source, tmp_path)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_editable_install_maps_the_folders(tree, tmp_path):
    site = tmp_path / "site"
    install(built("build_editable", tree, tmp_path), site)
    code = f"""
import importlib.util, site
site.addsitedir({str(site)!r})
for name, folder in (("relax_passes", "relax_passes"), ("schedules", "schedules"),
                     ("tuning_logs", "tuning_logs"), ("deploy", "runtime")):
    print(importlib.util.find_spec("tvm_vitq." + name).origin)
"""
    origins = run(sys.executable, "-I", "-S", "-c", code, folder=tmp_path).split()
    expected = ("relax_passes", "schedules", "tuning_logs", "runtime")
    assert origins == [str(tree / name / "__init__.py") for name in expected]


@pytest.mark.parametrize("folder", ["relax_passes", "schedules"])
def test_second_copy_from_the_repository_root_is_refused(folder):
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"tvm_vitq.{folder}" in done.stderr
