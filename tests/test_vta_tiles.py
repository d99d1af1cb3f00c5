"""The tiles that products of real models get, judged by the cycle model."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tvm_vitq.errors import VitqError
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.machine.cycles import count_cycles
from tvm_vitq.vta.stream.assembler import Assembler, Buffer
from tvm_vitq.vta.stream.blocks import Matrix
from tvm_vitq.vta.stream.contexts import Contexts
from tvm_vitq.vta.stream.epilogue import Epilogue
from tvm_vitq.vta.stream.matmul import Product
from tvm_vitq.vta.stream.tiles import Size, Tile, choose_tile, estimate, fits, tiles

CONFIG = VtaConfig()

SIZES = {
    "qkv": Size(13, 36, 12, operations=6, constants=36),
    "proj": Size(13, 12, 12, operations=3, planes=4),
    "fc1": Size(13, 48, 12, operations=6, planes=2, constants=48),
    "fc2": Size(13, 12, 48, operations=3, planes=4),
    "scores": Size(13, 13, 4, operations=2, planes=3),
    "values": Size(13, 4, 13, operations=3, passes=2, planes=4),
    "head": Size(1, 63, 12, operations=3, planes=4),
}


def measured(size: Size, tile: Tile) -> int:
    """Cycles of the product in such tiles."""

    def matrix(name: str, rows: int, columns: int, written: bool = True) -> Matrix:
        return Matrix(Buffer(name, rows * columns * 256, written=written), rows, columns)

    columns = size.columns * 16
    # Constants are shifts that differ by channel; else there is a bias that is a product, or nothing.
    bias = np.ones(columns, int) if size.operations > 2 and size.passes == 1 else None
    shift = np.arange(columns) % 2 + 8 if size.constants else np.zeros(columns, int)
    limits = (-128, 127) if size.constants else (None, None)
    assembler = Assembler(CONFIG)
    Product(
        *(assembler, [matrix(f"x{n}", size.rows, size.depth) for n in range(size.passes)]),
        *(matrix("w", size.columns, size.depth),),
        *([matrix(f"out{n}", size.rows, size.columns, False) for n in range(size.planes)],),
        *(Epilogue(bias, shift, *limits, planes=size.planes), tile, size.rows * 16, "product"),
    ).emit()
    stream = assembler.finish()
    return count_cycles(
        stream.placed([4096 * (1 + n) for n in range(len(stream.buffers))], CONFIG), CONFIG
    ).total


@pytest.mark.parametrize("name", SIZES)
def test_the_chosen_tile_is_among_the_best(name):
    size = SIZES[name]
    tile = choose_tile(size, CONFIG, name)
    cycles = measured(size, tile)
    others = random.Random(0).sample(list(tiles(size, CONFIG)), 12)
    assert cycles <= 1.15 * min(measured(size, other) for other in others)
    assert 0.75 * cycles <= estimate(size, tile, CONFIG) <= 1.1 * cycles


def test_all_tiles_fit_and_differ():
    found = list(tiles(SIZES["qkv"], CONFIG))
    assert len(found) == len(set(found)) > 100
    assert all(fits(tile, Contexts(CONFIG, tile.contexts, 36), CONFIG, SIZES["qkv"]) for tile in found)


def test_a_product_that_no_tile_fits_is_refused():
    with pytest.raises(VitqError, match=r"(?s)no tile.*where: fc1"):
        choose_tile(Size(13, 3000, 12, operations=6, constants=3000), CONFIG, "fc1")
