"""Accuracy of several forms of one model on the same images: float, NumPy reference, compiled libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.evaluation import Accuracy, evaluate

REFMODEL = "refmodel:"


@dataclass(frozen=True)
class Subject:
    """Something that returns logits.

    form : "library", "reference" (a quantized model executed by NumPy) or "float".
    run : what `evaluate` takes; model : name of the float model it came from.
    plan_hash : libraries and references with equal hashes must return equal logits; empty for float models.
    classes : logits per image, None if unknown.
    """

    name: str
    form: str
    model: str
    run: Any
    input_shape: tuple[int, ...]
    preprocessing: Any = None
    plan_hash: str = ""
    classes: int | None = None


@dataclass(frozen=True)
class Row:
    """A subject's result.

    flips : images classified otherwise than by the float model, None without one.
    equal_logits : logits equal in every bit to those of the first row of the same plan, None for that row.
    """

    name: str
    form: str
    accuracy: Accuracy
    flips: int | None
    equal_logits: int | None


@dataclass(frozen=True)
class Comparison:
    """Rows in the order asked for; thresholds apply to the first."""

    data: str
    rows: list[Row]

    def meets(
        self, *, min_top1: float | None = None, max_drop: float | None = None, exact: bool = False
    ) -> bool:
        """Whether the first row reaches `min_top1` percent, is at most `max_drop` points below float, and all
        integer results of the same plan are equal.

        Raises
        ------
        VitqError : a drop or equality is asked for with nothing to compare with.
        """
        floats = [row for row in self.rows if row.form == "float"]
        if max_drop is not None and not floats:
            raise VitqError("no float model to compare with", where="max_drop", fix="name it as well")
        compared = [row for row in self.rows if row.equal_logits is not None]
        if exact and not compared:
            raise VitqError(
                "there is nothing to compare with",
                where="exact",
                fix="name a library and its quantized model, or two libraries of one quantized model",
            )
        first = self.rows[0].accuracy.top1
        return (
            (min_top1 is None or first >= min_top1)
            and (max_drop is None or first >= floats[0].accuracy.top1 - max_drop)
            and (not exact or all(row.equal_logits == row.accuracy.logits.size for row in compared))
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the logits themselves."""
        return {"data": self.data, "rows": [row_to_json(row) for row in self.rows]}


def row_to_json(row: Row) -> dict[str, Any]:
    """Plain data of one row."""
    return {
        "name": row.name,
        "form": row.form,
        "correct": row.accuracy.correct,
        "count": row.accuracy.count,
        "top1": row.accuracy.top1,
        "interval": row.accuracy.interval,
        "flips": row.flips,
        "equal_logits": row.equal_logits,
        "logits": row.accuracy.logits.size,
    }


def compare(
    subjects: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str],
    *,
    limit: int | None = None,
    emulate: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    class_list: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Comparison:
    """Evaluate files and float models on the same images.

    Parameters
    ----------
    subjects : libraries, quantized models, and names of float models. If none of them is a float model and
        the first came from a reference model, that one joins.
    data, limit, class_list : see `tvm_vitq.datasets.load_dataset`.
    emulate : run AArch64 libraries under qemu.
    checkpoint, pretrained : weights of the float models.

    Raises
    ------
    VitqError : a subject that cannot be read or run, subjects of different image sizes, no such data.
    """
    from tvm_vitq.artifacts import is_artifact
    from tvm_vitq.datasets import load_dataset

    files = [is_artifact(str(subject)) for subject in subjects]
    opened: dict[str, Subject] = {
        str(s): _file(s, emulate) for s, is_file in zip(subjects, files, strict=True) if is_file
    }
    shape = next((o.input_shape for o in opened.values()), None)
    names = [str(subject) for subject in subjects]
    if all(files) and opened[names[0]].model.startswith(REFMODEL):
        names.append(opened[names[0]].model)
    for name in names:
        if name not in opened:
            opened[name] = float_subject(name, shape, checkpoint, pretrained)
    chosen = [opened[name] for name in names]
    for subject in chosen[1:]:
        if subject.input_shape[1:] != chosen[0].input_shape[1:]:
            raise VitqError(
                "models for images of different size",
                where=subject.name,
                got=subject.input_shape[1:],
                expected=f"{chosen[0].input_shape[1:]} as {chosen[0].name}",
            )
    preprocessing = next((s.preprocessing for s in chosen if s.preprocessing), None)
    dataset = load_dataset(
        data,
        chosen[0].input_shape,
        preprocessing,
        limit=limit,
        classes=chosen[0].classes,
        class_list=class_list,
    )
    results = [evaluate(subject.run, dataset, progress=progress) for subject in chosen]
    return Comparison(f"{dataset.name}: {dataset.count} images", rows_of(chosen, results))


