"""`vitq inspect`."""

from __future__ import annotations

import argparse

from tvm_vitq.cli.outcome import Outcome

HELP = "show what is in a quantized model, a compiled library or a plan; explains and plots every quantizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, which sites, and where plots go."""
    parser.add_argument("file", metavar="FILE", help="quantized model (.vitq), library (.so) or plan (.json)")
    parser.add_argument(
        "--site", metavar="PATTERN", help="only sites or layers of this name or pattern: 'blocks.0.*.weight'"
    )
    parser.add_argument(
        "--vta",
        action="store_true",
        help="list the instructions of a library for VTA, of the launches that --site names or of all",
    )
    parser.add_argument(
        "--plot",
        metavar="DIR",
        help="draw the distribution at each site with the levels of its quantizer: a folder with one PNG a "
        "block and an overview, or one FILE.png; needs matplotlib",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """See tvm_vitq.artifacts.describe and tvm_vitq.plotting.plot_plan."""
    from tvm_vitq.artifacts import describe, plan_of, vta_listing

    if arguments.vta:
        return Outcome(*vta_listing(arguments.file, arguments.site))
    if arguments.plot is None and arguments.site is None:
        data, text = describe(arguments.file)
        return Outcome(data, text)
    plan = plan_of(arguments.file)
    data, text = describe(arguments.file, arguments.site)
    if arguments.plot is not None:
        from tvm_vitq.plotting import plot_plan

        written = [str(path) for path in plot_plan(plan, arguments.plot, arguments.site)]
        data["plots"], text = written, "\n".join([text, *(f"plot  {path}" for path in written)])
    return Outcome(data, text)
