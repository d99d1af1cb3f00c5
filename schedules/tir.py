"""Short names for the TIR that the kernels are made of: explicit loops over fixed-width vectors.

Kernels are written with the IRBuilder, not with schedule primitives: the loop nest, the registers and the
layouts are decided here, TVM and LLVM only translate them. Vectors of 16 lanes are legalized by LLVM for
every target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as TB

from tvm_vitq.numerics import WIDE_MAX

Expr = Any
"""A TIR expression; TVM's Python classes are not typed."""

LANES = 16
"""Lanes of the vectors that do not touch an instruction set: epilogues, LayerNorm, softmax, elementwise."""


def prim_func(name: str, emit: Callable[[], None]) -> tvm.tirx.PrimFunc:
    """The PrimFunc that `emit` builds; arguments do not alias."""
    with IRBuilder() as builder:
        with TB.prim_func(s_tir=True):
            TB.func_name(name)
            TB.func_attr({"global_symbol": name, "tirx.noalias": True})
            emit()
    return builder.get()


def argument(name: str, shape: tuple[int, ...], dtype: str) -> Expr:
    """Declares the next buffer argument."""
    return TB.arg(name, TB.Buffer(shape, dtype))


def scratch(size: int, dtype: str) -> Expr:
    """A private flat buffer; below 1 KiB it lives on the stack, where LLVM promotes it to registers."""
    return TB.alloc_buffer((size,), dtype)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """An if without else; a condition that is known when the kernel is generated leaves no branch."""
    with TB.If(condition):
        with TB.Then():
            yield


