"""The machine: sizes from a VTA JSON configuration, and everything derived from them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from tvm_vitq.errors import VitqError, nearest


class Memory(IntEnum):
    """Scratchpads. ACC_8BIT loads bytes into ACC, in some implementations."""

    UOP = 0
    WGT = 1
    INP = 2
    ACC = 3
    OUT = 4
    ACC_8BIT = 5


class Board(NamedTuple):
    """What a TARGET of configuration files stands for.

    megahertz : the clock;  bus_bits : width of the memory port;  burst_beats : beats of the longest burst.
    """

    megahertz: int
    bus_bits: int
    burst_beats: int


BOARDS: Mapping[str, Board] = {
    "sim": Board(100, 64, 256),
    "tsim": Board(100, 64, 16),
    "pynq": Board(100, 64, 256),
    "de10nano": Board(100, 64, 16),
    "ultra96": Board(333, 128, 256),
    "zcu104": Board(333, 128, 256),
    "intelfocl": Board(100, 64, 256),
}

KEYS = (
    *("LOG_INP_WIDTH", "LOG_WGT_WIDTH", "LOG_ACC_WIDTH", "LOG_BATCH", "LOG_BLOCK"),
    *("LOG_UOP_BUFF_SIZE", "LOG_INP_BUFF_SIZE", "LOG_WGT_BUFF_SIZE", "LOG_ACC_BUFF_SIZE"),
)
"""Numbers of a configuration file, all logarithms to base 2: bits of values, rows and columns of a block,
bytes of scratchpads.
"""

PAGE = 4096
"""Bytes. Allocations start at multiples, so that every element is aligned to its size."""

LEAST_LOG_BLOCK = 2
"""Of machines to compile for: tiles of fewer rows would meet the results that are still in the pipeline."""

UOP_BYTES = 4
INSTRUCTION_BYTES = 16
PORTABLE_UOPS = 2048
"""Micro-ops that every implementation has room for; the Chisel design has no more in its default core."""


@dataclass(frozen=True)
class VtaConfig:
    """A VTA. Elements are what one index of a scratchpad addresses: a row of `block` inputs or results, a
    square of weights, a micro-op.

    Parameters
    ----------
    target : one of `BOARDS`.
    log_block : log2 of the channels of an element, 4 in all published designs.
    log_uop_bytes, log_inp_bytes, log_wgt_bytes, log_acc_bytes : log2 of the scratchpads' sizes.
    """

    target: str = "sim"
    log_block: int = 4
    log_uop_bytes: int = 15
    log_inp_bytes: int = 15
    log_wgt_bytes: int = 18
    log_acc_bytes: int = 17

    def __post_init__(self) -> None:
        u, i, w, a = self.log_uops, self.log_inps, self.log_wgts, self.log_accs
        limits = (
            (min(u, i, w, a) >= 1, "at least two elements in every scratchpad"),
            (u <= 13, f"at most 2^13 micro-ops, LOG_UOP_BUFF_SIZE <= 15 (2^{u} given)"),
            (a <= 11, f"at most 2^11 accumulators of {4 * self.block} bytes (2^{a} given)"),
            (i <= a, f"no more inputs than accumulators: one field of micro-ops holds either (2^{i}, 2^{a})"),
            (a + i + w <= 32, f"steps of GEMM instructions in 64 bits ({2 * (a + i + w)} needed)"),
            (2 * a + w <= 32, f"indices of a micro-op in 32 bits ({2 * a + w} needed)"),
        )
        for holds, expected in limits:
            if not holds:
                raise VitqError(
                    "VTA configuration does not fit the instruction format",
                    where="VTA configuration",
                    got=self.text,
                    expected=expected,
                    fix="shrink a scratchpad (LOG_*_BUFF_SIZE)",
                )

    @property
    def block(self) -> int:
        """Channels of an input, rows and columns of a weight element, channels of an accumulator."""
        return 1 << self.log_block

    @property
    def log_uops(self) -> int:
        """log2 of the micro-ops that fit."""
        return self.log_uop_bytes - 2

    @property
    def log_inps(self) -> int:
        """log2 of the input elements that fit."""
        return self.log_inp_bytes - self.log_block

    @property
    def log_wgts(self) -> int:
        """log2 of the weight elements that fit."""
        return self.log_wgt_bytes - 2 * self.log_block

    @property
    def log_accs(self) -> int:
        """log2 of the accumulators that fit, and of the results."""
        return self.log_acc_bytes - 2 - self.log_block

    def element_bytes(self, memory: int) -> int:
        """Bytes of an element in device memory: int8 of a block, int8 [output channel][input channel], int32
        of a block, or a micro-op.
        """
        if memory == Memory.UOP:
            return UOP_BYTES
        if memory == Memory.WGT:
            return self.block**2
        return 4 * self.block if memory == Memory.ACC else self.block

    def depth(self, memory: int) -> int:
        """Elements that a scratchpad holds."""
        logs = {Memory.UOP: self.log_uops, Memory.INP: self.log_inps, Memory.WGT: self.log_wgts}
        return 1 << logs.get(Memory(memory), self.log_accs)

    @property
    def board(self) -> Board:
        """Clock and memory port."""
        return BOARDS[self.target]

    @property
    def text(self) -> str:
        """The name by which upstream's tools call these sizes."""
        sizes = (self.log_uop_bytes, self.log_inp_bytes, self.log_wgt_bytes, self.log_acc_bytes)
        return f"1x{self.block}_i8w8a32_" + "_".join(map(str, sizes))

    @property
    def name(self) -> str:
        """Board and sizes, as `named_config` reads them."""
        return f"{self.target}-{self.text}"

    def to_json(self) -> dict[str, Any]:
        """The configuration file's content."""
        values = (3, 3, 5, 0, self.log_block)
        sizes = (self.log_uop_bytes, self.log_inp_bytes, self.log_wgt_bytes, self.log_acc_bytes)
        return {
            "TARGET": self.target,
            "HW_VER": "0.0.2",
            **dict(zip(KEYS, (*values, *sizes), strict=True)),
        }


