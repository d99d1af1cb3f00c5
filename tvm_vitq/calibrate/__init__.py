"""Calibration: a float model and images become an annotated module and a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import REQUANTIZE_KINDS, Calibration, QuantPlan
from tvm_vitq.recipes import DEFAULT, Recipe, find_recipe
from tvm_vitq.site_rules import Granularities, resolve_specs

if TYPE_CHECKING:
    import tvm


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
) -> Calibrated:
    """Fit a quantizer to every operand of every matmul.

    Parameters
    ----------
    model : FloatModel of `tvm_vitq.frontend.import_model`: `mod` is canonical; `name`, `input_shape` and
        `preprocessing` go into the plan.
    bits : widths of weights and activations, "w8a8", "w4a8", ... with 2 to 8 bits each; the image keeps 8
        bits.
    recipe : name or Recipe.
    calibration : images; see `sources.load_images`. None: synthesized.
    overrides : by site or layer name or pattern, bits and granularity; see `site_rules.resolve_specs`.
    granularities : defaults per kind of operand; None: the recipe's.
    requantize : "multiply", or "shift" for plans whose requantization constants are powers of two. A recipe
        whose scales are all powers of two implies "shift".
    limit : calibration images used at most; None: see `sources.load_images`, with the recipe's own number.
    progress : whether bars are shown.
    work : folder in which recipes that train keep what they have finished; with the same arguments they
        resume from there.

    Returns
    -------
    Calibrated

    Raises
    ------
    VitqError : for any argument out of its range; for a model that computes NaN.
    """
    from tvm_vitq.calibrate import sources
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.shift import to_powers_of_two
    from tvm_vitq.calibrate.site_statistics import measure_sites
    from tvm_vitq.relax_passes.annotate import annotate
    from tvm_vitq.relax_passes.sites import image_sites, list_sites

    method = find_recipe(recipe)
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
    specs = resolve_specs(
        names, bits, image_sites=image_sites(model.mod), granularities=asked, overrides=overrides
    )
    images = sources.load_images(
        calibration,
        tuple(model.input_shape),
        model.preprocessing,
        limit=limit,
        wanted=method.calibration_images,
        seed=seed,
    )
    mod, aliases = annotate(model.mod, specs)
    job = Job(mod, specs, aliases, images.values, seed, progress, None if work is None else Path(work))
    method.fit(job)
    job.check_finished()
    if requantize == "shift":
        to_powers_of_two(job)
    plan = QuantPlan(
        model=model.name,
        input_shape=list(model.input_shape),
        recipe=method.name,
        recipe_params=method.parameters(),
        bits=bits,
        requantize=requantize,
        sites={name: job.quantizers[name] for name in names if name in job.quantizers},
        aliases=aliases,
        ranges=job.ranges,
        preprocessing=model.preprocessing,
        calibration=Calibration(images.source, len(images.values), images.ids, seed),
        notes=job.notes,
        versions=_versions(),
        comment="; ".join(f"{label}: {cost}" for label, cost in job.costs.items()),
        statistics=measure_sites(job),
    )
    plan.check(names)
    return Calibrated(job.mod, plan)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from tvm_vitq import __version__

    return {"tvm-vitq": __version__} | {name: version(name) for name in ("apache-tvm", "torch", "timm")}