@contextmanager
def loop(count: int, unroll: int = 1) -> Iterator[Expr]:
    """A serial loop whose body is written out `unroll` times, or as often as divides the count."""
    factor = max(f for f in range(1, unroll + 1) if count % f == 0) if unroll > 1 else 1
    with TB.serial(0, count // factor) as outer:
        if factor == 1:
            yield outer
        else:
            with TB.unroll(0, factor) as inner:
                yield outer * factor + inner


def choose(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """If, then, else."""
    with TB.If(condition):
        with TB.Then():
            then()
        with TB.Else():
            otherwise()


def load(buffer: Expr, indices: Expr | list[Expr], lanes: int = LANES) -> Expr:
    """`lanes` consecutive elements; the last index is that of the first."""
    indices = indices if isinstance(indices, list) else [indices]
    dtype = str(buffer.dtype)
    return buffer.vload(indices, dtype if lanes == 1 else f"{dtype}x{lanes}")


def store(buffer: Expr, value: Expr, indices: Expr | list[Expr], lanes: int = LANES) -> None:
    """Stores `lanes` consecutive elements."""
    indices = indices if isinstance(indices, list) else [indices]
    last = indices[-1] if lanes == 1 else TB.ramp(indices[-1], 1, lanes)
    TB.buffer_store(buffer, value, [*indices[:-1], last])


def let(value: Expr) -> Expr:
    """Evaluates once, so that a value used several times is not a tree copied several times."""
    return TB.bind(value)


def splat(value: Expr, lanes: int = LANES) -> Expr:
    """A vector of equal lanes."""
    return TB.broadcast(value, lanes)


def constant(value: int | float, dtype: str, lanes: int = LANES) -> Expr:
    """A vector of equal constants."""
    scalar = tvm.tirx.const(value, dtype)
    return scalar if lanes == 1 else TB.broadcast(scalar, lanes)


def _type(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def cast(value: Expr, dtype: str, lanes: int = LANES) -> Expr:
    """Conversion by value; int32 to float32 rounds to nearest even, integer narrowing drops high bits."""
    return tvm.tirx.Cast(_type(dtype, lanes), value)


def reinterpret(value: Expr, dtype: str) -> Expr:
    """The same bits as another type (`dtype` with lanes)."""
    return T.reinterpret(value, dtype=dtype)


def intrinsic(name: str, dtype: str, *operands: Expr) -> Expr:
    """A call of an LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *operands, dtype=dtype)


def rint(value: Expr, lanes: int = LANES) -> Expr:
    """float32 to int32, ties to even: one instruction on every target. |value| < 2**31."""
    return intrinsic("llvm.lrint", _type("int32", lanes), value)


def add_lanes(value: Expr, dtype: str) -> Expr:
    """The sum of all lanes of a vector of integers."""
    return intrinsic("llvm.vector.reduce.add", dtype, value)


def prefetch(buffer: Expr, index: Expr) -> None:
    """Asks for the cache line of an element, which may lie beyond the end, in the second level cache."""
    read, second_level, data = (tvm.tirx.const(v, "int32") for v in (0, 2, 1))
    address = TB.address_of(buffer[index])
    which = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    TB.evaluate(T.call_llvm_intrin(which, address, read, second_level, data, dtype="void"))


def minimum(a: Expr, b: Expr) -> Expr:
    return tvm.tirx.Min(a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    return tvm.tirx.Max(a, b)


def select(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    return tvm.tirx.Select(condition, then, otherwise)


def clip(value: Expr, low: int | float, high: int | float, dtype: str, lanes: int = LANES) -> Expr:
    return minimum(maximum(value, constant(low, dtype, lanes)), constant(high, dtype, lanes))


def round_multiply(value: Expr, multiplier: Expr, lanes: int = LANES) -> Expr:
    """numerics.round_multiply of int32 lanes."""
    scaled = cast(value, "float32", lanes) * multiplier
    return rint(clip(scaled, float(-WIDE_MAX), float(WIDE_MAX), "float32", lanes), lanes)


def multiply_high(a: Expr, b: Expr, lanes: int) -> Expr:
    """High halves of the products of uint16 lanes (pmulhuw, umull and shrn)."""
    product = cast(a, "uint32", lanes) * cast(b, "uint32", lanes)
    return cast(product >> constant(16, "uint32", lanes), "uint16", lanes)


def shuffle(value: Expr, indices: list[int]) -> Expr:
    """Lanes of `value` picked by constant positions."""
    return pick([value], indices)


def pick(vectors: list[Expr], indices: Iterable[int]) -> Expr:
    """Lanes of several vectors picked by constant positions, counted through all of them."""
    return tvm.tirx.Shuffle(vectors, [tvm.tirx.const(i, "int32") for i in indices])


def halves(words: list[Expr], high: bool) -> Expr:
    """The low or high 16 bits of two vectors of 32-bit lanes, as one vector of twice as many uint16 lanes.

    As a shuffle of words this is one instruction on AVX-512 (vpermt2w) and NEON (uzp1, uzp2); a conversion by
    value becomes several.
    """
    words = [reinterpret(w, f"uint16x{2 * LANES}") for w in words]
    return pick(words, range(int(high), 4 * LANES, 2))


def high_words(halfwords: Expr) -> list[Expr]:
    """32 uint16 lanes as the high halves of 2 x 16 uint32 lanes, low halves 0; the inverse of `halves`."""
    zero = constant(0, "uint16", 2 * LANES)
    result = []
    for start in (2 * LANES, 3 * LANES):
        indices = [i for lane in range(start, start + LANES) for i in (0, lane)]
        result.append(reinterpret(pick([zero, halfwords], indices), f"uint32x{LANES}"))
    return result


def ceildiv(a: int, b: int) -> int:
    return -(-a // b)


def interleave(vectors: list[Expr], lanes: int) -> Expr:
    """``v0[0] v1[0] .. v0[1] v1[1] ..`` of equally long vectors (int8; `lanes` may be 1)."""
    while len(vectors) > 4:  # LLVM finds no good code for one shuffle of more than four vectors
        half = len(vectors) // 2
        vectors = [let(interleave([vectors[i], vectors[i + half]], lanes)) for i in range(half)]
        lanes *= 2
    count = len(vectors)
    return pick(vectors, [i * lanes + j for j in range(lanes) for i in range(count)])


def interleave_parts(vectors: list[Expr], size: int) -> list[Expr]:
    """As `interleave` of equally long vectors of `size` bytes, but by parts of 16: vector v holds, part after
    part, piece v of the part's interleaved bytes. Only that takes one instruction for two whole registers.
    """
    half = len(vectors) // 2
    low, high = (
        [at + i for part in range(first, size, 16) for at in range(part, part + 8) for i in (0, size)]
        for first in (0, 8)
    )
    for _ in range(half.bit_length()):
        pairs = list(zip(vectors[:half], vectors[half:], strict=True))
        vectors = [let(pick([a, b], lanes)) for a, b in pairs for lanes in (low, high)]
    return vectors


def transpose(vectors: list[Expr], lanes: int) -> list[Expr]:
    """Rows of `lanes` elements become columns, a vector each; both numbers are powers of two and there are no
    fewer rows than lanes. Every round merges the upper half of the rows into the lower one.
    """
    rows, rounds = len(vectors), len(vectors).bit_length() - 1
    for _ in range(rounds):
        merged = [i * lanes + j for j in range(lanes) for i in range(2)]
        parts = [merged] if lanes < rows else [merged[:lanes], merged[lanes:]]
        half = len(vectors) // 2
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [let(pick([a, b], part)) for a, b in pairs for part in parts]
        lanes = len(parts[0])
    return vectors


def first_lanes(value: Expr, valid: int, otherwise: int) -> Expr:
    """int32 lanes of which only the first `valid` count; the others become a constant."""
    if valid == LANES:
        return value
    inside = TB.ramp(tvm.tirx.const(0, "int32"), 1, LANES) < constant(valid, "int32")
    return select(inside, value, constant(otherwise, "int32"))


def pieces(size: int, widest: int = LANES) -> list[tuple[int, int, int]]:
    """(start, count, lanes): `size` elements as vectors of `widest` lanes and then of halves of it."""
    result, start, lanes = [], 0, widest
    while start < size:
        if count := (size - start) // lanes:
            result.append((start, count, lanes))
            start += count * lanes
        lanes //= 2
    return result
