"""Layers on VTA by the cycle model: share of the ceiling, what contexts are worth, what residual sums cost.

python benchmarks/vta.py                      # layers of DeiT-T, -S and -B
python benchmarks/vta.py --library deit.so    # and the launches of a library built for VTA

Every size is a layer of its own, 197 tokens, with shifts and limits to int8 as requantization, its tile the
best of `--trials` by the cycle model. The ceiling of a layer of K inputs counts for 16 results K / 16
products, a reset, a shift and two limits; of one that adds to the residual stream a reset, four digits, two
shifts, and three more for the bytes of the sum. The same tile in one context has all stages wait for each
other. q.kT leaves as sums, in three bytes, so that its stores bind it; in its launch the layer of q, k and v
is computed meanwhile. No machine is measured: cycles are the same wherever this runs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import tvm_vitq
from tvm_vitq.numerics import WIDE_MAX, Output
from tvm_vitq.sweep_tables import markdown_table
from tvm_vitq.vta.launches.heads import Heads
from tvm_vitq.vta.launches.linear import Conversion, conversion, linear_launch, whole_sums
from tvm_vitq.vta.launches.residual import Residual
from tvm_vitq.vta.launches.scores import Scores
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.stream.choice import Choice, Schedule

TOKENS = 197
HEAD = 64
WIDTHS = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}
OPERATIONS = {"codes": 4, "sums": 4, "stream": 10}
"""Cycles of the ceiling beside products, for 16 results of each kind."""


@dataclass(frozen=True)
class Case:
    """A layer: inputs, outputs, and what its sums become: "codes", "sums" or "stream"."""

    name: str
    depth: int
    count: int
    becomes: str = "codes"


def cases() -> list[Case]:
    """The matmuls of the models."""
    found = [Case("q.kT of a head", HEAD, TOKENS, "sums")]
    for model, width in WIDTHS.items():
        sizes = {"qkv": (width, 3 * width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
        found += [Case(f"{model} {name}", *size) for name, size in sizes.items()]
        found += [Case(f"{model} proj", width, width), Case(f"{model} patch_embed", 768, width)]
        found += [
            Case(f"{model} {name} and the stream", depth, width, "stream")
            for name, depth in (("proj", width), ("fc2", 4 * width))
        ]
    return list(dict.fromkeys(found))


def made(case: Case, weight: np.ndarray, config: VtaConfig) -> Conversion:
    """What happens to the sums; shifts of two channels in three are equal."""
    rng = np.random.default_rng(1)
    bias = rng.integers(-(2**14), 2**14, case.count).astype(np.int32)
    if case.becomes == "sums":
        return Conversion(whole_sums(case.count, case.depth * 128**2), "int32", False)
    smaller = rng.random(case.count) < 1 / 3
    if case.becomes == "codes":
        multiplier = np.where(smaller, 2.0**-9, 2.0**-10)
        return conversion(weight, bias, multiplier, np.zeros(1), Output("int8", -128, 127, "shift"))
    multiplier = np.where(smaller, 0.5, 0.25)
    wide = Output("int32", -WIDE_MAX, WIDE_MAX, "shift")
    return Residual.of(weight, bias, multiplier, wide, config.block).conversion


def measure(case: Case, config: VtaConfig, trials: int) -> dict[str, str]:
    """A row of the table."""
    blocks = case.depth / config.block
    ceiling = blocks / (blocks + OPERATIONS[case.becomes])
    weight = np.random.default_rng(0).integers(-127, 128, (case.count, case.depth)).astype(np.int8)
    found: list[Choice] = []
    linear_launch(case.name, TOKENS, weight, made(case, weight, config), config, found.append)
    (product,) = found
    return row(case.name, f"{case.depth}", product, TOKENS * weight.size, ceiling, trials, config)


def measure_scores(model: str, width: int, config: VtaConfig, trials: int) -> dict[str, str]:
    """The row of the launch in front of the softmax: the layer of q, k and v, and the scores of all heads."""
    heads = Heads(1, width // HEAD, TOKENS, HEAD, config.block)
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (3 * width, width)).astype(np.int8)
    to = made(Case(model, width, 3 * width), weight, config).epilogue
    scores = Scores(f"{model} qkv and q.kT", heads, weight, to, False, config)
    layer, products = TOKENS * weight.size, TOKENS**2 * width
    needed = sum(
        macs * (depth / config.block + OPERATIONS["codes"]) / (depth / config.block)
        for macs, depth in ((layer, width), (products, HEAD))
    )
    macs = layer + products
    return row(scores.name, f"{width}, {HEAD}", scores, macs, macs / needed, trials, config)


def row(
    name: str, depth: str, choice: Choice, macs: int, ceiling: float, trials: int, config: VtaConfig
) -> dict[str, str]:
    """Of the best schedule: every better one that is found leads to others."""
    best, tried = choice.schedule, [choice.schedule]
    fewest, options = choice.cycles(best), choice.options(best)
    while len(tried) <= trials and (option := next((o for o in options if o not in tried), None)):
        tried.append(option)
        cycles = choice.cycles(option)
        if cycles < fewest:
            best, fewest, options = option, cycles, choice.options(option)
    utilization = macs / config.block**2 / fewest
    return {
        "layer": name,
        "K": depth,
        "cycles": f"{fewest:,}",
        "utilization": f"{utilization:.1%}",
        "ceiling": f"{ceiling:.1%}",
        "share": f"{utilization / ceiling:.1%}",
        "one context": f"{choice.cycles(in_one_context(best)) / fewest:.2f}",
    }


def in_one_context(schedule: Schedule) -> Schedule:
    """The same tiles, and nothing that overlaps."""
    return {
        key: in_one_context(value) if isinstance(value, dict) else 1 if key == "contexts" else value
        for key, value in schedule.items()
    }


def show(rows: list[dict[str, str]]) -> None:
    """A table."""
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="*", metavar="PART", help="only layers whose name has one of these")
    parser.add_argument("--trials", type=int, default=150, help="tiles for each layer (default: 150)")
    parser.add_argument("--library", help="a library file built for VTA")
    options = parser.parse_args()
    config = VtaConfig()
    chosen = [
        case for case in cases() if not options.layers or any(part in case.name for part in options.layers)
    ]
    rows = [measure(case, config, options.trials) for case in tqdm(chosen, unit="layer")]
    for model, width in WIDTHS.items():
        if not options.layers or any(part in f"{model} qkv and q.kT" for part in options.layers):
            rows.append(measure_scores(model, width, config, options.trials))
    print(f"{config.text}, {TOKENS} tokens\n")
    show(rows)
    if options.library:
        report = tvm_vitq.load_library(options.library).report["vta"]
        print(f"\n{options.library}: {report['cycles']:,} cycles, {report['utilization']:.1%} of peak\n")
        show(
            [
                {
                    "launch": row["name"],
                    "MACs": f"{row['macs']:,}",
                    "cycles": f"{row['cycles']:,}",
                    "utilization": f"{row['utilization']:.1%}",
                    "schedule": row["schedule"],
                }
                for row in report["launches"]
            ]
        )


if __name__ == "__main__":
    main()
