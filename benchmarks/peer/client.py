"""The parent's end of a worker process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from peer.interface import Job, Peer

BENCHMARKS = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VITQ_NUM_THREADS")


def environment(threads: int) -> dict[str, str]:
    """Of every worker: the package `peer` is found, and no library starts more threads than asked."""
    path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


class Client:
    """One engine in a process of its own; `state` is what it said of its preparation."""

    def __init__(self, peer: Peer, job: Job) -> None:
        self.peer = peer
        self.log = job.folder / f"{peer.name}.log"
        self._process: subprocess.Popen[str] | None = None
        missing = peer.missing()
        if missing:
            self.state: dict[str, Any] = {"status": "not installed", "note": ", ".join(missing)}
            return
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "peer.worker", peer.name, job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(job.threads),
            )
        self.state = self._answer()

    @property
    def ready(self) -> bool:
        """Whether it can be measured."""
        return self.state["status"] == "ready"

    def measure(self, **request: Any) -> dict[str, Any]:
        """See `worker.measure`; an engine that dies is marked as failed and returns an empty answer."""
        if self._process is None or self._process.stdin is None:
            raise RuntimeError(f"{self.peer.name} has no process")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says so
        answer = self._answer()
        if "wall" not in answer:
            self.state = answer
            return {}
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _answer(self) -> dict[str, Any]:
        if self._process is None or self._process.stdout is None:
            raise RuntimeError(f"{self.peer.name} has no process")
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        return {"status": "failed", "note": f"process ended with {self._process.wait()}, see {self.log.name}"}
