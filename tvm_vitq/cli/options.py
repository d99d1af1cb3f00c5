"""Arguments that several verbs share, so that they mean the same everywhere."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tvm_vitq.errors import VitqError

MODEL_HELP = (
    "timm name, .onnx file, or a model of the package: refmodel:vit, refmodel:swin, each also ..._outlier"
)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Everything that `tvm_vitq.quantize` takes."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--bits",
        default="w8a8",
        help="w<weights>a<activations>, 2 to 8 each (default: w8a8); auto: a width per layer within --budget",
    )
    group.add_argument(
        "--budget",
        metavar="B",
        help="of --bits auto: 4.0bit (per weight), 0.5x (size relative to 8 bits), 6MB, '0.35x bops' (bit "
        "operations relative to w8a8)",
    )
    group.add_argument("--recipe", default="percentile", help="percentile (default), auto, repq-vit, ...")
    group.add_argument(
        "--calibration",
        default="none",
        metavar="DATA",
        help="folder of images, .npy file with float32 (N, 3, H, W) normalized images, refmodel, "
        "patch-similarity (images are made from the model), or none (default: images are synthesized)",
    )
    group.add_argument("--checkpoint", metavar="FILE", help="weights of a timm name: .safetensors, .pth")
    group.add_argument("--pretrained", action="store_true", help="let timm fetch its pretrained weights")
    group.add_argument(
        "--input-shape", type=_shape, metavar="3,H,W", help="a size other than the model's own"
    )
    group.add_argument("--batch", type=int, default=1, help="images per call (default: 1)")
    group.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="SITE=SPEC",
        help="bits or JSON for sites by name or pattern: 'blocks.*.mlp.fc2.input=8', "
        '\'*.weight={"granularity": "group", "group_size": 32}\'; the last match wins',
    )
    group.add_argument(
        "--from-plan", metavar="FILE", help="take recipe, bits and granularities from a plan (JSON)"
    )
    group.add_argument("--requantize", default="multiply", help="multiply (default) or shift (powers of two)")
    group.add_argument("--strict", action="store_true", help="refuse a model that keeps float operators")
    add_drawing(group)


def add_tuning_logs(parser: argparse.ArgumentParser) -> None:
    """--tuning-logs and --no-tuning-logs, as tvm_vitq.compile."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--tuning-logs",
        metavar="PATH",
        help="records of `vitq tune`: a file or a folder (default: ./tuning_logs and those of the package)",
    )
    group.add_argument("--no-tuning-logs", action="store_true", help="default schedules only")


def tuning_logs(arguments: argparse.Namespace) -> str | bool | None:
    """The argument `tuning_logs` of `tvm_vitq.compile`."""
    return False if arguments.no_tuning_logs else arguments.tuning_logs


def add_drawing(parser: Any) -> None:
    """How many images calibration takes, and by which seed."""
    parser.add_argument(
        "--calibration-count",
        type=int,
        metavar="N",
        help="calibration images at most, drawn at random from a folder (default: as the recipe's paper)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")


def quantization(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `tvm_vitq.quantize`."""
    return {
        "bits": arguments.bits,
        "budget": arguments.budget,
        "recipe": arguments.recipe,
        "calibration": calibration(arguments.calibration),
        "calibration_count": arguments.calibration_count,
        "checkpoint": arguments.checkpoint,
        "pretrained": arguments.pretrained,
        "input_shape": arguments.input_shape,
        "batch": arguments.batch,
        "overrides": dict(_override(text) for text in arguments.override) or None,
        "plan": arguments.from_plan,
        "requantize": arguments.requantize,
        "strict": arguments.strict,
        "seed": arguments.seed,
        "progress": not arguments.json,
    }


def refuse_quantization(arguments: argparse.Namespace) -> None:
    """VitqError if an option of quantization was given for a model that is quantized already."""
    fresh = argparse.ArgumentParser()
    add_quantization(fresh)
    for name, default in vars(fresh.parse_args([])).items():
        if getattr(arguments, name) != default:
            raise VitqError(
                "the model is quantized already",
                where=f"--{name.replace('_', '-')}",
                got=getattr(arguments, name),
                fix="give the option to `vitq quantize`, or build from the float model",
            )


def calibration(text: str) -> Any:
    """What `--calibration` means: None, an array, or a folder."""
    if text == "none":
        return None
    if text == "refmodel":
        from tvm_vitq import refmodels

        return refmodels.calibration_images()
    if text.endswith(".npy"):
        import numpy as np

        try:
            with open(text, "rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise VitqError(
                "cannot read the calibration images",
                where=text,
                got=getattr(error, "strerror", None) or error,
                expected="a file of numpy.save with float32 (N, 3, H, W), already normalized",
                fix="check the path, and write it again with numpy.save(path, images)",
            ) from error
    return text


def add_threads(parser: argparse.ArgumentParser) -> None:
    """--threads, as Library.num_threads."""
    parser.add_argument("--threads", type=int, default=0, help="threads per call (default: one per core)")


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 3,224,224") from None


def _override(text: str) -> tuple[str, Any]:
    site, _, spec = text.partition("=")
    try:
        return site, json.loads(spec)
    except json.JSONDecodeError as error:
        raise VitqError(
            "malformed override",
            where="--override",
            got=text,
            expected='SITE=BITS or SITE={"bits": 8, "granularity": "group", "group_size": 32}',
        ) from error
