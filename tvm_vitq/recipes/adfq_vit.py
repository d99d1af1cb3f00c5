"""ADFQ-ViT: LayerNorm outputs by token with outliers, shifted logarithms, attention-aware reconstruction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tvm_vitq.recipes.base import Recipe

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job
    from tvm_vitq.calibrate.statistics import Summary


@dataclass(frozen=True)
class ADFQViT(Recipe):
    """ADFQ-ViT (Jiang et al., Neural Networks 2025, arXiv 2407.02763).

    Per-patch outlier-aware quantizer: LayerNorm outputs have a scale and zero point per token position, from
    the values up to `threshold`. Shift-log2 quantizer: powers of the square root of two of outputs of GELU
    plus a constant, which goes into the bias behind. Softmax probabilities: powers of the square root of two.
    q, k and v: steps and zero points searched together by the error to the power 2.4. All else: percentiles,
    weights per output channel. Attention-score enhanced module-wise optimization: attention and MLP one by
    one, roundings and activation scales trained on the squared error and, for attention, the divergence of
    its maps, with half of each input dropped to float.

    Departures: outliers are not kept in float beside the matmul but get the codes of a byte that b bits leave
    free, with the step of all others (`quantizers.outliers`); where the largest do not fit, that step is
    widened by the squared error. So operands with outliers are bytes whose inliers have b bits, and outliers
    a hundred times as large as the rest cost their neighbours resolution, which the paper's do not. 8 bits
    leave no codes free: values are ranged as elsewhere. The LayerNorms in front of reductions and head, which
    the paper leaves alone, are treated likewise, per tensor where there are no tokens. The shift is GELU's
    minimum instead of each tensor's at run time. The divergence is taken along keys from the float map to the
    quantized one (released code swaps them and takes it along heads), without a temperature.

    Parameters
    ----------
    threshold : largest magnitude that is no outlier.
    widest : channels that exceed so many thresholds are divided by a power of two.
    zero : see `repq-vit`; of both logarithms.
    iterations, batch : steps per module, images per step.
    drop : share of a module's input that stays in float in a step.
    divergence : weight of the attention maps' divergence.
    """

    name = "adfq-vit"
    calibration_images: ClassVar[int] = 1024
    trains: ClassVar[bool] = True
    threshold: float = 5.0
    widest: float = 2.0
    zero: str = "reserved"
    iterations: int = 300
    batch: int = 16
    drop: float = 0.5
    divergence: float = 0.1

    def fit(self, job: Job) -> None:
        from tvm_vitq.calibrate import fit, outliers, searches
        from tvm_vitq.calibrate.blocks import find_units
        from tvm_vitq.calibrate.losses import AttentionDivergence
        from tvm_vitq.calibrate.observe import observe
        from tvm_vitq.calibrate.probabilities import fit_log_sqrt2
        from tvm_vitq.calibrate.reconstruct import Settings, reconstruct
        from tvm_vitq.calibrate.reparameterize import find_folds, limit_channels, observe_with_folds

        rule = searches.percentile()
        folds = find_folds(job)
        observe_with_folds(job, folds, {}, 0.0)
        limit_channels(job, folds, self.widest * self.threshold)
        norms = outliers.norm_sites(job)
        outliers.ask_for_tokens(job, norms)
        norms = [site for site in norms if job.specs[site.name].bits < 8]
        views = fit.activation_views(job) | fit.probability_views(job, softmax=True)
        views |= {site.name: replace(views[site.name], within=self.threshold) for site in norms}
        summaries = observe(job, views, 1.0 - min(searches.PERCENTILES))
        outliers.fit_outliers(job, norms, summaries, rule)
        fit_log_sqrt2(job, summaries, searches.PERCENTILES, self.zero)
        self._shifted_logarithms(job, summaries)
        fit.fit_activations(job, summaries, searches.plane(), ("q", "k", "v"))
        fit.fit_activations(job, summaries, rule)
        fit.fit_probabilities(job, summaries, rule)
        fit.fit_weights(job, rule)
        loss = AttentionDivergence(self.divergence)
        settings = Settings(self.iterations, self.batch, self.drop, drop=0.0, loss=loss)
        reconstruct(job, find_units(job.mod, "module"), settings)

    def _shifted_logarithms(self, job: Job, summaries: dict[str, Summary]) -> None:
        from tvm_vitq.calibrate.codebooks import fit_codebook
        from tvm_vitq.calibrate.fit import gelu_sites
        from tvm_vitq.calibrate.searches import PERCENTILES
        from tvm_vitq.plan import SiteQuantizer
        from tvm_vitq.quantizers.codebook import GELU_SHIFT

        for site, spec in gelu_sites(job, "shift_log2"):
            summary = summaries[site.name]
            scales = [float(summary.quantiles(p)[1]) + GELU_SHIFT for p in PERCENTILES]
            params = {"shift": GELU_SHIFT, "zero": self.zero}
            given = SiteQuantizer(spec.bits, [1.0], [0], "shift_log2", params=params)
            job.quantizers[site.name] = fit_codebook(summary, given, scales=scales, rounds=0)[0]
