"""Kernels with operands and the results that numerics gives, for the tests of every instruction set."""

from __future__ import annotations

import numpy as np
from kernel_library import Case

from tvm_vitq import numerics as nm
from tvm_vitq import numerics_attention as na
from tvm_vitq.integerize.attention import probabilities
from tvm_vitq.numerics import Multiples, Output, Partial
from tvm_vitq.numerics_attention import Probabilities
from tvm_vitq.schedules.attention import Attention, View
from tvm_vitq.schedules.isa import Tile
from tvm_vitq.schedules.layer_norm import LayerNorm
from tvm_vitq.schedules.linear import Linear
from tvm_vitq.schedules.weight_planes import WeightPlanes

CODES = Output("int8", -128, 127)
INDEX = Output("uint16", 0, 4095)
WIDE = Output("int32")
LOGITS = Output("float32")

LINEARS = {
    # name: (m, n, k), options of the kernel
    "one": ((1, 1, 1), {"out": CODES}),
    "row": ((1, 100, 192), {"out": LOGITS}),
    "tails": ((5, 17, 27), {"out": CODES, "zero_point": "scalar"}),
    "odd": ((13, 33, 100), {"out": CODES, "zero_point": "vector"}),
    "panels": ((7, 144, 64), {"out": Output("int8", -8, 7), "zero_point": "scalar"}),
    "blocks": ((50, 48, 32), {"out": CODES, "tile": Tile(4, 32, 12)}),
    "tile64": ((9, 80, 48), {"out": CODES, "tile": Tile(2, 64)}),
    "shift": ((6, 20, 40), {"out": Output("int8", -128, 127, "shift"), "zero_point": "scalar"}),
    "lookup": ((11, 40, 72), {"out": INDEX, "lookup": "int8", "zero_point": "scalar"}),
    "lookup_late": ((30, 64, 96), {"out": INDEX, "lookup": "int8", "zero_point": "vector"}),
    "lookup_deep": ((31, 112, 208), {"out": INDEX, "lookup": "int8", "zero_point": "scalar"}),
    "lookup_wide": ((3, 32, 16), {"out": INDEX, "lookup": "int32", "zero_point": "vector"}),
    "codes": (
        (30, 64, 96),
        {"out": INDEX, "lookup": "int32", "codes": Output("int8", -8, 7), "zero_point": "scalar"},
    ),
    "codes_tail": (
        (7, 90, 16),
        {
            "out": INDEX,
            "lookup": "int32",
            "codes": CODES,
            "groups": 1,
            "multiples": True,
            "zero_point": "scalar",
        },
    ),
    "residual": ((10, 50, 96), {"out": WIDE, "residual": True}),
    "groups": ((7, 18, 80), {"out": CODES, "groups": 5, "zero_point": "scalar"}),
    "groups_tail": ((4, 16, 36), {"out": WIDE, "groups": 3, "residual": True}),
    "multiples": ((13, 130, 80), {"out": CODES, "groups": 5, "multiples": True, "zero_point": "scalar"}),
    "multiples_tail": ((7, 18, 36), {"out": WIDE, "groups": 3, "multiples": True, "residual": True}),
    "multiples_lookup": (
        (31, 100, 208),
        {"out": INDEX, "groups": 13, "multiples": True, "lookup": "int8", "zero_point": "scalar"},
    ),
    "packed4": ((13, 130, 100), {"out": CODES, "zero_point": "scalar", "planes": WeightPlanes(4, 3)}),
    "packed3": ((9, 112, 72), {"out": WIDE, "residual": True, "planes": WeightPlanes(3, 4)}),
    "packed2": ((7, 18, 36), {"out": WIDE, "groups": 3, "planes": WeightPlanes(2, 5)}),
    "packed7": (
        (31, 150, 208),
        {"out": INDEX, "lookup": "int8", "zero_point": "scalar", "planes": WeightPlanes(7, 0)},
    ),
    "packed5": ((50, 48, 32), {"out": CODES, "tile": Tile(4, 32, 12), "planes": WeightPlanes(5, 2)}),
    "rows": ((9, 30, 48), {"out": CODES, "groups": 1, "row_scales": True, "row_zero_points": True}),
}


