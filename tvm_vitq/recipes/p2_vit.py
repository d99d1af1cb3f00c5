"""P2-ViT: all scales are powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe
from tvm_vitq.recipes.fq_vit import FQViT

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class P2ViT(Recipe):
    """P2-ViT (Shi et al., IEEE TVLSI 2024): `fq-vit`, each of whose scales becomes the power of two below or
    above it, whichever gives the smaller squared error of the layer's output. Requantization is a shift then,
    so the recipe implies ``requantize="shift"``.

    Departure: one width for all layers; the paper's mixed precision is what `overrides` are for.

    Parameters
    ----------
    attention_bits, zero : see `fq-vit`.
    images : calibration images that outputs are compared on.
    """

    name = "p2-vit"
    calibration_images: ClassVar[int] = 1000
    requantize: ClassVar[str | None] = "shift"
    attention_bits: int | None = 4
    zero: str = "reserved"
    images: int = 32

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.output_search import by_output
        from tvm_vitq.calibrate.samples import record
        from tvm_vitq.calibrate.shift import better_power_of_two

        FQViT(self.attention_bits, self.zero).fit(job)
        by_output(job, record(job, self.images), [better_power_of_two])
