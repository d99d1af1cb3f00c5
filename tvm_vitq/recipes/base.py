"""What a recipe is: one method, as steps of `tvm_vitq.calibrate` in order."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from tvm_vitq.calibrate.job import Job


@dataclasses.dataclass(frozen=True)
class Recipe(ABC):
    """A calibration method; its dataclass fields are the method's parameters and go into the plan.

    A subclass composes shared steps: observe the statistics it needs, choose ranges, change constants of the
    module, fill ``job.quantizers`` for every site. It lives in a file of its own and is listed in
    ``recipes/__init__.py``.
    """

    name: ClassVar[str]

    @abstractmethod
    def fit(self, job: Job) -> None:
        """Fit every quantizer of the job and fill its ranges."""

    def parameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
