"""What calibration saw at a site, small enough to travel with the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tvm_vitq.errors import VitqError

BINS = 80
"""Bins of a histogram: as fine as a plot of a few hundred pixels shows."""


@dataclass(frozen=True)
class SiteStatistics:
    """Values of one operand and the error that its quantizer makes there.

    Parameters
    ----------
    sqnr : 10 log10(sum x**2 / sum (x - x^)**2) in dB; None: no error at all (weights that a recipe has
        rounded already).
    low, high : smallest and largest value seen.
    counts : values per bin; the bins divide [low, high] evenly.
    divergence : by width, in nats, the KL divergence of the prediction with only this layer quantized to it;
        measured where widths are chosen.
    """

    sqnr: float | None = None
    low: float = 0.0
    high: float = 0.0
    counts: list[int] = field(default_factory=list)
    divergence: dict[str, float] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """VitqError naming `where` if a field is outside its range."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise VitqError("low and high must be finite, low first", where=where, got=(self.low, self.high))
        if self.sqnr is not None and not math.isfinite(self.sqnr):
            raise VitqError("a ratio must be finite", where=f"{where}: sqnr", got=self.sqnr)
        if any(count < 0 for count in self.counts):
            raise VitqError("counts cannot be negative", where=f"{where}: counts", got=min(self.counts))