def linear_case(
    name: str, target: str, shape: tuple[int, int, int], options: dict, extreme: bool = False
) -> Case:
    m, n, k = shape
    rng = np.random.default_rng(shape)
    spec = Linear(target, m, n, k, **options)
    x, weight = rng.integers(-128, 128, (m, k)), rng.integers(-127, 128, (n, k))
    if extreme:
        x, weight = np.full((m, k), -128), np.where(np.arange(n) % 2, 127, -127)[:, None] + np.zeros((1, k))
    x, weight = x.astype(np.int8), weight.astype(np.int8)
    if planes := options.get("planes"):
        weight = (rng.integers(0, 2**planes.bits, (n, k)) << planes.shift) - rng.integers(1, 128, (n, 1))
        weight = weight.astype(np.int8)
        assert WeightPlanes.of(weight) == planes or n == 1
    bias = rng.integers(-5000, 5000, n).astype(np.int32)
    span = 2048 if options["out"] is INDEX else 2e6 if options["out"] is WIDE else 100
    spread = 5000 * np.sqrt(k)
    multiplier = (rng.uniform(0.5, 1, n) * span / spread).astype(np.float32)
    if options["out"].kind == "shift":
        multiplier = np.exp2(-rng.integers(0, 16, n)).astype(np.float32)
    zero = {"none": 0, "scalar": 5, "vector": rng.integers(-9, 9, n)}[options.get("zero_point", "none")]
    zero = zero + (2048 if options["out"] is INDEX else 0)
    inner: Partial | Multiples | None = None
    if options.get("multiples"):
        inner = Multiples(rng.integers(1, 64, (options["groups"], n)).astype(np.int16))
        multiplier = (multiplier / 32).astype(np.float32)
    elif groups := options.get("groups", 0):
        inner = Partial(
            rng.uniform(0.1, 2, (groups, n)).astype(np.float32),
            rng.integers(-2000, 2000, (groups, n)).astype(np.int32),
        )
        if options.get("row_scales"):
            sums = weight.reshape(n, groups, -1).sum(-1, dtype=np.int32).T
            rows = rng.uniform(0.5, 2, m).astype(np.float32), rng.integers(-128, 128, m).astype(np.int32)
            inner = Partial(inner.multiplier, inner.bias, *rows, sums)
    inputs = [x]
    expected = nm.int_linear(x, weight, bias, multiplier, zero, options["out"], inner)
    if dtype := options.get("lookup"):
        inputs.append(rng.integers(-128, 128, 4096).astype(dtype))
        index = expected
        expected = nm.int_lookup(index, inputs[-1])
    packed = spec.pack(weight, bias, multiplier, zero, inner)
    if codes := options.get("codes"):
        inputs[-1] = rng.integers(-(2**20), 2**20, 4096).astype(np.int32)
        expected = nm.int_lookup(index, inputs[-1])
        conversion = (rng.uniform(1, 200, n) * 2.0**-20).astype(np.float32), rng.integers(-9, 9, n)
        expected = nm.int_requantize(expected, *conversion, np.int32(0), codes)
        packed += spec.pack_codes(*conversion)
    if options.get("residual"):
        inputs.append(rng.integers(-nm.WIDE_MAX, nm.WIDE_MAX, (m, n)).astype(np.int32))
        expected = nm.int_add(expected, inputs[-1])
    return Case(name, spec, inputs, packed, expected)


def layer_norm_case(name: str, m: int, c: int, out: Output) -> Case:
    rng = np.random.default_rng(c)
    x = (rng.integers(-(2**20), 2**20, (m, c)) + rng.integers(-(2**22), 2**22, (m, 1))).astype(np.int32)
    x[0] = nm.WIDE_MAX * np.where(np.arange(c) % 2, 1, -1)
    x[1:2] = 77
    gain, offset = rng.integers(-(2**13), 2**13, c), rng.integers(-(2**20), 2**20, c)
    constants = {"shift": 17 if out is CODES else 8, "epsilon": 9}
    spec = LayerNorm(m, c, out)
    arrays = spec.pack(gain, offset, constants["shift"], constants["epsilon"])
    expected = nm.int_layer_norm(x, arrays[0], arrays[1], out=out, **constants)
    return Case(name, spec, [x], arrays, expected)


