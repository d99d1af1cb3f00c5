"""Products whose tiles are emitted in turns: one keeps the multipliers busy, another the stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tvm_vitq.vta.matmul import Product


def in_turns(*lists: Sequence[Product]) -> None:
    """Emits the products of each list one after the other, tiles of the lists in turns, so that all lists end
    together by the cycles that the multipliers and the ALU need. Lists have contexts of their own.
    """
    work = [sum(map(_work, products)) for products in lists]
    steps = [_weighted(products) for products in lists]
    done = [0.0] * len(lists)
    while any(share < 1 for share, total in zip(done, work, strict=True) if total):
        at = min((n for n in range(len(lists)) if work[n]), key=lambda n: done[n])
        done[at] += next(steps[at], work[at]) / work[at]


def _weighted(products: Sequence[Product]) -> Iterator[float]:
    """The cycles of each tile, once it is emitted."""
    for product in products:
        tiles = -(-product.sizes.rows // product.tile.rows) * -(
            -product.sizes.columns // product.tile.columns
        )
        for _ in product.steps():
            yield _work(product) / tiles


def _work(product: Product) -> float:
    return float(product.sizes.rows * product.sizes.columns * product.sizes.each)
