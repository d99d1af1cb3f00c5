"""Random orthogonal matrices that spread every axis over all others, float64."""

from __future__ import annotations

import torch
from torch import Tensor

TRIES = 64
"""Random matrices of the odd sizes of which the best is taken."""

REGULAR = torch.full((4, 4), 0.5, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
"""A Hadamard matrix, scaled to be orthogonal, whose rows have the sum 1: it maps ones to ones."""


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A [size, size] Hadamard matrix with random signs of its rows. Where `size` is ``n 2**k`` with an odd n,
    it is the Kronecker product of one of ``2**k`` and a random orthogonal [n, n].
    """
    matrix, rest = torch.ones(1, 1, dtype=torch.float64), size
    while rest % 2 == 0:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5)
        rest //= 2
    matrix = torch.kron(matrix, _flattest([_random(rest, generator) for _ in range(TRIES)]))
    signs = torch.randint(2, (size, 1), generator=generator) * 2.0 - 1.0
    return signs * matrix


def keeping_ones(size: int, generator: torch.Generator) -> Tensor:
    """As `hadamard`, but the matrix Q maps the vector of ones to itself, so ``mean(x Q) == mean(x)``.

    Q is a Kronecker product of `REGULAR` and one random factor of up to about 30 rows, between random
    permutations.
    """
    factors, rest = 0, size
    while rest % 4 == 0:
        factors, rest = factors + 1, rest // 4
    if rest == 2 and factors:  # on two axes only the identity and the swap keep ones
        factors, rest = factors - 1, 8
    matrix = _flattest([_random_keeping_ones(rest, generator) for _ in range(TRIES)])
    for _ in range(factors):
        matrix = torch.kron(REGULAR, matrix)
    before, after = (torch.randperm(size, generator=generator) for _ in range(2))
    return matrix[before][:, after]


def _random(size: int, generator: torch.Generator) -> Tensor:
    """Uniform among all orthogonal matrices."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return (q * r.diagonal().sign()).contiguous()


def _random_keeping_ones(size: int, generator: torch.Generator) -> Tensor:
    """``U diag(1, R) U^T``: the first column of U is the unit vector along the ones."""
    start = torch.randn(size, size, dtype=torch.float64, generator=generator)
    start[:, 0] = 1.0
    basis = torch.linalg.qr(start)[0]
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = _random(size - 1, generator)
    return (basis @ inner @ basis.T).contiguous()


def _flattest(matrices: list[Tensor]) -> Tensor:
    return min(matrices, key=lambda m: float(m.abs().max()))
