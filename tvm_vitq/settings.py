"""Every environment variable that the package reads, declared once.

Each is read when asked for, so a test or a user can change it between calls.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Generic, TypeVar

from tvm_vitq.errors import VitqError

Value = TypeVar("Value", int, str)


@dataclass(frozen=True)
class Setting(Generic[Value]):
    """An environment variable with a type, a default and a sentence on what it does."""

    name: str
    default: Value
    meaning: str

    @property
    def value(self) -> Value:
        """The value now; raises VitqError if the text is not of the setting's type."""
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        try:
            return type(self.default)(text)
        except ValueError:
            raise VitqError(
                "environment variable has the wrong type",
                where=self.name,
                got=text,
                expected=type(self.default).__name__,
                fix=f"unset {self.name} or give it a value such as {self.default!r}",
            ) from None


DEBUG = Setting("VITQ_DEBUG", 0, "1: chosen target, 2: kernels, 3: TIR of each kernel, 4: generated assembly")
DUMP = Setting("VITQ_DUMP", "", "folder that receives the module after every pass")
VERIFY = Setting("VITQ_VERIFY", 0, "1: check attributes, dtypes and headroom after every pass")
THREADS = Setting(
    "VITQ_NUM_THREADS", 0, "threads of a compiled library; 0: -num-cores of its target, else one per core"
)
BIND = Setting(
    "TVM_BIND_THREADS",
    0,
    "1: TVM binds threads to cores of its choice, the calling one too, whatever taskset says",
)
SPIN = Setting(
    "TVM_THREAD_POOL_SPIN_COUNT",
    2000,
    "how often an idle thread of TVM offers its core to others before it sleeps; TVM's 300000 block programs "
    "that end, where others use the core, for minutes",
)
VTA_DRIVER = Setting(
    "VITQ_VTA_DRIVER",
    "",
    "shared library with VTA's C interface that runs what was compiled for VTA; default: -driver of the "
    "target, else the simulator",
)
CACHE = Setting("VITQ_CACHE", "", "folder for downloads that can be made again; default ~/.cache/tvm-vitq")

ALL: tuple[Setting, ...] = (DEBUG, DUMP, VERIFY, THREADS, BIND, SPIN, VTA_DRIVER, CACHE)
