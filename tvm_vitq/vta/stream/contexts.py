"""Places of tiles in the scratchpads: while one is in use, others are filled and stored."""

from __future__ import annotations

from collections.abc import Mapping

from tvm_vitq.vta.machine.config import Memory, VtaConfig


class Contexts:
    """Equal parts of the scratchpads, which take turns.

    Products that are emitted in turns have contexts of their own, or one would overwrite what another has
    loaded. Beside them are constants, at the end of the accumulators, and the last input, which is that of
    all biases.

    Parameters
    ----------
    count : of them.
    constants : accumulators that are no part of any.
    weights : that stay, at the end of the weights.
    share : (first, number, of): they fill `number` of `of` parts of the scratchpads, from `first` on.
    """

    def __init__(
        self,
        config: VtaConfig,
        count: int,
        constants: int = 0,
        share: tuple[int, int, int] = (0, 1, 1),
        weights: int = 0,
    ) -> None:
        first, number, of = share
        usable = {
            Memory.INP: config.depth(Memory.INP) - 1,
            Memory.WGT: config.depth(Memory.WGT) - weights,
            Memory.ACC: max(config.depth(Memory.ACC) - constants, 0),
        }
        self.count, self.constants, self.shared = count, constants, number < of
        self.room: Mapping[Memory, int] = {m: usable[m] * number // of // count for m in usable}
        """Elements of one context."""
        self._start = {m: usable[m] * first // of for m in usable}
        self._turn = dict.fromkeys(usable, 0)

    def next(self, memory: Memory, turn: bool = True) -> range:
        """The elements of the context whose turn it is, and on to the next one."""
        now = self._turn[memory]
        self._turn[memory] = (now + turn) % self.count
        start = self._start[memory] + now * self.room[memory]
        return range(start, start + self.room[memory])
