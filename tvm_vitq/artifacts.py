"""Files that tvm-vitq writes, told apart by what is in them, not by their names."""

from __future__ import annotations

import os
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_vitq.errors import VitqError, nearest

if TYPE_CHECKING:
    from tvm_vitq.plan import QuantPlan
    from tvm_vitq.quantized_model import QuantizedModel
    from tvm_vitq.runtime import Library

KINDS = ("model", "library", "plan")


def kind_of(path: str | os.PathLike[str]) -> str:
    """What a file is: "model" (of QuantizedModel.save), "library" (of export_library) or "plan" (JSON).

    Raises
    ------
    VitqError : no such file, or none of the three.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise VitqError(
            "cannot read the file", where=file, got=error.strerror, fix="check the path"
        ) from error
    if start.startswith(b"\x7fELF"):
        return "library"
    if zipfile.is_zipfile(file) or start.startswith(b"PK\x03\x04"):
        return "model"
    if start.lstrip().startswith(b"{"):
        return "plan"
    raise VitqError(
        "not a file of tvm-vitq",
        where=file,
        got="an empty file" if not start else f"a file that begins with {start[:4]!r}",
        expected="a quantized model (.vitq), a compiled library (.so) or a plan (.json)",
    )


def is_artifact(text: str) -> bool:
    """Whether a command-line argument means a file of ours rather than a model to import."""
    path = Path(text)
    return path.suffix in (".vitq", ".so", ".json") or (path.is_file() and path.suffix != ".onnx")


def open_artifact(path: str | os.PathLike[str]) -> QuantizedModel | Library | QuantPlan:
    """The object that a file holds; a library is not loaded before it is called.

    Raises
    ------
    VitqError : as `kind_of` and the reader of that kind of file.
    """
    readers: dict[str, Any] = {"model": _model, "library": _library, "plan": _plan}
    return readers[kind_of(path)](path)


def open_model(path: str | os.PathLike[str]) -> QuantizedModel:
    """The quantized model in a file.

    Raises
    ------
    VitqError : as `open_artifact`; a file of another kind.
    """
    kind = kind_of(path)
    if kind == "model":
        return _model(path)
    plan = "give the float model, and the plan with --from-plan"
    raise VitqError(
        f"a {kind} cannot be compiled",
        where=path,
        expected="a quantized model (.vitq)",
        fix=plan if kind == "plan" else "compile the quantized model that it was made from",
    )


def _model(path: str | os.PathLike[str]) -> QuantizedModel:
    from tvm_vitq.quantized_model import QuantizedModel

    return QuantizedModel.load(path)


def _library(path: str | os.PathLike[str]) -> Library:
    from tvm_vitq import library_format
    from tvm_vitq.runtime import Library

    # Not load_library: a library for another machine can be inspected and emulated, if not called.
    return Library(library_format.read(path), file=Path(path))


def _plan(path: str | os.PathLike[str]) -> QuantPlan:
    from tvm_vitq.plan import QuantPlan

    return QuantPlan.load(path)


def plan_of(path: str | os.PathLike[str]) -> QuantPlan:
    """The plan in a plan file or quantized model.

    Raises
    ------
    VitqError : as `open_artifact`; a library, which holds none.
    """
    kind = kind_of(path)
    if kind == "library":
        raise VitqError(
            "a library holds no plan",
            where=path,
            expected="a plan (.json) or a quantized model (.vitq)",
            fix="give the quantized model that it was made from",
        )
    return _plan(path) if kind == "plan" else _model(path).plan


def vta_listing(path: str | os.PathLike[str], launch: str | None = None) -> tuple[dict[str, Any], str]:
    """The streams of a library for VTA, as plain data (lines by launch) and as text.

    Parameters
    ----------
    launch : pattern of the launches listed; None: all.

    Raises
    ------
    VitqError : as `open_artifact`; another kind of file, a library without VTA, no such launch.
    """
    from tvm_vitq.vta.stream.listing import stream_listing

    kind = kind_of(path)
    program = _library(path).program if kind == "library" else None
    if program is None:
        raise VitqError(
            "nothing here runs on VTA",
            where=path,
            got=f"a {kind}" if kind != "library" else "a library for another target",
            expected='a library that was built for "vta"',
        )
    chosen = [name for name in program.launches if launch is None or fnmatchcase(name, launch)]
    if not chosen:
        raise VitqError(
            "no such launch", where=path, got=launch, expected=nearest(launch or "", program.launches)
        )
    listed = {name: list(stream_listing(program.launches[name].stream)) for name in chosen}
    text = "\n".join("\n".join([f"{name}:", *lines]) for name, lines in listed.items())
    return {"file": str(path), "launches": listed}, text


def describe(path: str | os.PathLike[str], site: str | None = None) -> tuple[dict[str, Any], str]:
    """A file of ours as plain data and as text with one fact per line.

    Parameters
    ----------
    site : pattern of the sites that the text lists; None: all.

    Raises
    ------
    VitqError : as `open_artifact`; no site matches.
    """
    from tvm_vitq import render

    kind = kind_of(path)
    artifact: Any = open_artifact(path)
    size = Path(path).stat().st_size
    head = {"file": str(path), "kind": kind, "file_bytes": size}
    first = render.fields({"file": f"{path}  ({kind}, {render.size(size)})"})
    if kind == "plan":
        text = render.plan_text(artifact, site)
        return {**head, "hash": artifact.hash, "plan": artifact.to_dict()}, f"{first}\n{text}"
    if kind == "library":
        info = artifact.info
        about = {
            "needs": " ".join(info.target.features) or "nothing beyond the architecture",
            "versions": ", ".join(f"{name} {version}" for name, version in info.versions.items()),
        }
        text = render.report_text(info.report)
        return {**head, **info.to_json()}, f"{first}\n{render.fields(about)}\n{text}"
    from tvm_vitq.report import quantized_report

    report = quantized_report(artifact)
    text = f"{first}\n{render.report_text(report)}\n{render.plan_text(artifact.plan, site)}"
    return {**head, **report, "plan": artifact.plan.to_dict()}, text
