"""Makes every scale a power of two, so that requantization is a shift."""

from __future__ import annotations

import numpy as np

from tvm_vitq.calibrate.job import Job
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers import codec_of
from tvm_vitq.quantizers.codebook import Codebook


def to_powers_of_two(job: Job) -> None:
    """Round every scale up to a power of two, so that nothing more is clipped; zero points keep the lower
    end in place.

    Ratios and products of powers of two are powers of two, hence all requantization constants become shifts.
    Attention probabilities keep a range of at least [0, 1 - 2**-bits].
    """
    for name, quantizer in job.quantizers.items():
        if quantizer.dynamic:
            continue
        codec = codec_of(quantizer)
        if isinstance(codec, Codebook):
            grid, _ = codec.grid_and_shift(quantizer)
            step = float(np.exp2(np.ceil(np.log2(quantizer.scale[0] / grid) - 1e-9)))
            job.quantizers[name] = codec.with_step(quantizer, step)
            continue
        scale = np.array(quantizer.scale, np.float64)
        rounded = np.exp2(np.ceil(np.log2(scale) - 1e-9))
        low = -scale * np.array(quantizer.zero_point)
        zero = np.clip(np.rint(-low / rounded), quantizer.qmin, quantizer.qmax).astype(int)
        if name.endswith(".probs"):
            rounded = np.exp2(np.rint(np.log2(scale)))
        job.quantizers[name] = SiteQuantizer(
            quantizer.bits,
            rounded.tolist(),
            [0] * len(zero) if quantizer.signed else zero.tolist(),
            quantizer.codec,
            quantizer.signed,
            quantizer.granularity,
            quantizer.axis,
            quantizer.group_size,
        )
