"""What checks return, and what they are told about device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tvm_vitq.numerics import Array


class Finding(NamedTuple):
    """One thing that is wrong.

    rule : its name;  position : of the instruction in the stream;  text : what happens there.
    """

    rule: str
    position: int
    text: str

    def __str__(self) -> str:
        return f"instruction {self.position}: {self.text} ({self.rule})"


@dataclass(frozen=True, eq=False)
class Region:
    """A piece of device memory that a stream may use.

    name : for messages.
    address, size : bytes.
    contents : uint8 [size] of what never changes: constants and micro-ops. None: written by the host before
        each run, or by the stream.
    written : whether it holds something when the stream starts.
    writable : whether the stream may store there.
    """

    name: str
    address: int
    size: int
    contents: Array | None = None
    written: bool = True
    writable: bool = False

    @property
    def end(self) -> int:
        """Address behind it."""
        return self.address + self.size


def region_of(regions: Sequence[Region], address: int) -> Region | None:
    """The region in which an address lies."""
    return next((region for region in regions if region.address <= address < region.end), None)