def book(
    levels: int, keys: int, largest: int = 2**15, *, relative: bool = False, zero: int = 0, least: int = 0
) -> Probabilities:
    """A codebook with random edges, some of them next to each other, and ascending values."""
    rng = np.random.default_rng(levels)
    edges = np.unique(np.concatenate([rng.integers(1, 2**16, 3 * levels), [1, 2, 3, 2**16 - 1]]))
    edges = np.sort(rng.permutation(edges)[: levels - 1])[::-1].astype(np.int32)
    values = np.sort(rng.integers(least, largest + 1, levels)).astype(np.uint16)
    values[[0, -1]] = least, largest
    tables = {"edges": edges, "values": values}
    guard = na.exp2_guard_bits(keys)
    return Probabilities("codebook", largest, guard=guard, zero=zero, relative=relative, **tables)


def attention_case(
    name: str,
    target: str,
    shape: tuple[int, int, int, int, int, int],
    *,
    kind: str = "softmax",
    bits: int = 8,
    extreme: bool = False,
    additive: tuple[tuple[int, int, int], ...] = (),
    out: Output = CODES,
    step: float | None = 0.0,
    spread: float = 4.0,
    probs: Probabilities | None = None,
) -> Case:
    """q, k and v side by side in one matrix if there are as many queries as keys, else q by itself. `step` of
    the probabilities: 0 is 1 / largest code, None relative to the row. `probs` is instead of kind, bits and
    step.
    """
    b, h, tq, tk, d, dv = shape
    largest = 2**bits - 1
    probs = probs or probabilities(kind, bits, 1 / largest if step == 0 else step, tk, name)
    rng = np.random.default_rng(tk)

    def codes(*size: int) -> np.ndarray:
        return np.full(size, -128, np.int8) if extreme else rng.integers(-128, 128, size).astype(np.int8)

    q, k, v = codes(b, h, tq, d), codes(b, h, tk, d), codes(b, h, tk, dv)
    flat = [a.transpose(0, 2, 1, 3).reshape(b * a.shape[2], -1) for a in (q, k, v)]
    if tq == tk:
        sources = [np.concatenate(flat, 1)]
        views = [View(0, 0, d, tq), View(0, h * d, d, tq), View(0, 2 * h * d, dv, tq)]
    else:
        sources = [flat[0], np.concatenate(flat[1:], 1)]
        views = [View(0, 0, d, tq), View(1, 0, d, tk), View(1, h * d, dv, tk)]
    zeros = [rng.integers(-128, 128, h).astype(np.int32) for _ in range(3)]
    score = np.full(h, 4096 * spread / (d**0.5 * 5000), np.float32) * rng.uniform(0.5, 1, h).astype(
        np.float32
    )
    total = 1 if probs.by_row else probs.qmax * (1 if probs.kind == "softmax" else tk)
    total = total / 2**16 if out is WIDE and probs.kind == "codebook" else total
    multiplier = (rng.uniform(0.5, 1, h) / total).astype(np.float32)
    if out.kind == "shift":
        multiplier = np.exp2(np.round(np.log2(multiplier))).astype(np.float32)
    terms = tuple(rng.integers(-(2**14), 2**14, (*size, tk)).astype(np.int32) for size in additive)
    spec = Attention(target, *shape, tuple(s.shape for s in sources), *views, probs, out, additive)
    arrays = spec.pack(score, multiplier, *zeros, 3, terms)
    # Windows follow each other: image i takes term i % nb.
    full = tuple(np.tile(t, (b // t.shape[0], 1, 1, 1)) for t in terms)
    names = dict(zip(("zero_q", "zero_k", "zero_v"), zeros, strict=True))
    o = na.int_attention(q, k, v, score, multiplier, full, **names, zero_point=3, probs=probs, out=out)
    return Case(name, spec, sources, arrays, o.transpose(0, 2, 1, 3).reshape(b * tq, h * dv))
