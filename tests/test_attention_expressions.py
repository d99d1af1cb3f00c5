"""Attention as tensor expressions between matrix products that others do, against numerics_attention.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from tvm_vitq.numerics import Output
from tvm_vitq.numerics_attention import Probabilities, int_attention, int_exp2, int_log2, int_probabilities
from tvm_vitq.relax_passes import attention_expressions as expressions

HEADS, WIDTH, WIDE = 3, 12, 16

PROBABILITIES = {
    "softmax": Probabilities("softmax", 255, numerator=255 << 23, shift=23, guard=8),
    "row_maximum": Probabilities("row_maximum", 15, shift=27),
    "sigmoid": Probabilities("sigmoid", 255, table=(np.arange(2**14) >> 6).astype(np.uint8)),
    "log2": Probabilities(
        "codebook",
        2**15,
        guard=8,
        edges=(np.arange(15, 0, -1) * 4096 - 2048).astype(np.int32),
        values=np.array([0, *(1 << np.arange(1, 16))]).astype(np.uint16),
    ),
    "relative": Probabilities(
        "codebook",
        200,
        edges=np.array([30000, 9000, 4000, 100], np.int32),
        values=np.array([1, 3, 40, 100, 200], np.uint16),
        zero=3,
        relative=True,
    ),
}


def run(expression, info: dict[str, Any], *operands: np.ndarray) -> np.ndarray:
    """The compiled expression."""
    tensors = [te.placeholder(o.shape, str(o.dtype), name=f"operand{n}") for n, o in enumerate(operands)]
    result = expression(info, *tensors)
    function = te.create_prim_func([*tensors, result]).with_attr("global_symbol", "main")
    built = tvm.compile(tvm.IRModule({"main": function}), target=tvm.target.Target({"kind": "llvm"}))
    out = np.zeros([int(size) for size in result.shape], str(result.dtype))
    given = [tvm.runtime.tensor(o) for o in (*operands, out)]
    built["main"](*given)
    return given[-1].numpy()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", PROBABILITIES)
@pytest.mark.parametrize("out", [Output("int8", -128, 127), Output("int8", -8, 7, "shift")], ids=str)
def test_attention_in_pieces(kind, batch, out):
    probs = PROBABILITIES[kind]
    if probs.by_row and out.kind == "shift":
        out = Output("int8", -100, 100)  # a quotient by row is no shift
    rng = np.random.default_rng(batch)
    tokens = 37
    q, k, v = (rng.integers(-128, 128, (batch, HEADS, tokens, WIDTH)).astype(np.int8) for _ in range(3))
    zero_q, zero_k, zero_v, zero = (rng.integers(-9, 9, HEADS).astype(np.int32) for _ in range(4))
    score = rng.uniform(0.2, 0.5, HEADS).astype(np.float32)
    shift = rng.integers(5, 9, HEADS).astype(np.int32)
    multiplier = (2.0**-shift).astype(np.float32) if out.kind == "shift" else score / 40
    additive = (rng.integers(-9000, 9000, (1, HEADS, 1, tokens)).astype(np.int32),)
    expected = int_attention(
        *(q, k, v, score, multiplier, additive),
        zero_q=zero_q,
        zero_k=zero_k,
        zero_v=zero_v,
        zero_point=zero,
        probs=probs,
        out=out,
    )

    def rows(x: np.ndarray, wide: int = WIDTH) -> np.ndarray:
        """Heads side by side, filled up with zeros."""
        full = np.pad(x, [(0, 0), (0, 0), (0, 0), (0, wide - WIDTH)])
        return full.transpose(0, 2, 1, 3).reshape(batch, tokens, HEADS * wide)

    info = {
        "shape": (batch, HEADS, tokens, WIDTH),
        "probs": probs.kind,
        "prob_max": probs.qmax,
        "prob_zero": probs.zero,
        "numerator": probs.numerator,
        "shift": probs.shift,
        "guard": probs.guard,
        "relative": probs.relative,
        "out_dtype": "uint16" if probs.kind == "codebook" else "uint8",
    }
    acc = (q.astype(np.int32) @ k.astype(np.int32).swapaxes(-1, -2)).reshape(-1, tokens, tokens)
    codes = np.concatenate([rows(q, WIDE), rows(k, WIDE)], -1)
    t = run(expressions.int_scores, info, acc, codes, score, zero_q, zero_k, *additive)
    tables = [table for table in (probs.table, probs.edges, probs.values) if table is not None]
    p = run(expressions.int_probabilities, info, t, *tables)
    assert np.array_equal(p, int_probabilities(t, probs))
    arguments = [p, shift if out.kind == "shift" else multiplier, zero_v, zero]
    limits = {"kind": out.kind, "qmin": out.qmin, "qmax": out.qmax, "out_dtype": out.dtype}
    for negated in {False, probs.planes == 2 and probs.qmax <= expressions.NEGATED_MAX}:
        bytes_ = [run(expressions.int_byte, {"byte": n, "negated": negated}, p) for n in range(probs.planes)]
        whole = sum(part.astype(np.int32) << 8 * n for n, part in enumerate(bytes_))
        offset = 0 if negated else sum(expressions.BYTE_OFFSET << 8 * n for n in range(probs.planes))
        assert np.array_equal(whole, -p.astype(np.int32) if negated else p.astype(np.int32) - offset)
        how = {"offset": offset, "negated": negated, "by_row": probs.by_row}
        acc = rows(whole @ v.astype(np.int32), WIDE)
        codes = [rows(v, WIDE).swapaxes(1, 2).copy()] if offset != probs.zero else []
        result = run(expressions.int_values, {**info, **how, **limits}, acc, *arguments, *codes)
        assert np.array_equal(result, rows(expected))


@pytest.mark.parametrize("guard", [0, 5, 8])
def test_exponential(guard):
    d = np.arange(0, 2**17, 7, dtype=np.int32)
    found = run(lambda _, x: te.compute(x.shape, lambda i: expressions.int_exp2(x[i], guard)), {}, d)
    assert np.array_equal(found, int_exp2(d, guard))


def test_logarithm():
    x = np.unique(
        np.concatenate([np.arange(1, 5000), 2 ** np.arange(31), np.arange(1, 2**31, 999983)])
    ).astype(np.int32)
    found = run(lambda _, x: te.compute(x.shape, lambda i: expressions.int_log2(x[i])), {}, x)
    assert np.array_equal(found, int_log2(x))


def test_digits_of_negated_probabilities():
    p = np.arange(expressions.NEGATED_MAX + 1).astype(np.uint16).reshape(1, -1)
    low, high = (run(expressions.int_byte, {"byte": n, "negated": True}, p) for n in (0, 1))
    assert np.array_equal(256 * high.astype(int) + low, -p.astype(int))


def test_terms_of_rows():
    rng = np.random.default_rng(0)
    p = rng.integers(0, 2**15, (2, HEADS, 5, 5)).astype(np.uint16)
    zero_v, constant = rng.integers(-20, 20, (2, HEADS)).astype(np.int32)
    found = run(expressions.int_row_terms, {}, p, zero_v, constant)
    expected = p.sum(-1, dtype=np.int64) * zero_v[:, None] + constant[:, None]
    assert np.array_equal(found, expected.reshape(-1, 5))