def named_config(name: str) -> VtaConfig | None:
    """The machine of a `VtaConfig.name`; None if it is no such name."""
    found = re.fullmatch(r"(\w+)-1x(\d+)_i8w8a32_(\d+)_(\d+)_(\d+)_(\d+)", name)
    if found is None or found[1] not in BOARDS:
        return None
    block, *sizes = map(int, found.groups()[1:])
    return VtaConfig(found[1], block.bit_length() - 1, *sizes) if block and not block & (block - 1) else None


def read_config(path: str | Path) -> VtaConfig:
    """The machine that a JSON file describes.

    Raises
    ------
    VitqError : no such file, no JSON object, unknown or missing keys, values that are no whole numbers,
        widths or batches other than 8-bit operands, 32-bit accumulators and one row, sizes that the
        instruction format cannot address.
    """
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise VitqError(
            "cannot read the VTA configuration",
            where=file,
            got=error.strerror,
            expected=f"a JSON file, or a name such as {VtaConfig().name}, of a board {', '.join(BOARDS)}",
        ) from error
    except ValueError as error:
        raise VitqError("VTA configuration is not JSON", where=file, got=error) from error
    return config_from(data, str(file))


def config_from(data: Any, where: str = "VTA configuration") -> VtaConfig:
    """As `read_config`, from the file's content."""
    wrong = functools.partial(VitqError, where=where)
    if not isinstance(data, dict):
        raise wrong("VTA configuration is no JSON object", got=type(data).__name__)
    known = {"TARGET", "HW_VER", *KEYS}
    for key in data:
        if key not in known:
            raise wrong(
                "VTA configuration has an unknown key", got=key, expected=nearest(key, known) or sorted(known)
            )
    missing = [key for key in ("TARGET", *KEYS) if key not in data]
    if missing:
        raise wrong("VTA configuration lacks keys", expected=", ".join(missing))
    if data["TARGET"] not in BOARDS:
        raise wrong("unknown VTA TARGET", got=data["TARGET"], expected=", ".join(BOARDS))
    for key in KEYS:
        if type(data[key]) is not int or not 0 <= data[key] <= 40:
            raise wrong(f"{key} is not a small whole number", got=data[key], expected="log2 of a size")
    for key, only, meaning in (
        ("LOG_INP_WIDTH", 3, "inputs of 8 bits"),
        ("LOG_WGT_WIDTH", 3, "weights of 8 bits"),
        ("LOG_ACC_WIDTH", 5, "accumulators of 32 bits"),
        ("LOG_BATCH", 0, "one row for each element, which every implementation has"),
    ):
        if data[key] != only:
            raise wrong(f"{key} is not supported", got=data[key], expected=f"{only}: {meaning}")
    return VtaConfig(data["TARGET"], *(data[key] for key in KEYS[4:]))
