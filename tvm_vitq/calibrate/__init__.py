"""Calibration: a float model and images become an annotated module and a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import REQUANTIZE_KINDS, Calibration, QuantPlan
from tvm_vitq.recipes import DEFAULT, Recipe, find_recipe
from tvm_vitq.site_rules import Granularities, SiteSpec, resolve_specs

if TYPE_CHECKING:
    import torch
    import tvm

    from tvm_vitq.calibrate import sources
    from tvm_vitq.calibrate.budget import Budget
    from tvm_vitq.calibrate.job import Job


@dataclass
class Calibrated:
    """A canonical module annotated with vitq.quantize, its constants as the recipe left them, and its
    plan.
    """

    mod: tvm.IRModule
    plan: QuantPlan


def calibrate(
    model: Any,
    bits: str = "w8a8",
    recipe: str | Recipe = DEFAULT,
    calibration: Any = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    granularities: Granularities | None = None,
    requantize: str = "multiply",
    seed: int = 0,
    limit: int | None = None,
    progress: bool = True,
    work: str | os.PathLike[str] | None = None,
    budget: str | Budget | None = None,
) -> Calibrated:
    """Fit a quantizer to every operand of every matmul.

    Parameters
    ----------
    model : FloatModel of `tvm_vitq.frontend.import_model`: `mod` is canonical; `name`, `input_shape` and
        `preprocessing` go into the plan.
    bits : widths of weights and activations, "w8a8", "w4a8", ... with 2 to 8 bits each; the image keeps 8
        bits. "auto": a width for every layer, chosen within `budget` by `mixed.choose_widths`.
    recipe : name or Recipe.
    calibration : images; see `sources.load_images`. None: synthesized. "patch-similarity", or a
        `patch_similarity.PatchSimilarity`: made from the model.
    overrides : by site or layer name or pattern, bits and granularity; see `site_rules.resolve_specs`.
    granularities : defaults per kind of operand; None: the recipe's.
    requantize : "multiply", or "shift" for plans whose requantization constants are powers of two. A recipe
        whose scales are all powers of two implies "shift".
    limit : calibration images used at most; None: see `sources.load_images`, with the recipe's own number.
    progress : whether bars are shown.
    work : folder in which recipes that train keep what they have finished; with the same arguments they
        resume from there.
    budget : of bits="auto", see `budget.Budget`: "4.0bit", "0.5x", "6MB", "0.35x bops".

    Returns
    -------
    Calibrated

    Raises
    ------
    VitqError : for any argument out of its range; for a width, or so few images, that the recipe does not
        work with; for a model that computes NaN.
    """
    from tvm_vitq.calibrate.budget import parse_budget
    from tvm_vitq.calibrate.mixed import AUTO, MIXED, WIDTHS, choose_widths
    from tvm_vitq.calibrate.site_statistics import measure_sites
    from tvm_vitq.relax_passes.sites import image_sites, list_sites

    method = find_recipe(recipe)
    if (bits == AUTO) != (budget is not None):
        raise VitqError(
            "a budget and bits='auto' belong together",
            where="budget",
            got=f"bits={bits!r}, budget={budget!r}",
            fix='give both, such as bits="auto", budget="4.0bit"',
        )
    allowed = None if budget is None else parse_budget(budget)
    if requantize not in REQUANTIZE_KINDS:
        raise VitqError(
            "unknown requantization",
            where="requantize",
            got=requantize,
            expected=" or ".join(REQUANTIZE_KINDS),
        )
    requantize = method.requantize or requantize
    names = [site.name for site in list_sites(model.mod)]
    asked = granularities or method.granularities(requantize)
    image = image_sites(model.mod)

    def specs_at(bits: str) -> dict[str, SiteSpec]:
        specs = resolve_specs(names, bits, image_sites=image, granularities=asked, overrides=overrides)
        method.check_widths(specs)
        return specs

    if allowed is not None:
        by_width = {width: specs_at(f"w{width}a{width}") for width in method.widths if width in WIDTHS}
    else:
        specs = specs_at("w8a8" if bits == MIXED and overrides else bits)
    if limit is not None:
        method.check_images(limit)
    images = _images(model, calibration, limit, method.calibration_images, seed, progress)
    method.check_images(len(images.values))
    folder = None if work is None else Path(work)

    def fit(how: Recipe, specs: Mapping[str, SiteSpec]) -> Job:
        return _fitted(how, model.mod, specs, requantize, images.values, seed, progress, folder)

    chosen = None
    if allowed is not None:
        # A method that changes the float function, or trains for hours, is not run once a width.
        compared = find_recipe(DEFAULT) if method.trains else method
        chosen = choose_widths(model.mod, by_width, partial(fit, compared), allowed)
        bits, specs = MIXED, chosen.specs
    job = fit(method, specs)
    statistics = measure_sites(job)
    if chosen is not None:
        job.notes["bits"] = chosen.note
        statistics = chosen.told(statistics)
    plan = QuantPlan(
        model=model.name,
        input_shape=list(model.input_shape),
        recipe=method.name,
        recipe_params=method.parameters(),
        bits=bits,
        requantize=requantize,
        sites={name: job.quantizers[name] for name in names if name in job.quantizers},
        aliases=job.aliases,
        ranges=job.ranges,
        preprocessing=model.preprocessing,
        calibration=Calibration(images.source, len(images.values), images.ids, seed),
        notes=job.notes,
        versions=_versions(),
        comment="; ".join(f"{label}: {cost}" for label, cost in job.costs.items()),
        statistics=statistics,
    )
    plan.check(names)
    return Calibrated(job.mod, plan)


def _images(
    model: Any, calibration: Any, limit: int | None, wanted: int, seed: int, progress: bool
) -> sources.Images:
    """Calibration images, given or made from the model."""
    from tvm_vitq.calibrate import patch_similarity, sources

    if isinstance(calibration, str) and calibration == patch_similarity.NAME:
        calibration = patch_similarity.PatchSimilarity(limit or patch_similarity.PatchSimilarity.images)
    if not isinstance(calibration, patch_similarity.PatchSimilarity):
        shape = tuple(model.input_shape)
        return sources.load_images(
            calibration, shape, model.preprocessing, limit=limit, wanted=wanted, seed=seed
        )
    values = calibration.make(model.mod, model.preprocessing, seed, progress)
    return sources.Images(values, f"made from the model: {calibration}", [])


def _fitted(
    method: Recipe,
    mod: tvm.IRModule,
    specs: Mapping[str, SiteSpec],
    requantize: str,
    images: torch.Tensor,
    seed: int,
    progress: bool,
    work: Path | None,
) -> Job:
    """The job that a recipe has finished."""
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.shift import to_powers_of_two
    from tvm_vitq.relax_passes.annotate import annotate

    annotated, aliases = annotate(mod, specs)
    job = Job(annotated, dict(specs), aliases, images, seed, progress, work)
    method.fit(job)
    job.check_finished()
    if requantize == "shift":
        to_powers_of_two(job)
    return job


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from tvm_vitq import __version__

    return {"tvm-vitq": __version__} | {name: version(name) for name in ("apache-tvm", "torch", "timm")}
