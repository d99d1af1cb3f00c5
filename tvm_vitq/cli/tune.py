"""`vitq tune`."""

from __future__ import annotations

import argparse

from tvm_vitq.cli import options
from tvm_vitq.cli.outcome import Outcome

HELP = "search schedules for a model's kernels on the device that they are for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, target, budget, where to measure, and everything that `tvm_vitq.quantize` takes."""
    parser.add_argument("model", metavar="MODEL", help=f".vitq file of `vitq quantize`, {options.MODEL_HELP}")
    parser.add_argument("-t", "--target", default="llvm", help="see `vitq build` (default: this machine)")
    parser.add_argument("--trials", type=int, default=64, help="candidates in all (default: 64)")
    parser.add_argument("--seconds", type=float, metavar="S", help="end after S seconds, if that is earlier")
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="folder of records (default: ./tuning_logs, where `vitq build` finds them)",
    )
    parser.add_argument(
        "--runner",
        default="local",
        help="local (default), or rpc://HOST:PORT/KEY: devices behind a TVM RPC tracker",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an earlier run")
    options.add_threads(parser)
    options.add_quantization(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """See tvm_vitq.tune; exit code 1 if a candidate gave a wrong result."""
    import tvm_vitq
    from tvm_vitq.artifacts import is_artifact, open_model
    from tvm_vitq.render import tuning_text
    from tvm_vitq.targets import parse
    from tvm_vitq.tuning.run import read_runner

    profile = parse(arguments.target)
    if not profile.vta:
        read_runner(arguments.runner, profile)  # told before the long work
    if is_artifact(arguments.model):
        options.refuse_quantization(arguments)
        quantized = open_model(arguments.model)
    else:
        quantized = tvm_vitq.quantize(arguments.model, **options.quantization(arguments))
    found = tvm_vitq.tune(
        quantized,
        arguments.target,
        trials=arguments.trials,
        seconds=arguments.seconds,
        work_dir=arguments.work_dir,
        runner=arguments.runner,
        threads=arguments.threads,
        resume=arguments.resume,
        seed=arguments.seed,
        progress=not arguments.json,
    )
    return Outcome(found, tuning_text(found), passed=not found["wrong"])
