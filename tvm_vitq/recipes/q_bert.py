"""Q-BERT: one scale for a group of a weight's rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tvm_vitq.errors import VitqError
from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclass(frozen=True)
class QBert(Recipe):
    """The group-wise weights of Q-BERT (Shen et al., AAAI 2020): the output channels of every layer are cut
    into at most `groups` equal parts, each with one scale from its largest weight. Activations are those of
    `percentile`, folded LayerNorm scales included.

    Departures: no retraining and no mixed precision; cuts do not look at heads. A layer of fewer output
    channels has one scale per channel, which is finer.

    Parameters
    ----------
    groups : per layer; where they do not divide its channels, the next smaller number that does.
    """

    name = "q-bert"
    groups: int = 128

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import percentile_frame
        from tvm_vitq.calibrate.searches import minmax, quantizer_numbers
        from tvm_vitq.calibrate.statistics import Summary

        if self.groups < 1:
            raise VitqError("groups must be 1 or more", where="groups of recipe q-bert", got=self.groups)
        percentile_frame(job)
        for site, spec in job.fitted_sites("weight"):
            if spec.granularity != "channel":
                job.notes[site.name] = f"not in groups of rows: asked for per {spec.granularity}"
                continue
            weight = job.weight(site.layer)
            count = next(n for n in range(min(self.groups, len(weight)), 0, -1) if len(weight) % n == 0)
            given = job.quantizers[site.name]
            low, high = minmax(Summary.of(weight.reshape(count, -1)), spec.bits, given.signed)
            numbers = quantizer_numbers(low, high, spec.bits, given.signed)
            scale, zero = (v.repeat(len(weight) // count).tolist() for v in numbers)
            job.quantizers[site.name] = replace(given, scale=scale, zero_point=zero)
