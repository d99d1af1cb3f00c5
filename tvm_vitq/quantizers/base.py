"""What a quantizer is to the rest: a codec with parameters that are plain data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_vitq.plan import SiteQuantizer

Array = npt.NDArray


class Codec(ABC):
    """A pair of functions between real values and codes, with its parameters in a SiteQuantizer.

    A subclass states the formula twice: in NumPy for deployment (`encode`, `decode`) and for torch tensors
    (`fake_quantize`), where rounding passes gradients straight through. Both must agree. Torch is not
    imported: tensors bring their methods with them.
    """

    name: str

    @abstractmethod
    def parameters(self, site: SiteQuantizer) -> dict[str, Array]:
        """The parameters of a site as flat float32 arrays, by name; what reconstruction may train."""

    @abstractmethod
    def encode(self, x: Array, site: SiteQuantizer) -> Array:
        """int32 codes of a float array, ``qmin .. qmax``."""

    @abstractmethod
    def decode(self, codes: Array, site: SiteQuantizer) -> Array:
        """float32 values of codes."""

    @abstractmethod
    def fake_quantize(self, x: Any, site: SiteQuantizer, parameters: dict[str, Any]) -> Any:
        """``decode(encode(x))`` of a torch tensor, differentiable in x and `parameters` (flat tensors)."""

    def round_trip(self, x: Array, site: SiteQuantizer) -> Array:
        """``decode(encode(x))``."""
        return self.decode(self.encode(np.asarray(x, np.float32), site), site)
