"""The launch in front of the softmax: the layer of q, k and v, and the scores of each head.

Sums of scores leave in 3 bytes for the host to scale. Zero points are the host's as well; for them it gets
the codes of q and k. v stays on the device, transposed, as the launch behind the softmax reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.launches.heads import Heads, Values, columns_of, rows_of
from tvm_vitq.vta.launches.linear import whole_sums
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.stream.assembler import Assembler
from tvm_vitq.vta.stream.blocks import Matrix, bias_as_products, constant_matrix
from tvm_vitq.vta.stream.choice import Choose, Schedule
from tvm_vitq.vta.stream.contexts import Contexts
from tvm_vitq.vta.stream.epilogue import Epilogue
from tvm_vitq.vta.stream.launch import Launch
from tvm_vitq.vta.stream.matmul import Product
from tvm_vitq.vta.stream.operand import Operand
from tvm_vitq.vta.stream.tiles import CONTEXTS, Size, Tile, choose_tile, estimate, tiles
from tvm_vitq.vta.stream.turns import in_turns

SHARES = 8
"""Parts into which scratchpads are divided, some for scores, the others for the layer."""

ROW_BIAS = 1
"""Weight that stays: that of v's bias."""

PRODUCTS = ("layer", "values", "scores")
"""q and k of a head; v of a head; their scores."""


