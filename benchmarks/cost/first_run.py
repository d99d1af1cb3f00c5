"""Load a library and run it once in a fresh process without torch or timm: `python -m cost.first_run FOLDER`.

Prints one line of JSON; "ready" is the moment the logits were there, on the clock of the parent.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BLOCKED = ("torch", "torchvision", "timm")


def main(folder: Path) -> None:
    """Times each step in seconds and compares the logits with those of the process that built the library."""
    start = time.perf_counter()
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]  # makes `import name` raise ImportError
    import numpy as np

    import tvm_vitq

    image = np.load(folder / "images.npy", mmap_mode="r")[:1].copy()
    imported = time.perf_counter()
    library = tvm_vitq.load_library(folder / "library.so")
    loaded = time.perf_counter()
    logits = library(image)
    done, ready = time.perf_counter(), time.monotonic()
    library(image)
    answer = {
        "import": imported - start,
        "load": loaded - imported,
        "first_call": done - loaded,
        "second_call": time.perf_counter() - done,
        "ready": ready,
        "cpu": time.process_time(),
        "same_bits": bool(np.array_equal(logits, np.load(folder / "answer.npy"))),
        "blocked": [name for name in BLOCKED if sys.modules.get(name) is None],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
