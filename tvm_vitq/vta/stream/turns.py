"""Products whose tiles are emitted in turns: one keeps the multipliers busy, another the stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tvm_vitq.vta.stream.matmul import Product


def in_turns(*lists: Sequence[Product]) -> None:
    """Emits the products of each list one after the other. The next tile is one of the last list, unless it
    would have to wait, for its operands or for stores; then one of the list before. Lists have
    contexts of their own.
    """
    queues = [_Queue(products) for products in lists if products]
    while queues:
        chosen = min(reversed(queues), key=lambda queue: queue.product.waits)
        if not chosen.step():
            queues.remove(chosen)


class _Queue:
    """Products that are emitted one after the other; the first loads of one go before other queues' tiles."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.left = deque(products)
        self._begin()

    def _begin(self) -> None:
        self.product = self.left.popleft()
        self.tiles, self.steps = self.product.tile_count, self.product.steps()
        next(self.steps)

    def step(self) -> bool:
        """Emits a tile; whether there are more."""
        next(self.steps)
        self.tiles -= 1
        if not self.tiles and self.left:
            self._begin()
        return self.tiles > 0
