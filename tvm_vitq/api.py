"""The public functions: quantize, compile, build, tune, load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import QuantPlan
from tvm_vitq.quantized_model import QuantizedModel

if TYPE_CHECKING:
    from tvm_vitq.runtime import Library


def quantize(
    model: Any,
    bits: str = "w8a8",
    recipe: str = "percentile",
    calibration: Any = None,
    input_shape: tuple[int, ...] | None = None,
    *,
    batch: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    calibration_count: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    plan: QuantPlan | str | os.PathLike[str] | None = None,
    requantize: str = "multiply",
    strict: bool = False,
    seed: int = 0,
    progress: bool = True,
    budget: Any = None,
    **recipe_options: Any,
) -> QuantizedModel:
    """Quantize a trained Vision Transformer.

    Parameters
    ----------
    model : timm model name, "refmodel:vit" (see tvm_vitq.refmodels), torch.nn.Module,
        torch.export.ExportedProgram, or path of an ONNX file.
    bits : "w<weight bits>a<activation bits>", 2 to 8 each: "w8a8", "w4a8", "w4a4", ... The image stays at 8
        bits. "auto": a width for every layer, from how much the prediction suffers, within `budget`.
    budget : of bits="auto": "4.0bit" (per weight), "0.5x" (size relative to 8 bits), "6MB" (weights, packed)
        or "0.35x bops" (multiply-accumulates times both widths, relative to w8a8).
    recipe : calibration method, see `tvm_vitq.recipes`: "percentile", "minmax", "repq-vit", "adalog", ...
    calibration : float32 images (N, 3, H, W), normalized; or an iterable of such batches (a DataLoader), a
        folder of image files; None: images are synthesized, which the plan and the report say;
        "patch-similarity": images are made from the model itself (`calibrate.patch_similarity`).
    calibration_count : images used at most; a folder is drawn from at random, across its class folders. None:
        of a folder as many as the recipe's paper takes, of others at least 128.
    input_shape : (3, H, W) or (N, 3, H, W) if the model takes sizes other than its default.
    batch : images per call of the compiled library, fixed at build.
    checkpoint : .safetensors, .pth or .pt file for a timm name; pretrained : let timm fetch its weights.
    overrides : bits and granularity of single sites: {"blocks.*.mlp.fc2.input": {"bits": 8}}, last match
        wins.
    plan : a plan, or its JSON file, to start from: recipe, requantization, bits and granularity of every site
        are taken from it, edited by hand or not; `overrides` still win; scales are fitted anew.
    requantize : "multiply" (any scale) or "shift" (powers of two, for shift-only hardware; implied by the
        recipe "p2-vit").
    strict : refuse a model that keeps float operators.
    seed : of everything random in calibration.

    Raises
    ------
    VitqError : says what is wrong, where, what was expected and how to mend it.
    """
    from tvm_vitq.calibrate import calibrate
    from tvm_vitq.frontend import import_model
    from tvm_vitq.pipeline import realize_passes, run_passes
    from tvm_vitq.quantizers import codec_of
    from tvm_vitq.relax_passes.sites import list_sites

    imported = import_model(
        model, input_shape=input_shape, batch=batch, checkpoint=checkpoint, pretrained=pretrained
    )
    if plan is not None:
        given = plan if isinstance(plan, QuantPlan) else QuantPlan.load(plan)
        given.check(site.name for site in list_sites(imported.mod))
        for name, site in given.sites.items():
            codec_of(site, f"{name}: codec")
        bits, recipe, requantize = given.bits, given.recipe, given.requantize
        overrides = {**given.asked(), **(overrides or {})}
    calibrated = calibrate(
        imported,
        bits=bits,
        recipe=recipe,
        calibration=calibration,
        overrides=overrides,
        requantize=requantize,
        seed=seed,
        limit=calibration_count,
        progress=progress,
        budget=budget,
        **recipe_options,
    )
    if plan is not None:
        _note_other_codecs(calibrated.plan, given)
    mod = run_passes(calibrated.mod, realize_passes(calibrated.plan))
    quantized = QuantizedModel(mod, calibrated.plan)
    if strict and quantized.float_islands:
        _refuse_islands(quantized)
    return quantized


def _note_other_codecs(plan: QuantPlan, given: QuantPlan) -> None:
    """Codecs are the recipe's: one edited in a plan has no effect, which must not go unsaid."""
    for name, site in given.sites.items():
        if name in plan.sites and plan.sites[name].codec != site.codec:
            used = plan.sites[name].codec
            plan.notes[name] = f"{used}, as recipe {plan.recipe} has it, not {site.codec} of the given plan"


