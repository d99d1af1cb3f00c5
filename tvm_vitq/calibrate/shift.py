"""Makes every scale a power of two, so that requantization is a shift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.output_search import Error, search
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


def better_power_of_two(site: str, quantizer: SiteQuantizer, x: Tensor, error: Error) -> SiteQuantizer:
    """A step of `output_search.by_output`: of the powers of two below and above each scale the better one.

    Zero points keep either their code or the lower end of the range in place. Codebooks stay as they are.
    """
    if quantizer.dynamic or isinstance(codec_of(quantizer), Codebook):
        return quantizer
    scale, zero = np.array(quantizer.scale, np.float64), np.array(quantizer.zero_point)
    options = []
    for direction in (np.ceil, np.floor):
        power = np.exp2(direction(np.log2(scale)))
        moved = np.clip(np.rint(scale * zero / power), quantizer.qmin, quantizer.qmax).astype(int)
        options += [replace(quantizer, scale=power.tolist(), zero_point=z.tolist()) for z in (zero, moved)]
    return search(options, x, error)
