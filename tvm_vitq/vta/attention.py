"""Self-attention on VTA: two launches around the softmax, which is the host's.

    scores   q and k of the layer in front, ``q k.T`` of each head, and v transposed, which stays there
    values   ``p v`` of each head

Products leave as sums, in 3 or 4 bytes: their scales are real numbers, or differ by row. Zero points are the
host's as well; for them it gets the codes of q, k and v.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tvm_vitq.numerics import Array
from tvm_vitq.vta.assembler import Assembler
from tvm_vitq.vta.blocks import Matrix, constant_matrix
from tvm_vitq.vta.config import VtaConfig
from tvm_vitq.vta.matmul import Epilogue, Product
from tvm_vitq.vta.operand import Operand
from tvm_vitq.vta.program import Launch


@dataclass(frozen=True)
class Heads:
    """Sizes of self-attention.

    batch, heads, tokens : of images, heads, tokens;  width : channels of a head, of q, k and v alike.
    """

    batch: int
    heads: int
    tokens: int
    width: int

    @property
    def channels(self) -> int:
        """Of q, of k, of v."""
        return self.heads * self.width


def sums(count: int, largest: int) -> Epilogue:
    """Sums of at most `largest` in magnitude as they are, in as few bytes as hold them."""
    planes = next(n for n in (1, 2, 3, 4) if largest < 1 << (8 * n - 1))
    return Epilogue(None, np.zeros(count, np.int64), None, None, planes)


def scores_launch(
    name: str, heads: Heads, weight: Array, epilogue: Epilogue, config: VtaConfig
) -> tuple[Launch, Operand]:
    """Codes int8 [batch, tokens, C] to the sums of ``q k.T``, int32 [batch * heads, tokens, tokens], the
    codes of q and k, [batch, tokens, 2 channels], and those of v transposed, [batch, channels, tokens].

    Parameters
    ----------
    weight : int8 [3 channels, C], rows of q, k and v in this order, heads one behind the other;
    epilogue : of the layer, by channel.

    Returns
    -------
    The launch, and v, which `values_launch` reads.
    """
    block, channels = config.block, heads.channels
    x = Operand.made(f"{name} input", (heads.batch, heads.tokens, weight.shape[1]), "int8", block)
    qk = Operand.made(f"{name} q k", (heads.batch, heads.tokens, 2 * channels), "int8", block, written=False)
    v = Operand.made(f"{name} v", (heads.batch, channels, heads.tokens), "int8", block, written=False)
    sum_ = sums(heads.tokens, heads.width << 14)
    scores = Operand.made(
        f"{name} scores",
        (heads.batch * heads.heads, heads.tokens, heads.tokens),
        "int32",
        block,
        sum_.planes,
        written=False,
    )
    made = constant_matrix(f"{name} weight", weight, block)
    first, rest = (
        replace(
            epilogue, bias=None if epilogue.bias is None else epilogue.bias[part], shift=epilogue.shift[part]
        )
        for part in (slice(0, 2 * channels), slice(2 * channels, None))
    )
    assembler, cut, deep = Assembler(config), 2 * channels // block, made.columns
    for image in range(heads.batch):
        inputs, (both,) = x.matrices(image, block), qk.matrices(image, block)
        right = made.part(slice(0, cut), slice(0, deep))
        Product(assembler, inputs, right, [both], first, None, heads.tokens, f"{name} q k").emit()
        for head in range(heads.heads):
            q, k = (_columns(both, start + head * heads.width, heads.width, block) for start in (0, channels))
            out = scores.matrices(image * heads.heads + head, block)
            Product(assembler, [q], k, out, sum_, None, heads.tokens, f"{name} scores").emit()
        left = made.part(slice(cut, made.rows), slice(0, deep))
        by_rows = replace(rest, by_rows=True)
        Product(
            assembler, [left], inputs[0], v.matrices(image, block), by_rows, None, channels, f"{name} v"
        ).emit()
    macs = heads.batch * heads.tokens * (weight.size + heads.tokens * channels)
    return Launch(assembler.finish(), [x], [scores, qk, v], macs), v


def values_launch(name: str, heads: Heads, v: Operand, passes: int, config: VtaConfig) -> Launch:
    """Bytes of p, int8 [batch * heads, tokens, tokens] each, the highest first, to the sums of ``p v``, int32
    [batch, tokens, channels].
    """
    block = config.block
    shape = (heads.batch * heads.heads, heads.tokens, heads.tokens)
    ps = [Operand.made(f"{name} p {n}", shape, "int8", block) for n in range(passes)]
    largest = heads.tokens * sum(1 << 14 + 8 * n for n in range(passes))
    sum_ = sums(heads.width, largest)
    out = Operand.made(
        f"{name} sums",
        (heads.batch, heads.tokens, heads.channels),
        "int32",
        block,
        sum_.planes,
        written=False,
    )
    assembler, wide = Assembler(config), heads.width // block
    for image in range(heads.batch):
        (values,) = v.matrices(image, block)
        for head in range(heads.heads):
            lefts = [p.matrices(image * heads.heads + head, block)[0] for p in ps]
            right = values.part(slice(head * wide, (head + 1) * wide), slice(0, values.columns))
            outs = [_columns(m, head * heads.width, heads.width, block) for m in out.matrices(image, block)]
            Product(assembler, lefts, right, outs, sum_, None, heads.tokens, name).emit()
    macs = heads.batch * heads.tokens**2 * heads.channels
    return Launch(assembler.finish(), ps, [out], macs)


def _columns(matrix: Matrix, start: int, width: int, block: int) -> Matrix:
    """Some columns, which begin and end with blocks."""
    return matrix.part(slice(0, matrix.rows), slice(start // block, (start + width) // block))
