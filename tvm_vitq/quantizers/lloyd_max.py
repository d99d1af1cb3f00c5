"""Free levels, placed where the data ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.codebook import GRID, Book, Codebook


class LloydMax(Codebook):
    """``x^ = scale / grid * levels[i] - shift`` with the level nearest to x.

    ``params["levels"]``: at least two and at most 2**bits different whole numbers 0 .. grid, ascending; as
    many of them as the fit found use for (`calibrate.lloyd_max`). Thresholds are the midpoints between
    neighbours; a midpoint belongs to the upper level. Behind a function table, and in the softmax of
    attention, arbitrary levels cost what any others cost, so nothing ties them to a formula.

    Lloyd, Least squares quantization in PCM (1982), conditions 1 and 2; Max (1960).
    """

    name = "lloyd_max"
    own = ("levels",)

    def with_step(self, site: SiteQuantizer, step: float) -> SiteQuantizer:
        """Levels stay where they are, up to half a step."""
        coarser = super().with_step(site, step)
        levels = np.rint(np.array(site.params["levels"]) * (site.scale[0] / coarser.scale[0]))
        return replace(coarser, params={**site.params, "levels": [int(v) for v in np.unique(levels)]})

    def book(self, bits: int, params: Mapping[str, Any]) -> Book:
        levels, grid = params.get("levels", []), params.get("grid", GRID)
        whole = isinstance(levels, list) and all(isinstance(v, int) and 0 <= v <= grid for v in levels)
        if not whole or not 2 <= len(levels) <= 2**bits or np.any(np.diff(levels) <= 0):
            raise VitqError(
                "malformed levels of a lloyd_max quantizer",
                where='params["levels"]',
                got=levels,
                expected=f"2 to {2**bits} ascending whole numbers from 0 to {grid}",
            )
        real = np.array(levels, np.float64) / grid
        return Book((real[1:] + real[:-1]) / 2, real)
