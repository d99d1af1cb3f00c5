"""Self-attention on VTA: two launches around the softmax, which is the host's.

    scores   q and k of the layer in front, ``q k.T`` of each head, and v transposed, which stays there
    layer    ``p v`` of each head, as codes, and the layer behind
    values   ``p v`` of each head, where these become no codes by shifts

Products leave as sums, in 3 or 4 bytes: their scales are real numbers, or differ by row. Zero points are the
host's as well; for them it gets the codes of q, k and v, or adds a term to each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.assembler import Assembler
from tvm_vitq.vta.blocks import Matrix, constant_matrix
from tvm_vitq.vta.config import VtaConfig
from tvm_vitq.vta.contexts import Contexts
from tvm_vitq.vta.epilogue import Epilogue, Rows
from tvm_vitq.vta.linear import Conversion, Layer, whole_sums
from tvm_vitq.vta.matmul import Choose, Product
from tvm_vitq.vta.operand import Operand
from tvm_vitq.vta.program import Launch
from tvm_vitq.vta.turns import in_turns


@dataclass(frozen=True)
class Heads:
    """Sizes of self-attention.

    batch, heads, tokens : of images, heads, tokens;  width : channels of a head, of q, k and v alike.
    block : see `VtaConfig`.
    """

    batch: int
    heads: int
    tokens: int
    width: int
    block: int

    @property
    def wide(self) -> int:
        """Channels of a head, filled up to whole blocks with some that are 0."""
        return -(-self.width // self.block) * self.block

    @property
    def channels(self) -> int:
        """Of q, of k, of v, as VTA has them."""
        return self.heads * self.wide


@dataclass(frozen=True)
class Values:
    """v transposed, int8 [batch, channels, tokens], as `scores_launch` leaves it on the device.

    order : its channels in the order in which memory has them.
    """

    operand: Operand
    order: Array

    def head(self, image: int, head: int, heads: Heads) -> Matrix:
        """That of a head."""
        (matrix,) = self.operand.matrices(image, heads.block)
        return _rows(matrix, head * heads.wide, heads.wide, heads.block)


def scores_launch(
    name: str, heads: Heads, weight: Array, epilogue: Epilogue, needs_v: bool, config: VtaConfig
) -> tuple[Launch, Values]:
    """Codes int8 [batch, tokens, C] to the sums of ``q k.T``, int32 [batch * heads, tokens, tokens], the
    codes of q and k, [batch, tokens, 2 channels], and, where the host `needs_v`, those of v transposed,
    [batch, channels, tokens].

    Parameters
    ----------
    weight : int8 [3 heads width, C], rows of q, k and v in this order, heads one behind the other;
    epilogue : of the layer, by channel.

    Returns
    -------
    The launch, and v for the one behind the softmax.
    """
    block, channels, wide = heads.block, heads.channels, heads.wide
    x = Operand.made(f"{name} input", (heads.batch, heads.tokens, weight.shape[1]), "int8", block)
    qk = Operand.made(f"{name} q k", (heads.batch, heads.tokens, 2 * channels), "int8", block, written=False)
    v = Operand.made(f"{name} v", (heads.batch, channels, heads.tokens), "int8", block, written=False)
    sum_ = whole_sums(heads.tokens, heads.width * largest_code(epilogue) ** 2)
    scores = Operand.made(
        f"{name} scores",
        (heads.batch * heads.heads, heads.tokens, heads.tokens),
        "int32",
        block,
        sum_.planes,
        written=False,
    )
    macs = heads.batch * heads.tokens * (weight.size + heads.tokens * heads.heads * heads.width)
    weight, epilogue = _filled_up(weight, epilogue, heads)
    order, v_order = _sorted_by_shift(epilogue.shift, heads, not needs_v)
    qk = replace(qk, order=tuple(order[:, : 2 * wide].ravel().tolist()))
    weights = constant_matrix(f"{name} weight", weight[order.ravel()], block)
    epilogue = epilogue.of_channels(order.ravel())
    values = Values(v, v_order)
    assembler = Assembler(config)
    constants = 2 * wide  # bias and shift of a head, by row for v
    front, back = (Contexts(config, 2, constants, share) for share in ((0, 3, 4), (3, 1, 4)))

    def layer(head: int, start: int, width: int) -> tuple[Matrix, Epilogue]:
        """Weights and epilogue of some channels of a head."""
        start += 3 * wide * head
        return _rows(weights, start, width, block), epilogue.of_channels(slice(start, start + width))

    def product(left: Matrix, right: Matrix, outs: list[Matrix], to: Epilogue, where: Contexts) -> Product:
        rows = wide if to.by_rows else heads.tokens
        return Product(assembler, [left], right, outs, to, None, rows, name, where)

    for image in range(heads.batch):
        (inputs,), (both,) = (o.matrices(image, block) for o in (x, qk))
        # The sums of scores keep the store stage busy, layers the multipliers: the scores of a head go with
        # the layers of the next one, those of the last with v.
        scoring: list[Product] = []
        for head in range(heads.heads):
            right, to = layer(head, 0, 2 * wide)
            out = _columns(both, 2 * wide * head, 2 * wide, block)
            in_turns([product(inputs, right, [out], to, front)], scoring)
            q, k = (_columns(out, start, wide, block) for start in (0, wide))
            scoring = [product(q, k, scores.matrices(image * heads.heads + head, block), sum_, back)]
        layers = []
        for head in range(heads.heads):
            left, to = layer(head, 2 * wide, wide)
            out = values.head(image, head, heads)
            layers.append(product(left, inputs, [out], replace(to, by_rows=True), front))
        in_turns(layers, scoring)
    outputs = [scores, qk, v] if needs_v else [scores, qk]
    return Launch(assembler.finish(), [x], outputs, macs), values


def _sorted_by_shift(shift: Array, heads: Heads, sort_v: bool) -> tuple[Array, Array]:
    """Channels of q, k and v by head, [heads, 3 wide], in an order in which most blocks have one shift, q
    and k the same; and that of v by itself.
    """
    each = shift.reshape(3, heads.heads, heads.wide)
    both = np.lexsort((each[1], each[0]))
    v = (
        np.argsort(each[2], axis=-1, kind="stable")
        if sort_v
        else np.broadcast_to(np.arange(heads.wide), both.shape)
    )
    start = heads.wide * np.arange(heads.heads)[:, None]
    orders = [start + part * heads.channels + of for part, of in enumerate((both, both, v))]
    return np.concatenate(orders, 1), (start + v).ravel()


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
            outs = [_columns(m, head * heads.wide, heads.wide, block) for m in out.matrices(image, block)]
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
    of `values_launch`, and what is added to each row's sums, int32 [batch * heads, tokens], to the layer's
    result [batch, tokens, N].

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
    y = layer.result(heads.batch, heads.tokens)
    assembler = Assembler(config)
    held = -(-heads.tokens // block) * block
    for image in range(heads.batch):
        (inputs,) = middle.matrices(image, block)
        for head in range(heads.heads):
            number = image * heads.heads + head
            lefts = [p.matrices(number, block)[0] for p in ps]
            right = v.head(image, head, heads)
            out = _columns(inputs, head * heads.wide, heads.wide, block)
            added = replace(codes[head], bias=Rows(terms.planes[0], number * held), by_rows=True)
            Product(assembler, lefts, right, [out], added, None, heads.tokens, name, choose=choose).emit()
        layer.product(assembler, inputs, y.matrices(image, block), heads.tokens, choose).emit()
    macs = heads.batch * heads.tokens * (heads.tokens * heads.heads * heads.width + weight.size)
    return Launch(assembler.finish(), [*ps, terms], [y], macs)


def _filled_up_inputs(weight: Array, heads: Heads) -> Array:
    """Weights whose inputs are heads of whole blocks of channels."""
    each = weight.reshape(len(weight), heads.heads, heads.width)
    return np.pad(each, [(0, 0), (0, 0), (0, heads.wide - heads.width)]).reshape(len(weight), -1)


def _filled_up(weight: Array, epilogue: Epilogue, heads: Heads) -> tuple[Array, Epilogue]:
    """Weights and epilogue whose heads have whole blocks of channels: those that are added are 0."""
    if heads.wide == heads.width:
        return weight, epilogue
    if (epilogue.low or 0) > 0 or (epilogue.high or 0) < 0:
        raise VitqError("codes of q, k and v without 0", got=f"{epilogue.low} to {epilogue.high}")

    def filled_up(values: Array, **how: Any) -> Array:
        each = values.reshape(-1, heads.width, *values.shape[1:])
        width = [(0, 0), (0, heads.wide - heads.width), *[(0, 0)] * (values.ndim - 1)]
        return np.pad(each, width, **how).reshape(-1, *values.shape[1:])

    bias = filled_up(epilogue.bias) if isinstance(epilogue.bias, np.ndarray) else None
    return filled_up(weight), replace(epilogue, bias=bias, shift=filled_up(epilogue.shift, mode="edge"))


def largest_code(epilogue: Epilogue) -> int:
    """Magnitude of int8 codes."""
    limits = (epilogue.low, epilogue.high)
    return 128 if None in limits else max(abs(limit) for limit in limits if limit is not None)


def _rows(matrix: Matrix, start: int, height: int, block: int) -> Matrix:
    """Some rows, which begin and end with blocks."""
    return matrix.part(slice(start // block, (start + height) // block), slice(0, matrix.columns))


def _columns(matrix: Matrix, start: int, width: int, block: int) -> Matrix:
    """Some columns, which begin and end with blocks."""
    return matrix.part(slice(0, matrix.rows), slice(start // block, (start + width) // block))
