"""Recipes side by side: every model at every width with every recipe, in float, simulated and compiled."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_vitq.comparison import REFMODEL, float_subject
from tvm_vitq.datasets import load_dataset
from tvm_vitq.errors import VitqError
from tvm_vitq.evaluation import Accuracy, evaluate, sqnr

BASELINE = ("w8a8", "minmax")
"""What latencies are relative to."""

OWN_IMAGES = 256
"""Least number of calibration images of a reference model: they are small."""

ROUNDS = 7
"""Of latency: baseline and candidate in turns; the median of their ratios counts."""


@dataclass(frozen=True)
class Result:
    """One row: top-1 in percent of the float model, of the float simulation of the plan and of the compiled
    integer program; half its 95 % confidence interval; SQNR in dB and agreement in percent of program and
    simulation; seconds of calibration; latency relative to `BASELINE` (None: not measured); what it was
    evaluated and calibrated on, as asked for; half the 95 % confidence interval of compiled - simulated, in
    points.
    """

    model: str
    bits: str
    recipe: str
    images: int
    float_top1: float
    simulated: float
    compiled: float
    interval: float
    sqnr: float
    agreement: float
    seconds: float
    latency: float | None
    version: str
    data: str = ""
    calibration: str = ""
    paired: float | None = None

    @property
    def key(self) -> tuple:
        """Equal for rows that answer the same question."""
        return (
            self.model, self.bits, self.recipe, self.images, self.version, self.data, self.calibration
        )  # fmt: skip


def sweep(
    models: Sequence[str],
    bits: Sequence[str],
    recipes: Sequence[str],
    data: str | os.PathLike[str],
    *,
    calibration: Any = None,
    calibration_count: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    class_list: str | os.PathLike[str] | None = None,
    batch: int = 8,
    store: str | os.PathLike[str] | None = None,
    latency: bool = True,
    progress: bool = True,
    **loading: Any,
) -> Iterator[Result]:
    """Rows as they are finished, models outermost.

    Parameters
    ----------
    models : float models: "refmodel:vit", timm names.
    recipes : names, or ("all",).
    data, limit, class_list : see `datasets.load_dataset`.
    calibration, calibration_count, seed : see `tvm_vitq.quantize`; for "refmodel:..." None takes as many
        calibration images of the reference models as the recipe asks for, at least 256.
    store : file of finished rows, one JSON object a line; rows found there are not computed again.
    latency : whether it is measured, by a call of `batch` images.
    loading : `checkpoint` and `pretrained` of the float model.

    Raises
    ------
    VitqError : unknown model, recipe or data, malformed bits: all before the first row is computed.
    """
    from tvm_vitq import __version__
    from tvm_vitq.calibrate import patch_similarity, sources
    from tvm_vitq.recipes import RECIPES, find_recipe
    from tvm_vitq.site_rules import parse_bits

    names = list(RECIPES) if list(recipes) == ["all"] else list(recipes)
    if not (isinstance(calibration, str) and calibration == patch_similarity.NAME):
        sources.check_request(calibration, calibration_count)
    for name in names:
        recipe_of_name = find_recipe(name)
        if calibration_count is not None:
            recipe_of_name.check_images(calibration_count)
    for width in bits:
        parse_bits(width)
    images = _described(calibration, calibration_count, seed)
    known = {row.key: row for row in read_store(store)} if store is not None else {}
    subjects = [
        float_subject(name, None, loading.get("checkpoint"), bool(loading.get("pretrained")))
        for name in models
    ]
    for name, subject in zip(models, subjects, strict=True):
        dataset = load_dataset(
            data,
            subject.input_shape,
            subject.preprocessing,
            limit=limit,
            classes=subject.classes,
            class_list=class_list,
        )
        bench: _Bench | None = None
        for width in bits:
            for recipe in names:
                what = (name, width, recipe, dataset.count, __version__)
                key = (*what, str(data), images)
                before = (*what, "", "")  # rows of when they did not name their data
                if before in known:
                    known[key] = known[before]
                if key not in known:
                    bench = bench or _Bench(
                        subject, dataset, calibration, calibration_count, seed, batch, latency, progress
                    )
                    known[key] = Result(
                        name,
                        width,
                        recipe,
                        dataset.count,
                        **bench.measure(width, recipe),
                        version=__version__,
                        data=str(data),
                        calibration=images,
                    )
                    if store is not None:
                        _append(store, known[key])
                yield known[key]


def _described(calibration: Any, count: int | None, seed: int) -> str:
    """What a row says it was calibrated on."""
    source = calibration if isinstance(calibration, (str, os.PathLike)) else type(calibration).__name__
    return f"{'default' if calibration is None else source}, {count or 'default'} images, seed {seed}"


class _Bench:
    """One float model with its data; whatever its rows share is computed once."""

    def __init__(
        self,
        subject: Any,
        dataset: Any,
        calibration: Any,
        calibration_count: int | None,
        seed: int,
        batch: int,
        latency: bool,
        progress: bool,
    ) -> None:
        from tvm_vitq.frontend import import_model

        self.dataset, self.latency, self.progress = dataset, latency, progress
        self.own = calibration is None and subject.model.startswith(REFMODEL)
        self.calibration, self.count, self.seed = calibration, calibration_count, seed
        self.model = import_model(subject.run, input_shape=subject.input_shape[1:], batch=batch)
        self.float_run = evaluate(subject.run, dataset, progress=progress)
        self.baseline: Any = self.program(*BASELINE)[2] if latency else None

    def program(self, bits: str, recipe: str) -> tuple[Any, float, Any]:
        """Simulation, seconds of calibration, and compiled library."""
        import tvm_vitq
        from tvm_vitq import refmodels
        from tvm_vitq.calibrate import calibrate
        from tvm_vitq.calibrate.simulate import simulate
        from tvm_vitq.pipeline import realize_passes, run_passes
        from tvm_vitq.quantized_model import QuantizedModel
        from tvm_vitq.recipes import find_recipe

        images, count = self.calibration, self.count
        if self.own:
            count = count or max(OWN_IMAGES, find_recipe(recipe).calibration_images)
            images = refmodels.calibration_images(count)
        start = time.perf_counter()
        found = calibrate(
            self.model, bits, recipe, images, limit=count, seed=self.seed, progress=self.progress
        )
        seconds = time.perf_counter() - start
        quantized = QuantizedModel(run_passes(found.mod, realize_passes(found.plan)), found.plan)
        return simulate(found.mod, found.plan), seconds, tvm_vitq.compile(quantized)

    def measure(self, bits: str, recipe: str) -> dict[str, Any]:
        """The measured fields of a row."""
        simulation, seconds, library = self.program(bits, recipe)
        simulated = evaluate(simulation, self.dataset, progress=self.progress)
        compiled: Accuracy = evaluate(library, self.dataset, progress=self.progress)
        return {
            "float_top1": self.float_run.top1,
            "simulated": simulated.top1,
            "compiled": compiled.top1,
            "interval": compiled.interval,
            "paired": compiled.paired_interval(simulated),
            "sqnr": sqnr(simulated.logits, compiled.logits),
            "agreement": compiled.agreement(simulated),
            "seconds": seconds,
            "latency": self.relative_latency(library) if self.latency else None,
        }

    def relative_latency(self, library: Any) -> float:
        """Median ratio to the baseline, both in turns, one thread."""
        ratios = []
        for _ in range(ROUNDS):
            times = []
            for one in (self.baseline, library):
                one.num_threads = 1
                times.append(one.benchmark(repeat=5)["median_ms"])
            ratios.append(times[1] / times[0])
        return float(np.median(ratios))


def read_store(path: str | os.PathLike[str]) -> list[Result]:
    """Rows of a store; none if there is no such file yet. A last line that an interruption cut off is left
    out.
    """
    file = Path(path)
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Result(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise VitqError(
                "malformed row of results",
                where=f"{file}, line {number}",
                got=error,
                fix="remove the line or the file",
            ) from error
    return rows


def _append(path: str | os.PathLike[str], row: Result) -> None:
    file = Path(path)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    cut_off = text and not text.endswith("\n")
    if cut_off:
        file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(row)) + "\n")
