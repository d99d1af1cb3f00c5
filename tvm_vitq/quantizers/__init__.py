"""Quantizers: one codec per file, a formula in NumPy and the same formula differentiable in torch.

A new quantizer is one new file with a `Codec` subclass and one line in `CODECS`.
"""

from __future__ import annotations

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.quantizers.adalog import AdaLog
from tvm_vitq.quantizers.base import Codec
from tvm_vitq.quantizers.dynamic_group import DynamicGroup
from tvm_vitq.quantizers.lloyd_max import LloydMax
from tvm_vitq.quantizers.log2 import Log2
from tvm_vitq.quantizers.log_int_softmax import LogIntSoftmax
from tvm_vitq.quantizers.log_sqrt2 import LogSqrt2
from tvm_vitq.quantizers.outliers import UniformOutliers
from tvm_vitq.quantizers.row_maximum import RowMaximum
from tvm_vitq.quantizers.shift_log2 import ShiftLog2
from tvm_vitq.quantizers.shift_uniform_log2 import ShiftUniformLog2
from tvm_vitq.quantizers.tangent import Tangent
from tvm_vitq.quantizers.twin_uniform import TwinUniform
from tvm_vitq.quantizers.twin_uniform_gelu import TwinUniformGelu
from tvm_vitq.quantizers.uniform import Uniform

ALL: tuple[Codec, ...] = (
    Uniform(),
    UniformOutliers(),
    RowMaximum(),
    DynamicGroup(),
    Log2(),
    LogIntSoftmax(),
    LogSqrt2(),
    AdaLog(),
    ShiftLog2(),
    ShiftUniformLog2(),
    Tangent(),
    TwinUniform(),
    TwinUniformGelu(),
    LloydMax(),
)

CODECS: dict[str, Codec] = {codec.name: codec for codec in ALL}


def codec_of(site: SiteQuantizer, where: str = "codec") -> Codec:
    """The codec of a site; VitqError naming `where` if its name is unknown."""
    if site.codec not in CODECS:
        raise VitqError(
            "unknown codec",
            where=where,
            got=site.codec,
            expected=nearest(site.codec, CODECS) or ", ".join(CODECS),
        )
    return CODECS[site.codec]


__all__ = ["CODECS", "Codec", "RowMaximum", "Uniform", "codec_of"]
