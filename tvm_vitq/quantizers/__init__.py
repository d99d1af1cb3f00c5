"""Quantizers: one codec per file, a formula in NumPy and the same formula differentiable in torch.

A new quantizer is one new file with a `Codec` subclass and one line in `CODECS`.
"""

from __future__ import annotations

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.base import Codec
from tvm_vitq.quantizers.row_maximum import RowMaximum
from tvm_vitq.quantizers.uniform import Uniform

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Uniform(), RowMaximum())}


def codec_of(site: SiteQuantizer) -> Codec:
    """The codec of a site; VitqError if its name is unknown."""
    if site.codec not in CODECS:
        raise VitqError(
            "unknown codec",
            where="codec",
            got=site.codec,
            expected=nearest(site.codec, CODECS) or ", ".join(CODECS),
        )
    return CODECS[site.codec]


__all__ = ["CODECS", "Codec", "RowMaximum", "Uniform", "codec_of"]
