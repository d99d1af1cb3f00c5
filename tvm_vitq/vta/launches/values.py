"""Launches behind the softmax: products of probabilities with v, and the layer behind them.

    layer    ``p v`` of each head, as codes, and the layer
    values   ``p v`` of each head, where these become no codes by shifts

Sums leave in 3 or 4 bytes: their scales are real numbers, or differ by row. Zero points are the host's: it
adds a term to each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_vitq.numerics import Array
from tvm_vitq.vta.launches.heads import Heads, Values, columns_of
from tvm_vitq.vta.launches.linear import Conversion, Layer, whole_sums
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.stream.assembler import Assembler
from tvm_vitq.vta.stream.choice import Choose
from tvm_vitq.vta.stream.epilogue import Epilogue, Rows
from tvm_vitq.vta.stream.launch import Launch
from tvm_vitq.vta.stream.matmul import Product
from tvm_vitq.vta.stream.operand import Operand


def values_launch(
    name: str,
    heads: Heads,
    v: Values,
    passes: int,
    largest: int,
    config: VtaConfig,
    choose: Choose | None = None,
) -> Launch:
    """Bytes of p, int8 [batch * heads, tokens, tokens] each, the highest first, to the sums of ``p v``, int32
    [batch, tokens, channels], which are of at most `largest` in magnitude.
    """
    block = config.block
    shape = (heads.batch * heads.heads, heads.tokens, heads.tokens)
    ps = [Operand.made(f"{name} p {n}", shape, "int8", block) for n in range(passes)]
    sum_ = whole_sums(heads.wide, largest)
    out = Operand.made(
        f"{name} sums",
        (heads.batch, heads.tokens, heads.channels),
        "int32",
        block,
        sum_.planes,
        written=False,
    )
    out = replace(out, order=tuple(v.order.tolist()))
    assembler = Assembler(config)
    for image in range(heads.batch):
        for head in range(heads.heads):
            lefts = [p.matrices(image * heads.heads + head, block)[0] for p in ps]
            right = v.head(image, head, heads)
            outs = [columns_of(m, head * heads.wide, heads.wide, block) for m in out.matrices(image, block)]
            Product(assembler, lefts, right, outs, sum_, None, heads.tokens, name, choose=choose).emit()
    macs = heads.batch * heads.tokens**2 * heads.heads * heads.width
    return Launch(assembler.finish(), ps, [out], macs)


def layer_launch(
    name: str,
    heads: Heads,
    v: Values,
    passes: int,
    codes: Sequence[Epilogue],
    weight: Array,
    made: Conversion,
    config: VtaConfig,
    choose: Choose | None = None,
) -> Launch:
    """The sums of ``p v`` become codes, which are a layer's inputs and never leave the device: bytes of p as
    of `values_launch`, what is added to each row's sums, int32 [batch * heads, tokens], and int32
    [batch, tokens, N] of a residual sum (`residual`), to the layer's result [batch, tokens, N].

    Parameters
    ----------
    codes : of each head, without a bias;  weight : int8 [N, heads width];  made : of the layer.
    """
    block = config.block
    shape = (heads.batch * heads.heads, heads.tokens, heads.tokens)
    ps = [Operand.made(f"{name} p {n}", shape, "int8", block) for n in range(passes)]
    terms = Operand.of_rows(f"{name} row terms", shape[0], heads.tokens, block)
    whole = (heads.batch, heads.tokens, heads.channels)
    middle = Operand.made(f"{name} input", whole, "int8", block, written=False)
    layer = Layer.of(name, _filled_up_inputs(weight, heads)[:, v.order], made, block)
    y, stream = layer.result(heads.batch, heads.tokens), layer.stream(heads.batch, heads.tokens)
    assembler = Assembler(config)
    held = -(-heads.tokens // block) * block
    for image in range(heads.batch):
        (inputs,) = middle.matrices(image, block)
        for head in range(heads.heads):
            number = image * heads.heads + head
            lefts = [p.matrices(number, block)[0] for p in ps]
            right = v.head(image, head, heads)
            out = columns_of(inputs, head * heads.wide, heads.wide, block)
            to_codes = replace(codes[head], bias=Rows(terms.planes[0], number * held), by_rows=True)
            Product(assembler, lefts, right, [out], to_codes, None, heads.tokens, name, choose=choose).emit()
        added = [matrix for operand in stream for matrix in operand.matrices(image, block)]
        layer.product(assembler, inputs, y.matrices(image, block), heads.tokens, choose, added).emit()
    macs = heads.batch * heads.tokens * (heads.tokens * heads.heads * heads.width + weight.size)
    return Launch(assembler.finish(), [*ps, terms, *stream], [y], macs)


def _filled_up_inputs(weight: Array, heads: Heads) -> Array:
    """Weights whose inputs are heads of whole blocks of channels."""
    each = weight.reshape(len(weight), heads.heads, heads.width)
    return np.pad(each, [(0, 0), (0, 0), (0, heads.wide - heads.width)]).reshape(len(weight), -1)
