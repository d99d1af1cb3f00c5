"""State of one calibration: what recipes read and fill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

from tvm_vitq.calibrate.executor import Executor, Hooks
from tvm_vitq.errors import VitqError
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.relax_passes.constants import replace_constants
from tvm_vitq.relax_passes.replace_activations import replace_activations
from tvm_vitq.relax_passes.sites import Site, list_sites
from tvm_vitq.site_rules import SiteSpec

CHUNK = 8
"""Images computed at once: enough to keep BLAS busy, few enough that no tensor of ViT-B exceeds 20 MB."""

PARAMETERS = ("weight", "bias", "gamma", "beta")
"""Constants that are trained; others, such as attention masks, may hold infinity."""


@dataclass(frozen=True)
class Cost:
    """What a step of training took: iterations over all units, wall-clock seconds."""

    iterations: int
    seconds: float

    def __str__(self) -> str:
        trained = f"{self.iterations} iterations in " if self.iterations else ""
        return f"{trained}{self.seconds:.1f} s"


@dataclass
class Job:
    """One calibration under way.

    Parameters
    ----------
    mod : the annotated module; `replace` changes its constants.
    specs, aliases : what each site asks for, and which sites share the quantizer of another.
    images : float32 [N, 3, H, W].
    work : folder that keeps what long steps have finished, to resume from; None: nothing is kept.

    Attributes
    ----------
    quantizers : what the recipe fitted, by site; the recipe must fill all but the aliases.
    ranges : largest magnitude of every variable of the float graph.
    channel_ranges : smallest and largest value per channel, [C] each, of the variables that `observe` was
        asked for.
    notes : what was declined or changed, with the reason, by site or layer.
    costs : of the steps that train, by their label.
    """

    mod: tvm.IRModule
    specs: dict[str, SiteSpec]
    aliases: dict[str, str]
    images: torch.Tensor
    seed: int = 0
    show_progress: bool = True
    work: Path | None = None
    quantizers: dict[str, SiteQuantizer] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)
    channel_ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.executor = Executor(self.mod)
        self.sites: dict[str, Site] = {site.name: site for site in list_sites(self.mod)}
        self.generator = torch.Generator().manual_seed(self.seed)
        for name, value in self.executor.constants.items():
            if name.rpartition(".")[2] in PARAMETERS and not bool(torch.isfinite(value).all()):
                raise VitqError("weights hold NaN or infinity", where=name, fix="check the checkpoint")

    @property
    def batches(self) -> int:
        """Batches of the graph that hold all images; the last may repeat some."""
        return math.ceil(len(self.images) / self.executor.batch)

    def fitted_sites(self, *roles: str) -> Iterator[tuple[Site, SiteSpec]]:
        """Sites of these roles that need a quantizer of their own."""
        for name, site in self.sites.items():
            if site.role in roles and name not in self.aliases:
                yield site, self.specs[name]

    def run(self, hooks: Hooks, about: str) -> None:
        """One pass over all images without gradients."""
        chunk = max(CHUNK // self.executor.batch, 1) * self.executor.batch
        with torch.no_grad():
            for part in self.progress(self.images.split(chunk), about):
                self.executor.run(part, hooks)

    def weight(self, layer: str) -> torch.Tensor:
        """The [N, K] weight of a linear layer."""
        return self.executor.constants[f"{layer}.weight"]

    def replace(self, changed: dict[str, np.ndarray]) -> None:
        """Replace constants of the module ("<layer>.weight", ".bias", ".gamma", ".beta" and others, as the
        executor names them), keeping shapes and types.
        """
        self.mod = replace_constants(self.mod, changed)
        self.executor = Executor(self.mod)

    def replace_activations(self, kinds: dict[str, str]) -> None:
        """Give vitq.activation of these layers other functions."""
        self.mod = replace_activations(self.mod, kinds)
        self.executor = Executor(self.mod)
        self.sites = {site.name: site for site in list_sites(self.mod)}

    def progress(self, items: Any, about: str) -> Any:
        """`items` with a progress bar that shows the time left."""
        from tqdm import tqdm

        return tqdm(items, desc=about, disable=not self.show_progress, leave=False, dynamic_ncols=True)

    def check_finished(self) -> None:
        """VitqError if the recipe left a site without quantizer: a mistake in the recipe."""
        missing = [n for n in self.sites if n not in self.quantizers and n not in self.aliases]
        if missing:
            raise VitqError("the recipe fitted no quantizer", where=", ".join(missing[:5]))
