"""Float fake-quantization of a plan: what the integer program approximates, without its fixed-point
interiors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import tvm

from tvm_vitq.calibrate.executor import Executor, Hooks
from tvm_vitq.errors import VitqError
from tvm_vitq.plan import QuantPlan, SiteQuantizer
from tvm_vitq.quantizers import codec_of
from tvm_vitq.quantizers.base import Array


class FakeQuantize(Hooks):
    """Replaces every operand of every matmul by its quantized value, differentiably.

    Parameters
    ----------
    sites : quantizers by site name; sites that are not in it stay in float.

    Attributes
    ----------
    parameters : by site, the tensors of its quantizer; set ``requires_grad`` on them to train them.
    """

    def __init__(self, sites: dict[str, SiteQuantizer]) -> None:
        self.sites = sites
        self.parameters = {
            name: {key: torch.from_numpy(v) for key, v in codec_of(site).parameters(site).items()}
            for name, site in sites.items()
        }

    def apply(self, site: str, x: torch.Tensor) -> torch.Tensor:
        if site not in self.sites:
            return x
        quantizer = self.sites[site]
        return codec_of(quantizer).fake_quantize(x, quantizer, self.parameters[site])

    def quantize(self, site: str, x: torch.Tensor) -> torch.Tensor:
        return self.apply(site, x)

    def weight(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        return self.apply(site, weight)

    def probs(self, site: str, probs: torch.Tensor) -> torch.Tensor:
        return self.apply(site, probs)


def simulate(mod: tvm.IRModule, plan: QuantPlan, chunk: int = 16) -> Callable[[Array], Array]:
    """The annotated module with the plan's quantizers as a function of float32 images [N, 3, H, W] to
    float32 logits.

    Weights are quantized once, here. VitqError if plan and module name different sites.
    """
    from tvm_vitq.relax_passes.sites import list_sites

    plan.check(site.name for site in list_sites(mod))
    executor = Executor(mod)
    hooks = FakeQuantize({name: site for name, site in plan.sites.items() if not name.endswith(".weight")})
    weights = FakeQuantize({name: site for name, site in plan.sites.items() if name.endswith(".weight")})
    for name in weights.sites:
        executor.constants[name] = weights.apply(name, executor.constants[name])

    def run(images: Array) -> Array:
        if images.ndim != 4:
            raise VitqError("input of the wrong shape", got=images.shape, expected="(N, 3, H, W)")
        with torch.no_grad():
            return executor.run(torch.as_tensor(np.asarray(images, np.float32)), hooks, chunk).numpy()

    return run