def _refuse_islands(quantized: QuantizedModel) -> None:
    islands = quantized.float_islands
    listed = ", ".join(f"{name} ({op})" for name, op in islands[:8])
    raise VitqError(
        "the model keeps float operators, and strict=True refuses them",
        where=quantized.name,
        got=listed + (f" and {len(islands) - 8} more" if len(islands) > 8 else ""),
        fix="build with strict=False: they run in float, and the report lists them with their share of MACs",
    )


def compile(
    quantized: QuantizedModel,
    target: Any = "llvm",
    *,
    tuning_logs: str | os.PathLike[str] | bool | None = None,
    weights: str = "packed",
) -> Library:
    """Compile a quantized model to a library for one target.

    Parameters
    ----------
    quantized : from `quantize` or `load`.
    tuning_logs : records of `tune`: a file, a folder of them, or a folder of folders by target. None: those
        in ``./tuning_logs`` and those of the package, where they are for this target; False: none. The report
        says of every kernel whether it is tuned. No schedule changes a result.
    weights : those of fewer than 8 bits are stored in as many; "packed": kernels unpack them as they go;
        "unpacked": they are unpacked once, when the library is loaded, and take a byte each in memory.
    target : see tvm_vitq.targets.parse: "llvm" is this machine with all its instructions;
        "llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76" cross-compiles.

    Returns
    -------
    Library : call it with images, `benchmark`, `export_library`, read `report`.
    """
    from tvm_vitq.compiler import compile_library

    return compile_library(quantized, target, tuning_logs, weights)


def build(
    model: Any,
    target: Any = "llvm",
    *,
    tuning_logs: str | os.PathLike[str] | bool | None = None,
    weights: str = "packed",
    **options: Any,
) -> Library:
    """Quantize and compile in one call; `tuning_logs` and `weights` as of `compile`, `options` as of
    `quantize`.
    """
    from tvm_vitq.compiler import check_weights
    from tvm_vitq.targets import parse
    from tvm_vitq.tuning.apply import find_runs

    find_runs(parse(target), tuning_logs)  # what is malformed is told before the long work
    check_weights(weights)
    return compile(quantize(model, **options), target, tuning_logs=tuning_logs, weights=weights)


def tune(
    quantized: QuantizedModel,
    target: Any = "llvm",
    *,
    trials: int = 64,
    seconds: float | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    runner: str = "local",
    threads: int = 0,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Search schedules for the kernels of a model, measured on the device that they are for.

    Every candidate's result is compared with numerics.py before its time counts. Records are written as they
    are found: an interrupted run loses none, and `compile` uses them.

    Parameters
    ----------
    quantized : from `quantize` or `load`.
    target : see `compile`.
    trials : candidates in all; seconds : end after this time, if that is earlier.
    work_dir : folder of records; None: ``./tuning_logs``, where `compile` finds them.
    runner : "local", or "rpc://<host>:<port>/<key>": devices behind a TVM RPC tracker.
    threads : of the kernels; 0: as the target says, else one per core.
    resume : go on with an earlier run of the same model, target and threads.

    Returns
    -------
    dict : path of the records; per kernel the default's and the best time in seconds, the schedule, and how
        many candidates were tried and failed.

    Raises
    ------
    VitqError : a target that this machine cannot run (local), no tracker or device, records of an earlier
        run without `resume`.
    """
    from tvm_vitq.tuning.run import tune_model

    return tune_model(
        quantized, target, trials=trials, seconds=seconds, work_dir=work_dir, runner=runner, threads=threads,
        resume=resume, seed=seed, progress=progress,
    )  # fmt: skip


def load(path: str | os.PathLike[str]) -> QuantizedModel:
    """Read a quantized model written by QuantizedModel.save."""
    return QuantizedModel.load(path)
