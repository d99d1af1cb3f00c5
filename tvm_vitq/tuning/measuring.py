"""MetaSchedule's builder and runner: candidates go to worker processes, results become records at once."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerResult
from tvm.support.popen_pool import PopenPoolExecutor

from tvm_vitq.errors import VitqError
from tvm_vitq.schedules.space import scheduled
from tvm_vitq.targets import TargetProfile
from tvm_vitq.tuning import workers
from tvm_vitq.tuning.candidates import kernel_of, schedule_of
from tvm_vitq.tuning.records import Record
from tvm_vitq.tuning.tasks import Task

BUILD_SECONDS, RUN_SECONDS = 120, 120
"""Time limits of a candidate."""


class OutOfTime(Exception):
    """The budget of time is used up."""


class Measuring:
    """Worker processes, and what they have measured.

    Parameters
    ----------
    tasks : by name of the kernel.
    on_record : called with every finished candidate, in the order in which they finish.
    servers : devices behind the tracker; candidates are measured on that many at once, here on one at a time.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        profile: TargetProfile,
        device: workers.Device,
        on_record: Callable[[Record], None],
        builders: int = 1,
        servers: int = 1,
    ) -> None:
        self.tasks, self.profile, self.device, self.on_record = tasks, profile, device, on_record
        self.folder = tempfile.TemporaryDirectory(prefix="vitq-tune-")
        self.count = 0
        self.lock = threading.Lock()
        # Workers would look for modules in the working directory first, which may be a bare checkout.
        ready = (
            f"import sys; sys.path[:] = {sys.path!r}; from tvm_vitq.tuning import workers; workers.start()"
        )
        self.build_pool = PopenPoolExecutor(builders, BUILD_SECONDS, exec, (ready,))
        self.run_pool = PopenPoolExecutor(servers, RUN_SECONDS, exec, (ready,))

    def close(self) -> None:
        """Ends the workers and removes what they built."""
        for pool in (self.build_pool, self.run_pool):
            pool.shutdown(wait=False)
        self.folder.cleanup()

    def build(self, kernel: str, schedule: Mapping[str, Any] | None) -> Future:
        """Starts building a candidate; None for the default schedule. The result is the library's path."""
        self.count += 1
        path = Path(self.folder.name) / f"candidate{self.count}.so"
        return self.build_pool.submit(workers.build, self.spec(kernel, schedule), self.profile, str(path))

    def spec(self, kernel: str, schedule: Mapping[str, Any] | None) -> Any:
        """The kernel under a schedule."""
        spec = self.tasks[kernel].spec
        return spec if schedule is None else scheduled(spec, schedule)

    def run(self, path: str, kernel: str, schedule: Mapping[str, Any] | None) -> Future:
        """Starts checking and timing a candidate; its record is there when the future is done."""
        future = self._measure([path], kernel, [schedule])

        def finished(done: Future) -> None:
            Path(path).unlink(missing_ok=True)
            self.record(kernel, schedule, done)

        future.add_done_callback(finished)
        return future

    def compare(self, kernel: str, schedules: Sequence[Mapping[str, Any] | None], rounds: int) -> None:
        """Measures schedules in turns; their records say so. VitqError if one fails, which did not before."""
        built = [self.build(kernel, schedule) for schedule in schedules]
        try:
            paths = [future.result() for future in built]
            times = self._measure(paths, kernel, schedules, rounds).result()
        except Exception as error:
            raise VitqError(
                "the best schedules of a kernel could not be compared",
                where=kernel,
                got=_last_line(error),
                fix="what was found is kept: see that the device answers, and go on with --resume",
            ) from error
        for schedule, seconds in zip(schedules, times, strict=True):
            self.on_record(Record(kernel, schedule, seconds, final=True))

    def _measure(
        self, paths: Sequence[str], kernel: str, schedules: Sequence[Any], rounds: int = 1
    ) -> Future:
        task, specs = self.tasks[kernel], [self.spec(kernel, schedule) for schedule in schedules]
        candidates = [
            workers.Candidate(path, spec.name, task.operands(spec))
            for path, spec in zip(paths, specs, strict=True)
        ]
        return self.run_pool.submit(workers.measure, candidates, task.expected, self.device, rounds)

    def record(self, kernel: str, schedule: Mapping[str, Any] | None, done: Future) -> None:
        """Hands on what became of a candidate."""
        error = done.exception()
        with self.lock:
            if error is None:
                self.on_record(Record(kernel, schedule, done.result()[0]))
            else:
                self.on_record(Record(kernel, schedule, error=_last_line(error)))


def _last_line(error: BaseException) -> str:
    """Errors of workers are whole tracebacks."""
    return str(error).strip().split("\n")[-1][:300] or type(error).__name__


@derived_object
class Builder(PyBuilder):
    """Builds candidates of MetaSchedule; their place and meaning travel in the path of the artifact."""

    def __init__(
        self,
        measuring: Measuring,
        known: dict[str, tuple[str, Mapping[str, Any]]],
        deadline: float | None = None,
    ) -> None:
        super().__init__()
        self.measuring, self.known, self.deadline = measuring, known, deadline

    def build(self, inputs: Any) -> list[BuilderResult]:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime
        wanted = [(kernel_of(i.mod), i.mod) for i in inputs]
        schedules = [schedule_of(self.measuring.tasks[kernel].spec, mod) for kernel, mod in wanted]
        started = [
            self.measuring.build(kernel, schedule)
            for (kernel, _), schedule in zip(wanted, schedules, strict=True)
        ]
        results = []
        for (kernel, _), schedule, future in zip(wanted, schedules, started, strict=True):
            try:
                path = future.result()
                self.known[path] = kernel, schedule
                results.append(BuilderResult(path, None))
            except Exception as error:  # a candidate that does not build is a result
                self.measuring.record(kernel, schedule, future)
                results.append(BuilderResult(None, _last_line(error)))
        return results


@derived_object
class Waiting(PyRunnerFuture):
    """A candidate on its way."""

    def __init__(self, future: Future) -> None:
        super().__init__()
        self.future = future

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> RunnerResult:
        try:
            return RunnerResult(self.future.result()[0], None)
        except Exception as error:
            return RunnerResult(None, _last_line(error))


@derived_object
class Runner(PyRunner):
    """Measures what `Builder` built."""

    def __init__(self, measuring: Measuring, known: dict[str, tuple[str, Mapping[str, Any]]]) -> None:
        super().__init__()
        self.measuring, self.known = measuring, known

    def run(self, inputs: Any) -> list[ms.runner.RunnerFuture]:
        paths = [str(i.artifact_path) for i in inputs]
        started = [self.measuring.run(path, *self.known.pop(path)) for path in paths]
        if self.measuring.device.tracker is None:
            wait(started)  # or the next candidates would be built while these are timed
        return [Waiting(future) for future in started]
