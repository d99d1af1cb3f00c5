"""IGQ-ViT: channels choose their quantizers image by image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.errors import VitqError
from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.statistics import Summary
    from tvm_vitq.site_rules import Granularities

SITES = ("layer_norm", "all")


@dataclass(frozen=True)
class IGQViT(Recipe):
    """Instance-aware group quantization (Moon et al., CVPR 2024; no released code).

    The input of a linear layer owns G quantizers; in each image every channel takes the one whose bounds are
    nearest to the channel's smallest and largest value (`quantizers.dynamic_group`). Bounds come from
    alternation on the channels of the calibration images (`calibrate.dynamic_groups`).

    Departures: LayerNorm scales per channel are folded as in `percentile` before channels are grouped, so
    that groups follow what differs between images; bounds are finally widened or narrowed where that lowers
    the squared error, weighted by the weights that read the channel; the image and inputs of a single token
    per image keep one scale. Rows of softmax, which the paper groups too, have scales of their own
    (`quantizers.row_maximum`), the limit of as many groups as rows. Operands of attention are per tensor. The
    budget of allocation counts what a group costs here, a scaled sum per output, instead of bit operations.
    All else as in `percentile`.

    Parameters
    ----------
    groups : quantizers of a site.
    sites : "layer_norm": inputs that are LayerNorm outputs; "all": the other inputs of linear layers as well,
        slower and better below 8 bits.
    fold : whether LayerNorm scales are folded first.
    allocate : whether the number of groups differs from site to site, at the same total cost
        (`calibrate.group_allocation`).
    """

    name = "igq-vit"
    calibration_images: ClassVar[int] = 32
    groups: int = 8
    sites: str = "all"
    fold: bool = True
    allocate: bool = False

    def granularities(self, requantize: str) -> Granularities:
        if requantize == "shift":
            raise VitqError(
                "scales that channels choose at run time are no powers of two",
                where="requantize",
                got=requantize,
                expected="multiply with recipe igq-vit",
            )
        return super().granularities(requantize)

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate.frame import percentile_frame

        if self.groups < 1:
            raise VitqError("groups must be 1 or more", where="groups of recipe igq-vit", got=self.groups)
        if self.sites not in SITES:
            where, expected = "sites of recipe igq-vit", ", ".join(SITES)
            raise VitqError("unknown kind of sites", where=where, got=self.sites, expected=expected)
        percentile_frame(job, fold=self.fold, special=self._groups)

    def _groups(self, job: Job, summaries: dict[str, Summary]) -> None:
        from tvm_vitq.calibrate.dynamic_groups import dynamic_sites, fit_groups, observe_channels
        from tvm_vitq.calibrate.group_allocation import allocate_groups

        channels = observe_channels(job, dynamic_sites(job, self.sites == "all"))
        if self.allocate:
            job.quantizers |= allocate_groups(job, channels, self.groups)
            return
        for site, found in job.progress(channels.items(), "groups"):
            job.quantizers[site] = fit_groups(found, job.specs[site].bits, self.groups)
