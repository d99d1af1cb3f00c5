"""`vitq eval`."""

from __future__ import annotations

import argparse

from tvm_vitq.cli import options
from tvm_vitq.cli.outcome import Outcome

HELP = "top-1 accuracy of libraries, quantized models (NumPy reference) and float models on the same images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, on which images, and thresholds."""
    parser.add_argument(
        "subjects",
        nargs="+",
        metavar="X",
        help="library (.so), quantized model (.vitq), or float model (timm name, refmodel:...); thresholds "
        "apply to the first; what came from a refmodel: is compared with that by itself",
    )
    parser.add_argument(
        "--data",
        required=True,
        help="refmodel (test images of the reference models), folder with one folder per class, or .npz file "
        "with arrays images and labels",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="images used at most, evenly spread")
    parser.add_argument("--emulate", action="store_true", help="run AArch64 libraries under qemu")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of the float model")
    parser.add_argument("--pretrained", action="store_true", help="let timm fetch the float model's weights")
    parser.add_argument("--min-top1", type=float, metavar="PERCENT", help="fail below this accuracy")
    parser.add_argument(
        "--max-drop", type=float, metavar="POINTS", help="fail if this much below the float model"
    )
    parser.add_argument(
        "--recipes",
        metavar="A,B",
        help="quantize the float models named with each of these recipes (or: all) at each of --bits, and "
        "compare float, simulation and compiled program",
    )
    parser.add_argument("--bits", default="w8a8", metavar="W,X", help="widths of --recipes: w8a8,w4a4")
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="calibration images of --recipes: folder (ImageNet's train/), .npy file, refmodel",
    )
    options.add_drawing(parser)
    parser.add_argument(
        "--classes", metavar="FILE", help="folder name of every class, one a line, in the model's order"
    )
    parser.add_argument("--batch", type=int, default=8, help="images per call of the programs of --recipes")
    parser.add_argument(
        "--no-latency",
        action="store_true",
        help="measure no latency of --recipes: it needs one more build",
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the tables of --recipes to a file")
    parser.add_argument(
        "--store", metavar="FILE", help="keep finished rows of --recipes, and resume from them"
    )
    parser.add_argument("--exact", action="store_true", help="fail unless integer results agree in every bit")


def run(arguments: argparse.Namespace) -> Outcome:
    """See tvm_vitq.comparison; with recipes, tvm_vitq.sweep."""
    if arguments.recipes:
        return _sweep(arguments)
    from tvm_vitq.comparison import compare
    from tvm_vitq.render import comparison_text

    found = compare(
        arguments.subjects,
        arguments.data,
        limit=arguments.limit,
        emulate=arguments.emulate,
        checkpoint=arguments.checkpoint,
        pretrained=arguments.pretrained,
        class_list=arguments.classes,
        progress=not arguments.json,
    )
    passed = found.meets(min_top1=arguments.min_top1, max_drop=arguments.max_drop, exact=arguments.exact)
    return Outcome(found.to_json(), comparison_text(found), passed)


def _sweep(arguments: argparse.Namespace) -> Outcome:
    import dataclasses

    from tvm_vitq.files import written_whole
    from tvm_vitq.sweep import sweep
    from tvm_vitq.sweep_tables import markdown, text

    rows = list(
        sweep(
            arguments.subjects,
            arguments.bits.split(","),
            arguments.recipes.split(","),
            arguments.data,
            calibration=options.calibration(arguments.calibration or "none"),
            calibration_count=arguments.calibration_count,
            seed=arguments.seed,
            class_list=arguments.classes,
            limit=arguments.limit,
            batch=arguments.batch,
            store=arguments.store,
            latency=not arguments.no_latency,
            progress=not arguments.json,
            checkpoint=arguments.checkpoint,
            pretrained=arguments.pretrained,
        )
    )
    if arguments.markdown:
        with written_whole(arguments.markdown) as part:
            part.write_text(markdown(rows), encoding="utf-8")
    return Outcome([dataclasses.asdict(row) for row in rows], text(rows))
