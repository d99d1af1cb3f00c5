"""RepQ-ViT: per-channel LayerNorm outputs made per-tensor, logarithmic probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.statistics import Summary


@dataclass(frozen=True)
class RepQViT(Recipe):
    """RepQ-ViT (Li et al., ICCV 2023, sections 3.2 and 3.3).

    Ranges at every width are those of three quantiles with the smallest squared error, of weights per output
    channel. LayerNorm outputs are quantized per channel, ``(s, z)``, and reparameterized to one scale
    ``mean(s)`` and one zero point ``mean(z)`` (`calibrate.reparameterize`). Softmax probabilities: ``s *
    2**(-k / 2)``, ``k = round(-2 log2(p / s))``, where s is one of the three quantiles.

    Departures: the common zero point is whole, as exactness demands (the released code rounds on a shifted
    lattice); weights of 8 bits are symmetric; every site is fitted to float inputs, not to quantized ones.

    Parameters
    ----------
    percentiles : candidates for the upper end; the lower end is at one minus each.
    zero : "reserved": zero is one of the 2**bits codes of a probability; "implicit": it is one more level, as
        in the released code.
    target : see `calibrate.reparameterize.TARGETS`.
    """

    name = "repq-vit"
    calibration_images: ClassVar[int] = 32
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    zero: str = "reserved"
    target: str = "mean"

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import searches
        from tvm_vitq.calibrate.frame import Rules, fit_frame

        rule = searches.percentile(self.percentiles)
        tail = 1.0 - min(self.percentiles)
        fit_frame(job, Rules(rule, rule, rule, rule, tail, self.target), self._logarithms, softmax=True)

    def _logarithms(self, job: Job, summaries: dict[str, Summary]) -> None:
        from tvm_vitq.calibrate.probabilities import fit_log_sqrt2

        fit_log_sqrt2(job, summaries, self.percentiles, self.zero)
