"""Autotuning: search spaces, tasks, records, the run, and builds that use what it found."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tvm_vitq
from tvm_vitq import refmodels, targets, tuning_logs
from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Output
from tvm_vitq.schedules.linear import Linear
from tvm_vitq.schedules.space import scheduled, space_of
from tvm_vitq.tuning.apply import VTA_FOLDER, TunedSchedules, find_runs
from tvm_vitq.tuning.measuring import Measuring
from tvm_vitq.tuning.records import Record, Run, Writer, best, read_run, target_name
from tvm_vitq.tuning.tasks import find_tasks
from tvm_vitq.tuning.workers import Device

HERE = targets.parse("llvm")
RUNNABLE = [p for p in map(targets.parse, targets.ALIASES) if not p.missing_here()]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return tvm_vitq.quantize("refmodel:vit", recipe="minmax", calibration=refmodels.calibration_images(8),
                             progress=False)  # fmt: skip


@pytest.fixture(scope="module")
def model_file(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "vit.vitq"
    quantized.save(path)
    return path


@pytest.fixture(scope="module")
def tasks(quantized):
    return find_tasks(quantized, HERE)


def first_schedule(spec):
    return {name: candidates[0] for name, candidates in space_of(spec).items()}


@pytest.mark.parametrize("isa", targets.ISAS, ids=lambda isa: isa.name)
def test_spaces_have_the_default_tile_and_fit_the_registers(isa):
    spec = Linear(isa.name, m=197, n=384, k=192, out=Output("int8", -128, 127))
    space = space_of(spec)
    assert [spec.tiles.rows, spec.tiles.columns] in space["register_tile"]
    assert all(columns % 16 == 0 for _, columns in space["register_tile"])
    assert max(space["block_rows"]) == 197  # a task may take all rows, so that weights are read once
    one_row = replace(spec, m=1)
    assert space_of(one_row)["register_tile"] and space_of(one_row)["block_rows"] == [1]


def test_a_schedule_of_another_space_is_refused(tasks):
    spec = tasks[0].spec
    good = first_schedule(spec)
    assert scheduled(spec, good).name != spec.name
    for bad in ({**good, "unroll": 77}, {**good, "more": 1}, {"unroll": 77}):
        with pytest.raises(VitqError, match="not a schedule of this kernel"):
            scheduled(spec, bad)


def test_tasks_are_the_kernels_of_the_model_once_each(quantized, tasks):
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names)
    report = tvm_vitq.compile(quantized, tuning_logs=False).report
    calls = {k["name"]: k["calls"] for k in report["kernels"]}
    assert {task.name: task.calls for task in tasks}.items() <= calls.items()
    assert {k["schedule"] for k in report["kernels"]} == {"default"}


@pytest.mark.parametrize("model", ["refmodel:vit", "refmodel:swin"])
@pytest.mark.parametrize("profile", RUNNABLE, ids=lambda profile: profile.key)
def test_any_schedule_gives_what_numerics_gives(model, profile, tmp_path):
    """Kernels with tables, residuals and views, on random operands: a few random schedules of each."""
    from tvm_vitq.tuning import workers

    images = refmodels.calibration_images(8)
    small = tvm_vitq.quantize(model, recipe="minmax", calibration=images, progress=False)
    rng = np.random.default_rng(1)
    once = Device(threads=1, repeat=1, least_ms=0)
    seen = set()
    for task in find_tasks(small, profile):
        kind = re.sub(r"\d+", "", task.name)
        if kind in seen:
            continue
        seen.add(kind)
        space = space_of(task.spec)
        for _ in range(2):
            spec = scheduled(task.spec, {name: c[rng.integers(len(c))] for name, c in space.items()})
            path = workers.build(spec, profile, str(tmp_path / f"{spec.name}.so"))
            workers.measure([workers.Candidate(path, spec.name, task.operands(spec))], task.expected, once)


def test_records_are_read_back_and_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    writer = Writer(path, "x", {"device": "d"})
    writer.add(Record("k", {"unroll": 1}, [2.0, 1.0]))
    writer.add(Record("k", None, error="broken"))
    with path.open("a") as file:
        file.write('{"kernel": "k", "sched')
    run = read_run(path)
    assert run.target == "x" and run.about == {"device": "d"}
    assert run.records == [Record("k", {"unroll": 1}, [2.0, 1.0]), Record("k", None, error="broken")]
    Writer(path, "x", {}).add(Record("k", {"unroll": 2}, [3.0]))
    assert [r.schedule for r in read_run(path).records] == [{"unroll": 1}, None, {"unroll": 2}]


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"format": "tvm-vitq tuning records"}\n'])
def test_damaged_records_are_refused(tmp_path, text):
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(VitqError, match="not a file of tuning records"):
        read_run(path)


def test_the_best_record_is_the_fastest_of_those_compared_in_turns():
    lucky, a, b = (
        Record("k", {"u": 1}, [1.0]),
        Record("k", {"u": 2}, [2.5, 2.0]),
        Record("k", None, [3.0, 2.1]),
    )
    assert best([lucky, a]) == {"k": lucky}
    final = [replace(a, final=True), replace(b, final=True)]
    assert best([lucky, *final]) == {"k": final[0]}
    assert best([Record("k", None, error="x")]) == {}
    default, hardly = Record("k", None, [2.0], final=True), Record("k", {"u": 1}, [1.99], final=True)
    assert best([default, hardly]) == best([hardly, default]) == {"k": default}


def test_records_of_as_many_threads_go_first(tmp_path):
    def run(threads, **seconds):
        records = [Record(kernel, {"u": threads}, [value]) for kernel, value in seconds.items()]
        return Run(tmp_path, "x", {"threads": threads}, records)

    runs = [run(1, a=4.0, b=4.0, c=4.0), run(2, a=2.0, b=2.0), run("one per core", a=3.0)]

    def taken(threads):
        found = TunedSchedules(runs, threads).records
        return [found[kernel].schedule["u"] for kernel in "abc"]

    assert taken(1) == [1, 1, 1]
    assert taken(2) == [2, 2, 1]
    assert taken(0) == taken(8) == ["one per core", 2, 1]


def test_a_run_is_used_by_builds_and_changes_no_bit(quantized, tmp_path):
    found = tvm_vitq.tune(quantized, trials=8, threads=1, work_dir=tmp_path, progress=False)
    assert found["trials"] == 8 and not found["wrong"]
    lines = [json.loads(line) for line in open(found["path"])]
    assert lines[0]["target"] == target_name(HERE) and lines[0]["about"]["versions"]["xgboost"]
    assert sum(not line.get("final") for line in lines[1:]) == 8
    kernels = {row["kernel"]: row for row in found["kernels"]}
    assert all(row["best"] <= row["default"] for row in kernels.values() if row["trials"])

    with pytest.raises(VitqError, match="there are records of such a run already"):
        tvm_vitq.tune(quantized, trials=8, threads=1, work_dir=tmp_path, progress=False)
    more = tvm_vitq.tune(quantized, trials=11, threads=1, work_dir=tmp_path, resume=True, progress=False)
    assert more["trials"] == 11

    tuned = tvm_vitq.compile(quantized, tuning_logs=tmp_path)
    used = [k["name"] for k in tuned.report["kernels"] if k["schedule"] == "tuned"]
    assert len(used) == sum(row["trials"] > 0 for row in more["kernels"]) > 0
    images = refmodels.test_set()[0][:1]
    default = tvm_vitq.compile(quantized, tuning_logs=False)
    assert np.array_equal(tuned(images), default(images))
    assert np.array_equal(tuned(images), quantized.reference(images))


def test_records_of_another_target_are_refused(quantized, tmp_path):
    with pytest.raises(VitqError, match="no such tuning records"):
        tvm_vitq.compile(quantized, tuning_logs=tmp_path / "nowhere")
    Writer(tmp_path / "x86-avx2-other" / "run.jsonl", "x86-avx2-other", {})
    with pytest.raises(VitqError, match="no tuning records of this target") as error:
        tvm_vitq.compile(quantized, tuning_logs=tmp_path)
    assert "x86-avx2-other" in str(error.value) and target_name(HERE) in str(error.value)
    with pytest.raises(VitqError, match="tuning records of another target"):
        find_runs(HERE, tmp_path / "x86-avx2-other")
    assert find_runs(HERE, False) == []


def test_a_record_that_no_longer_fits_is_noted_not_used(tasks):
    class Given:
        spec = tasks[0].spec

    chooser = TunedSchedules([])
    chooser.records = {Given.spec.name: Record(Given.spec.name, {"old": 1}, [1.0])}
    assert chooser(Given) is Given.spec
    assert "not a schedule of this kernel" in chooser.notes[Given.spec.name] and not chooser.tuned


def test_a_wrong_result_never_counts(tasks):
    task = min(tasks, key=lambda t: t.expected.size)
    wrong = task.expected.copy()
    wrong.flat[0] += 1
    found = []
    measuring = Measuring({task.name: replace(task, expected=wrong)}, HERE, Device(threads=1), found.append)
    try:
        path = measuring.build(task.name, None).result()
        with pytest.raises(Exception, match="1 of"):
            measuring.run(path, task.name, None).result()
        with pytest.raises(VitqError, match="could not be compared"):
            measuring.compare(task.name, [None], 1)
    finally:
        measuring.close()
    assert not found[0].seconds and "wrong result: 1 of" in found[0].error


def test_a_candidate_that_does_not_build_is_a_result(tasks):
    found = []
    broken = replace(tasks[0], spec=replace(tasks[0].spec, isa="no such"))
    measuring = Measuring({broken.name: broken}, HERE, Device(threads=1), found.append)
    try:
        future = measuring.build(broken.name, None)
        measuring.record(broken.name, None, future)
    finally:
        measuring.close()
    assert found[0].error and not found[0].seconds


def vitq(*arguments, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "tvm_vitq", *map(str, arguments)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def count_lines(folder):
    return sum(len(file.read_text().splitlines()) for file in folder.rglob("*.jsonl"))


def test_an_interrupted_run_keeps_what_it_found_and_goes_on(model_file, tmp_path):
    """Ctrl-C in the middle, then --resume."""
    command = ("tune", model_file, "--threads", 1, "--work-dir", tmp_path, "--trials")
    process = vitq(*command, 200, folder=tmp_path)
    end = time.monotonic() + 240
    while count_lines(tmp_path) < 6 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    kept = count_lines(tmp_path) - 1
    assert kept >= 5
    process = vitq(*command, kept + 2, "--resume", "--json", folder=tmp_path)
    output, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert json.loads(output)["trials"] == kept + 2


def free_port(first):
    for port in range(first, first + 20):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


@pytest.fixture
def tracker():
    """A tracker with two devices; both are this machine."""
    port = free_port(9140)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    quiet["start_new_session"] = True
    started = [
        subprocess.Popen([*run, "tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port", str(port)], **quiet)
    ]
    address = f"127.0.0.1:{port}"
    try:
        for _ in range(2):
            server = ["tvm.exec.rpc_server", "--host", "127.0.0.1", "--tracker", address, "--key", "device"]
            started.append(subprocess.Popen([*run, *server], **quiet))
        yield address
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)


def test_devices_behind_a_tracker(quantized, tracker, tmp_path):
    from tvm_vitq.tuning.run import count_servers

    host, port = tracker.split(":")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if count_servers((host, int(port), "device")) == 2:
                break
        except VitqError:
            pass
        time.sleep(0.5)
    runner = f"rpc://{tracker}/device"
    found = tvm_vitq.tune(quantized, trials=6, threads=1, work_dir=tmp_path, runner=runner, progress=False)
    assert found["trials"] == 6 and not found["wrong"]
    assert not any(row["failed"] for row in found["kernels"])
    with pytest.raises(VitqError, match="no device of this key"):
        tvm_vitq.tune(quantized, runner=f"rpc://{tracker}/other", work_dir=tmp_path, progress=False)


def test_bad_requests(quantized, tmp_path):
    ask = {"work_dir": tmp_path, "progress": False}
    with pytest.raises(VitqError, match="malformed runner"):
        tvm_vitq.tune(quantized, runner="rpc:there", **ask)
    with pytest.raises(VitqError, match="RPC tracker cannot be reached"):
        tvm_vitq.tune(quantized, runner=f"rpc://127.0.0.1:{free_port(9300)}/key", **ask)
    with pytest.raises(VitqError, match="this machine cannot run kernels of the target"):
        tvm_vitq.tune(quantized, "aarch64-dotprod", **ask)
    with pytest.raises(VitqError, match="nothing to try"):
        tvm_vitq.tune(quantized, trials=0, **ask)
    assert not list(tmp_path.iterdir())


def test_records_of_the_package(quantized):
    """Each file lies in the folder of its target, and its schedules are of today's search space."""
    folder = Path(tuning_logs.__path__[0])
    files = sorted(file for file in folder.glob("*/*.jsonl") if file.parent.name != VTA_FOLDER)
    assert files
    for file in files:
        run = read_run(file)
        assert run.target == file.parent.name
        assert {"device", "versions", "date", "threads", "command", "trials"} <= set(run.about)
        assert any(record.final for record in run.records)
        assert not any("wrong result" in (record.error or "") for record in run.records)
    images = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    model = tvm_vitq.quantize("deit_tiny_patch16_224", recipe="minmax", calibration=images, progress=False)
    library = tvm_vitq.compile(model, "llvm -mtriple=x86_64-linux-gnu -mcpu=znver4")
    states = {k["name"].split("_")[1]: k["schedule"] for k in library.report["kernels"] if k["macs"]}
    assert states == {"linear": "tuned", "attention": "tuned"}, library.report["warnings"]