class Scores:
    """Codes int8 [batch, tokens, C] to the sums of ``q k.T``, int32 [batch * heads, tokens, tokens], the
    codes of q and k, [batch, tokens, 2 channels], and, where the host `needs_v`, those of v transposed,
    [batch, channels, tokens].

    Its schedule (`choice.Choice`) has the tiles of `PRODUCTS`, of which the first two have equally many
    contexts, and the "share" of the scratchpads, in eighths, that scores have.

    Parameters
    ----------
    weight : int8 [3 heads width, C], rows of q, k and v in this order, heads one behind the other.
    epilogue : of the layer, by channel.

    Raises
    ------
    VitqError : no tile fits; limits of codes that leave no 0 for heads that are filled up.
    """

    def __init__(
        self,
        name: str,
        heads: Heads,
        weight: Array,
        epilogue: Epilogue,
        needs_v: bool,
        config: VtaConfig,
        choose: Choose | None = None,
    ) -> None:
        self.name, self.heads, self.needs_v, self.config = name, heads, needs_v, config
        self.sums = whole_sums(heads.tokens, heads.width * largest_code(epilogue) ** 2)
        self.macs = heads.batch * heads.tokens * (weight.size + heads.tokens * heads.heads * heads.width)
        weight, epilogue = _filled_up(weight, epilogue, heads)
        self.order, self.v_order = _sorted_by_shift(epilogue.shift, heads, not needs_v)
        self.weight, self.epilogue = (
            weight[self.order.ravel()],
            epilogue.of_channels(self.order.ravel()),
        )
        self.constants = 2 * heads.wide  # bias and shift of v, by row
        bias = self.epilogue.bias
        product = isinstance(bias, np.ndarray) and bias_as_products(bias, heads.block) is not None
        self.epilogue = replace(self.epilogue, bias_is_product=product)  # the same in all heads, as tiles are
        self.sizes: dict[str, Size] = {}
        """Of `PRODUCTS`, once they have been emitted."""
        self._made = self._first()
        schedule = choose(self) if choose else None
        if schedule is not None:
            self._made = self._emit(schedule)

    def _first(self) -> tuple[Launch, Values, Schedule]:
        """With half of the scratchpads for scores, or as many as let tiles fit."""
        half = SHARES // 2
        for share in sorted(range(1, SHARES), key=lambda share: abs(share - half)):
            try:
                return self._emit({"share": share})
            except VitqError as error:
                refused = error
        raise refused

    @property
    def signature(self) -> str:
        """What launches have in common for which the same schedule is the best."""
        heads, (layer, values) = self.heads, (self.sizes[which].operations for which in PRODUCTS[:2])
        sizes = f"{heads.batch}x{heads.heads}x{heads.tokens}x{heads.width}_k{self.weight.shape[1]}"
        return f"scores_{sizes}_alu{layer:.0f}_{values:.0f}_planes{self.sums.planes}"

    def launch(self) -> tuple[Launch, Values]:
        """The launch, and v for the one behind the softmax."""
        return self._made[:2]

    @property
    def schedule(self) -> Schedule:
        """Share and tiles."""
        return self._made[2]

    def cycles(self, schedule: Schedule) -> int:
        """By the cycle model."""
        return self._emit(schedule)[0].stream.cycles(self.config)

    def accepts(self, schedule: Schedule) -> bool:
        """Whether a launch can have it."""
        if set(schedule) != {"share", *PRODUCTS} or schedule["share"] not in range(1, SHARES):
            return False
        counts = [schedule[which].get("contexts") for which in PRODUCTS]
        if counts[0] != counts[1] or not set(counts) <= set(CONTEXTS):
            return False
        return all(schedule[which] in map(asdict, self._tiles(which, schedule)) for which in PRODUCTS)

    def options(self, best: Schedule) -> Iterator[Schedule]:
        """Other shares and contexts, with tiles by estimate; then the best schedule with one other tile."""
        for share, *counts in itertools.product((4, 3, 2, 5), CONTEXTS, CONTEXTS):
            contexts = self._shared(share, *counts)
            try:
                fitting = {
                    which: asdict(choose_tile(self.sizes[which], self.config, self.name, contexts[which]))
                    for which in PRODUCTS
                }
            except VitqError:
                continue
            yield {"share": share, **fitting}
        others = []
        for which in PRODUCTS:
            size = self.sizes[which]
            found = sorted(
                self._tiles(which, best), key=lambda tile: estimate(size, tile, self.config, False)
            )
            others.append([{**best, which: asdict(tile)} for tile in found])
        for row in itertools.zip_longest(*others):
            yield from filter(None, row)

    def _tiles(self, which: str, schedule: Schedule) -> Iterator[Tile]:
        """Those that a product may have instead."""
        return tiles(self.sizes[which], self.config, self._contexts(schedule)[which])

    def _contexts(self, schedule: Schedule) -> dict[str, Contexts]:
        counts = (schedule[which]["contexts"] if which in schedule else 2 for which in ("layer", "scores"))
        return self._shared(schedule["share"], *counts)

    def _shared(self, share: int, layer_count: int, scores_count: int) -> dict[str, Contexts]:
        """Where tiles of each product may be: scores in so many of `SHARES`, the layer in the others."""
        rest = SHARES - share
        layer, scores = (
            Contexts(self.config, count, self.constants, part, ROW_BIAS)
            for count, part in ((layer_count, (0, rest, SHARES)), (scores_count, (rest, share, SHARES)))
        )
        return {"layer": layer, "values": layer, "scores": scores}

    def _emit(self, schedule: Schedule) -> tuple[Launch, Values, Schedule]:
        """The launch, v, and the whole schedule: tiles that are not in the given one are those with the best
        estimate.
        """
        name, heads, block, wide = self.name, self.heads, self.heads.block, self.heads.wide
        assembler = Assembler(self.config)
        weights = constant_matrix(f"{name} weight", self.weight, block)
        x, qk, v, scores = self._operands()
        values = Values(v, self.v_order)
        contexts, chosen = self._contexts(schedule), dict(schedule)

        def product(which: str, left: Matrix, right: Matrix, outs: list[Matrix], to: Epilogue) -> Product:
            tile = Tile(**chosen[which]) if which in chosen else None
            rows = wide if to.by_rows else heads.tokens
            made = Product(assembler, [left], right, outs, to, tile, rows, name, contexts[which])
            self.sizes[which], chosen[which] = made.sizes, asdict(made.tile)
            return made

        def layer(head: int, start: int, width: int) -> tuple[Matrix, Epilogue]:
            """Weights and epilogue of some channels of a head."""
            start += 3 * wide * head
            own = slice(start, start + width)
            return rows_of(weights, start, width, block), self.epilogue.of_channels(own)

        for image in range(heads.batch):
            (inputs,), (both,) = (o.matrices(image, block) for o in (x, qk))
            # The sums of scores keep the store stage busy, layers the multipliers: the scores of a head go
            # with the layers of the next one, those of the last with v.
            scoring: list[Product] = []
            for head in range(heads.heads):
                right, to = layer(head, 0, 2 * wide)
                out = columns_of(both, 2 * wide * head, 2 * wide, block)
                in_turns([product("layer", inputs, right, [out], to)], scoring)
                q, k = (columns_of(out, start, wide, block) for start in (0, wide))
                outs = scores.matrices(image * heads.heads + head, block)
                scoring = [product("scores", q, k, outs, self.sums)]
            layers = []
            for head in range(heads.heads):
                left, to = layer(head, 2 * wide, wide)
                out = values.head(image, head, heads)
                layers.append(product("values", left, inputs, [out], replace(to, by_rows=True)))
            in_turns(layers, scoring)
        outputs = [scores, qk, v] if self.needs_v else [scores, qk]
        return Launch(assembler.finish(), [x], outputs, self.macs), values, chosen

    def _operands(self) -> tuple[Operand, Operand, Operand, Operand]:
        """Inputs, q with k, v, scores."""
        heads, tokens, channels = self.heads, self.heads.tokens, self.heads.channels
        squares = (heads.batch * heads.heads, tokens, tokens)

        def made(what: str, shape: tuple[int, int, int], dtype: str = "int8", **how: Any) -> Operand:
            return Operand.made(f"{self.name} {what}", shape, dtype, heads.block, **how)

        qk = made("q k", (heads.batch, tokens, 2 * channels), written=False)
        order = tuple(self.order[:, : 2 * heads.wide].ravel().tolist())
        return (
            made("input", (heads.batch, tokens, self.weight.shape[1])),
            replace(qk, order=order),
            made("v", (heads.batch, channels, tokens), written=False),
            made("scores", squares, "int32", planes=self.sums.planes, written=False),
        )


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