def rows_of(subjects: Sequence[Subject], results: Sequence[Accuracy]) -> list[Row]:
    """Rows with flips against the float model and equal logits against the first result of the same plan."""
    real = next((r for s, r in zip(subjects, results, strict=True) if s.form == "float"), None)
    first_of: dict[str, Accuracy] = {}
    rows = []
    for subject, result in zip(subjects, results, strict=True):
        flips = None
        if real is not None and subject.form != "float":
            flips = int((result.logits.argmax(-1) != real.logits.argmax(-1)).sum())
        equal = None
        if subject.plan_hash:
            other = first_of.setdefault(subject.plan_hash, result)
            equal = None if other is result else equal_bits(result.logits, other.logits)
        rows.append(Row(subject.name, subject.form, result, flips, equal))
    return rows


def equal_bits(a: np.ndarray, b: np.ndarray) -> int:
    """How many float32 values have the same bits in both arrays."""
    left, right = (np.ascontiguousarray(v, np.float32).view(np.uint32) for v in (a, b))
    return int((left == right).sum())


def _file(path: str | os.PathLike[str], emulate: bool) -> Subject:
    from tvm_vitq.artifacts import kind_of, open_artifact

    kind = kind_of(path)
    if kind == "plan":
        raise VitqError("a plan cannot be evaluated", where=path, expected="a library or a quantized model")
    artifact: Any = open_artifact(path)
    name = str(path)
    if kind == "model":
        plan = artifact.plan
        return Subject(
            name,
            "reference",
            artifact.name,
            artifact,
            artifact.input_shape,
            plan.preprocessing,
            plan.hash,
            artifact.classes,
        )
    info = artifact.info
    run = artifact
    if emulate and info.target.arch == "aarch64" and not info.target.is_host_arch:
        run = emulated(Path(path), info)
        name += " (qemu)"
    return Subject(
        name,
        "library",
        info.model,
        run,
        info.input_shape,
        info.preprocessing,
        info.plan_hash,
        info.classes,
    )


def emulated(library: Path, info: Any) -> Callable[[np.ndarray], np.ndarray]:
    """An AArch64 library as a function of any number of images, run by qemu on a fitting CPU."""
    from tvm_vitq import emulate

    batch = info.input_shape[0]

    def run(images: np.ndarray) -> np.ndarray:
        padded = np.concatenate([images, np.zeros((-len(images) % batch, *images.shape[1:]), np.float32)])
        return emulate.run_aarch64(library, padded, cpu=emulate.CPU_OF_ISA[info.target.isa])[: len(images)]

    return run


def float_subject(
    name: str,
    shape: tuple[int, ...] | None,
    checkpoint: str | os.PathLike[str] | None,
    pretrained: bool,
) -> Subject:
    """A float model: "refmodel:..." or a timm name; `shape` is asked for if its own is not wanted."""
    from tvm_vitq.frontend.timm_models import create, default_image, preprocessing_of
    from tvm_vitq.refmodels import load_model

    if name.endswith(".onnx"):
        raise VitqError("ONNX files cannot be evaluated in float", where=name, fix="name the timm model")
    if name.startswith(REFMODEL):
        module = load_model(name.removeprefix(REFMODEL))
    else:
        module = create(name, (shape[-2], shape[-1]) if shape else None, checkpoint, pretrained)
    image = default_image(module) or (shape or ())[1:]
    return Subject(
        f"{name} (float)",
        "float",
        name,
        module,
        (1, *image),
        preprocessing_of(module),
        classes=getattr(module, "num_classes", None),
    )
