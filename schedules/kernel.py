"""What a kernel generator returns: the function and its arguments in order."""

from __future__ import annotations

from dataclasses import dataclass

import tvm


@dataclass(frozen=True)
class Argument:
    """One buffer argument; `role` is "input" (of the program), "constant" (from `pack`) or "output"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str


@dataclass(frozen=True)
class Kernel:
    """A scheduled PrimFunc.

    name : ``vitq_<op>_<out>_<in...>[_<epilogue>]__<shape>``; equal names are equal functions (for one target
        and tile),
        so the name is the key of deduplication. It is also the function's global symbol.
    func : the PrimFunc; its parameters are `arguments`, in order, the output last.
    macs : multiply-accumulates of one call, 0 for kernels without dot products.
    """

    name: str
    func: tvm.tirx.PrimFunc
    arguments: tuple[Argument, ...]
    macs: int = 0

    def argument(self, name: str) -> Argument:
        """The argument called `name`."""
        return next(a for a in self.arguments if a.name == name)


TOKENS = {"int8": "qs8", "uint8": "qu8", "uint16": "x16", "int16": "qs16", "int32": "w32", "float32": "f32"}
"""Operand tokens of kernel names: qs8 codes, qu8 probabilities, x16 table indices, w32 wide, f32 float."""


def kernel_name(
    op: str, out: str, inputs: list[str], epilogue: list[str], shape: tuple[int, ...], *extra: str
) -> str:
    """A name of the grammar; `out` and `inputs` are dtypes or ready tokens."""
    operands = [TOKENS.get(v, v) for v in (out, *inputs)]
    tail = ["x".join(str(v) for v in shape), *extra]
    return "_".join(["vitq", op, *operands, *epilogue]) + "__" + "_".join(v for v in tail if v)


@dataclass(frozen=True)
class Split:
    """A range cut into `count` nearly equal pieces of `large` and then `large - 1` units.

    Two static sizes cover any length, and no piece is a sliver: 49 rows by 6 are 4 pieces of 6 and 5 of 5,
    not 8 and 1.
    """

    count: int
    large: int
    number_large: int

    @staticmethod
    def of(length: int, at_most: int) -> Split:
        """The fewest pieces of at most `at_most` units."""
        count = -(-length // at_most)
        large = -(-length // count)
        return Split(count, large, length - count * (large - 1))

    @property
    def small(self) -> int:
        return self.large - 1

    def sizes(self) -> list[int]:
        """The length of every piece, in order."""
        return [self.large] * self.number_large + [self.small] * (self.count - self.number_large)
