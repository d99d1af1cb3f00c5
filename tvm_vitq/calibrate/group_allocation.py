"""How many groups each layer gets: an integer program, solved exactly.

IGQ-ViT (Moon et al., CVPR 2024, section 3.3): of all choices that cost no more than equal numbers of groups,
the one with the smallest sum of what each layer's groups alone do to the prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tvm_vitq.calibrate.allocate import Option, allocate
from tvm_vitq.calibrate.dynamic_groups import Channels, fit_groups
from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.simulate import FakeQuantize
from tvm_vitq.plan import SiteQuantizer

IMAGES = 32
"""Calibration images that predictions are compared on."""


def candidates(groups: int) -> tuple[int, ...]:
    """Numbers of groups to choose from where equal ones would be `groups`: half to twice as many."""
    return tuple(sorted({max(1, round(groups * share)) for share in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)}))


def allocate_groups(job: Job, channels: dict[str, Channels], groups: int) -> dict[str, SiteQuantizer]:
    """Quantizers of all sites, with `groups` groups on average over what a group costs.

    The cost of a group is one more scaled sum for each output of the layers that read the site, tokens x
    outputs. The loss of a site at a number of groups is ``KL(float prediction || prediction with that site
    quantized and no other)``, averaged over images.
    """
    images = job.images[:IMAGES]
    choices = candidates(groups)
    with torch.no_grad():
        wanted = job.executor.run(images).log_softmax(-1)
        fitted, losses = {}, {}
        for site, found in job.progress(channels.items(), "allocation"):
            fitted[site] = [fit_groups(found, job.specs[site].bits, g) for g in choices]
            losses[site] = [_divergence(job, images, wanted, site, quantizer) for quantizer in fitted[site]]
    outputs = {site: 0 for site in channels}
    for name, one in job.sites.items():
        owner = job.aliases.get(name, name)
        if owner in outputs:
            outputs[owner] += len(job.weight(one.layer))
    unit = {site: channels[site].tokens * outputs[site] for site in channels}
    options = [
        [Option(g * unit[site], loss) for g, loss in zip(choices, losses[site], strict=True)]
        for site in channels
    ]
    chosen = allocate(options, groups * sum(unit.values()))
    return {site: fitted[site][index] for site, index in zip(channels, chosen, strict=True)}


def _divergence(job: Job, images: Tensor, wanted: Tensor, site: str, quantizer: SiteQuantizer) -> float:
    got = job.executor.run(images, FakeQuantize({site: quantizer}), chunk=IMAGES).log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())
