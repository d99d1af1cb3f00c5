"""A stream with the tensors that it takes and leaves."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_vitq.vta.stream.assembler import Stream
from tvm_vitq.vta.stream.operand import Operand


@dataclass
class Launch:
    """One run of the machine, as the host sees it: tensors in, tensors out.

    macs : multiply-accumulates of its products, padding left out.
    """

    stream: Stream
    inputs: list[Operand]
    outputs: list[Operand]
    macs: int
