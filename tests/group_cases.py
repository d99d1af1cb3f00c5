"""Kernels of dynamic groups with operands and the results that numerics_groups gives."""

from __future__ import annotations

import numpy as np
from kernel_cases import CODES, INDEX, LOGITS, WIDE
from kernel_library import Case

from tvm_vitq import numerics as nm
from tvm_vitq import numerics_groups as ng
from tvm_vitq.numerics import Output
from tvm_vitq.numerics_groups import GroupQuantizers
from tvm_vitq.schedules.group_codes import GroupCodes
from tvm_vitq.schedules.group_linear import GroupLinear
from tvm_vitq.schedules.group_operands import codes_of, operands_of, table_of
from tvm_vitq.schedules.group_table import GroupLayout, GroupTable
from tvm_vitq.schedules.isa import Tile, isa

LINEARS = {
    # name: (images, tokens, n, k, groups, bits), options of the kernel
    "one": ((1, 1, 1, 1, 1, 8), {"out": CODES}),
    "tails": ((2, 5, 17, 27, 3, 4), {"out": CODES, "zero_point": "scalar"}),
    "odd": ((1, 13, 33, 100, 8, 8), {"out": CODES, "zero_point": "vector"}),
    "more_groups_than_channels": ((3, 4, 20, 6, 12, 4), {"out": CODES}),
    "panels": ((2, 7, 144, 64, 4, 3), {"out": Output("int8", -8, 7), "zero_point": "scalar"}),
    "blocks": ((1, 50, 48, 32, 3, 8), {"out": CODES, "tile": Tile(4, 32, 12)}),
    "lookup": ((2, 11, 40, 72, 5, 8), {"out": INDEX, "lookup": "int8", "zero_point": "scalar"}),
    "lookup_deep": ((1, 31, 112, 208, 8, 8), {"out": INDEX, "lookup": "int8", "zero_point": "scalar"}),
    "residual": ((2, 10, 50, 96, 4, 8), {"out": WIDE, "residual": True}),
    "logits": ((4, 1, 100, 48, 8, 8), {"out": LOGITS}),
}


def quantizers_of(
    images: int, tokens: int, k: int, groups: int, bits: int
) -> tuple[np.ndarray, GroupQuantizers]:
    """A wide tensor [images * tokens, k] with channels of very different ranges, and bounds that suit it; one
    group is chosen by no channel where there are several.
    """
    rng = np.random.default_rng((images, tokens, k, groups))
    spread, middle = 2.0 ** rng.uniform(8, 22, k), 2.0 ** rng.uniform(8, 20, k) * rng.choice([-1, 1], k)
    x = np.clip(rng.normal(middle, spread, (images * tokens, k)), -nm.WIDE_MAX, nm.WIDE_MAX).astype(np.int32)
    x[0, 0] = nm.WIDE_MAX
    picked = rng.integers(0, k, groups)
    low, high = x[:tokens].min(0)[picked], x[:tokens].max(0)[picked] + 3
    if groups > 1:
        low[-1], high[-1] = -nm.WIDE_MAX, -nm.WIDE_MAX + 7
    step = (high.astype(np.float64) - low) / (2**bits - 1)
    zero = np.clip(np.rint(-low / step), -1000, 1000).astype(np.int32) - 2 ** (bits - 1)
    multiplier = (1 / step).astype(np.float32)
    ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return x, GroupQuantizers(tokens, low, high, multiplier, zero, *ends)


def written(layout: GroupLayout) -> np.ndarray:
    """Entries of a table that mean something."""
    parts = [(layout.order, layout.positions), (layout.starts, layout.groups + 1)]
    parts += [(start, layout.k) for start in (layout.multiplier, layout.zero)]
    return np.concatenate([np.arange(start, start + count) for start, count in parts])


def table_case(name: str, target: str, shape: tuple) -> Case:
    images, tokens, _, k, groups, bits = shape
    x, quantizers = quantizers_of(images, tokens, k, groups, bits)
    spec = GroupTable(target, len(x), k, tokens, groups)
    expected = table_of(ng.int_assign(x, quantizers), quantizers, spec.layout)
    return Case(name, spec, [x], spec.pack(quantizers), expected)


def codes_case(name: str, target: str, shape: tuple) -> Case:
    """`expected` holds 0 in padding."""
    images, tokens, _, k, groups, bits = shape
    x, quantizers = quantizers_of(images, tokens, k, groups, bits)
    spec = GroupCodes(target, len(x), k, tokens, groups, quantizers.codes)
    table = table_of(ng.int_assign(x, quantizers), quantizers, spec.layout)
    return Case(name, spec, [x, table], [], codes_of(x, table, quantizers, spec.layout, isa(target)))


def group_linear_case(name: str, target: str, shape: tuple, options: dict) -> Case:
    images, tokens, n, k, groups, bits = shape
    x, quantizers = quantizers_of(images, tokens, k, groups, bits)
    rng = np.random.default_rng(shape)
    weight = rng.integers(-127, 128, (n, k)).astype(np.int8)
    bias = rng.integers(-5000, 5000, n).astype(np.int32)
    scale = (rng.uniform(0.5, 1, (groups, n)) / quantizers.multiplier[:, None] / 2**8).astype(np.float32)
    unscaled = ng.int_group_linear(x, weight, 0 * bias, np.ones(1), 0, WIDE, quantizers, scale)
    scale *= np.float32(2e6 / np.abs(unscaled).max())
    span = 2048 if options["out"] is INDEX else 2e6 if options["out"] is WIDE else 100
    multiplier = (rng.uniform(0.5, 1, n) * span / 4e6).astype(np.float32)
    zero = {"none": 0, "scalar": 5, "vector": rng.integers(-9, 9, n)}[options.get("zero_point", "none")]
    zero = zero + (2048 if options["out"] is INDEX else 0)
    spec = GroupLinear(target, len(x), n, k, tokens=tokens, choices=groups, **options)
    inputs = operands_of(spec, x, quantizers)
    arrays = spec.pack_groups(weight, bias, multiplier, zero, scale, quantizers.zero_point)
    expected = ng.int_group_linear(x, weight, bias, multiplier, zero, options["out"], quantizers, scale)
    if dtype := options.get("lookup"):
        inputs.append(rng.integers(-128, 128, 4096).astype(dtype))
        expected = nm.int_lookup(expected, inputs[-1])
    if options.get("residual"):
        inputs.append(rng.integers(-nm.WIDE_MAX, nm.WIDE_MAX, (len(x), n)).astype(np.int32))
        expected = nm.int_add(expected, inputs[-1])
    return Case(name, spec, inputs, arrays, expected)
