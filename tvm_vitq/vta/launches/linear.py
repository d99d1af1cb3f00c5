"""A linear layer on VTA: which of its conversions the ALU does, and the launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tvm_vitq.numerics import INDEX_BITS, Array, Output
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.stream.assembler import Assembler
from tvm_vitq.vta.stream.blocks import Matrix, constant_matrix
from tvm_vitq.vta.stream.choice import Choose
from tvm_vitq.vta.stream.epilogue import Epilogue
from tvm_vitq.vta.stream.launch import Launch
from tvm_vitq.vta.stream.matmul import Product
from tvm_vitq.vta.stream.operand import Operand

LARGEST_SUM = 2**31 - 1


@dataclass(frozen=True)
class Conversion:
    """What a layer's sums become on VTA.

    epilogue : on the ALU.
    dtype : of what the host gets;  finished : whether that is the layer's result, or its products' sums, to
        which the host adds the bias.
    order : channels as VTA is to have them; (): those with equal shifts side by side.
    """

    epilogue: Epilogue
    dtype: str
    finished: bool
    order: tuple[int, ...] = ()


def conversion(
    weight: Array, bias: Array, multiplier: Array, zero_point: Array, out: Output, largest: int = 128
) -> Conversion:
    """The layer's requantization by shifts, where it is one (`numerics.round_shift`) and its result has one
    or two bytes; else all of the sums. Its inputs are codes of at most `largest` in magnitude.

    ``clip(((sum + bias + half) >> s) + z) = clip((sum + bias + half + (z << s)) >> s)``: half, zero point and
    bias are one constant. It is proved that no sum overflows with it.
    """
    products = largest * np.abs(weight.astype(np.int64)).sum(1)
    sums = Conversion(whole_sums(len(bias), int(products.max())), "int32", False)
    if out.kind != "shift" or out.dtype not in ("int8", "uint16") or out.qmax >= 1 << INDEX_BITS:
        return sums
    count = len(bias)
    shift = np.broadcast_to(np.round(-np.log2(np.asarray(multiplier, np.float64))).astype(np.int64), count)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    added = bias.astype(np.int64) + half + (np.broadcast_to(zero_point, count).astype(np.int64) << shift)
    most = products + np.abs(added)
    least, largest = int(shift.min()), int(shift.max())
    if most.max() > LARGEST_SUM or largest > 30 or (largest > 15 and largest - least > 15):
        return sums
    planes = 1 if out.dtype == "int8" else 2
    return Conversion(Epilogue(added, shift, out.qmin, out.qmax, planes), out.dtype, True)


def whole_sums(count: int, largest: int) -> Epilogue:
    """Sums of at most `largest` in magnitude as they are, in as few bytes as hold them."""
    planes = next(n for n in (1, 2, 3, 4) if largest < 1 << (8 * n - 1))
    return Epilogue(None, np.zeros(count, np.int64), None, None, planes)


@dataclass(frozen=True)
class Layer:
    """A layer's constants, channels with equal shifts side by side: a tile of them is shifted in half the
    time.

    order : channels as VTA has them.
    """

    name: str
    right: Matrix
    epilogue: Epilogue
    dtype: str
    order: tuple[int, ...]
    block: int

    @classmethod
    def of(cls, name: str, weight: Array, made: Conversion, block: int) -> Layer:
        """Of int8 weights [N, K]."""
        order = np.array(made.order or np.argsort(made.epilogue.shift, kind="stable"))
        right = constant_matrix(f"{name} weight", weight[order], block)
        return cls(name, right, made.epilogue.of_channels(order), made.dtype, tuple(order.tolist()), block)

    def result(self, count: int, rows: int) -> Operand:
        """A result [count, rows, N]."""
        shape = (count, rows, len(self.order))
        planes = self.epilogue.planes
        made = Operand.made(f"{self.name} result", shape, self.dtype, self.block, planes, written=False)
        return replace(made, order=self.order)

    def stream(self, count: int, rows: int) -> list[Operand]:
        """What is added to such results, in digits; nothing where nothing is."""
        if self.epilogue.left is None:
            return []
        shape = (count, rows, len(self.order))
        return [Operand.of_digits(f"{self.name} stream", shape, self.block, self.order)]

    def product(
        self,
        assembler: Assembler,
        left: Matrix,
        outs: list[Matrix],
        rows: int,
        choose: Choose | None,
        added: Sequence[Matrix] = (),
    ) -> Product:
        """The layer for inputs `left`, and for digits that are added."""
        return Product(
            assembler,
            [left],
            self.right,
            outs,
            self.epilogue,
            None,
            rows,
            self.name,
            choose=choose,
            added=added,
        )


def linear_launch(
    name: str,
    rows: int,
    weight: Array,
    made: Conversion,
    config: VtaConfig,
    choose: Choose | None = None,
) -> Launch:
    """The launch of a layer: int8 [1, rows, K], and int32 [1, rows, N] of a residual sum (`residual`), to
    [1, rows, N] of the conversion's dtype.

    Parameters
    ----------
    weight : int8 [N, K].
    choose : gives products their tiles.

    Raises
    ------
    VitqError : no tile fits.
    """
    block = config.block
    x = Operand.made(f"{name} input", (1, rows, weight.shape[1]), "int8", block)
    layer = Layer.of(name, weight, made, block)
    y = layer.result(1, rows)
    assembler = Assembler(config)
    (left,) = x.matrices(0, block)
    stream = layer.stream(1, rows)
    added = [matrix for operand in stream for matrix in operand.matrices(0, block)]
    layer.product(assembler, left, y.matrices(0, block), rows, choose, added).emit()
    return Launch(assembler.finish(), [x, *stream], [y], rows * weight.size)
