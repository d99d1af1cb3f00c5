"""Random choice between two tensors, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def random_mask(shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """1 with probability `share` (to 1/256), else 0; a random byte per element is cheaper than a float."""
    count = math.prod(shape)
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return (words.view(torch.uint8)[:count] < round(256 * share)).float().view(*shape)


class Mix(torch.autograd.Function):
    """``torch.lerp(x, y, mask)`` for masks of zeros and ones, faster than `torch.where` and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return torch.lerp(x, y, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        to_y = gradient * ctx.saved_tensors[0]
        return gradient - to_y, to_y, None
