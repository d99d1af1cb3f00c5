"""Tuning for VTA: better tiles by the cycle model, records, runs that go on, and builds that use them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import tvm_vitq
from tvm_vitq import refmodels, targets
from tvm_vitq.errors import VitqError
from tvm_vitq.tuning.apply import find_runs, vta_name
from tvm_vitq.tuning.records import read_run
from tvm_vitq.vta.machine.config import VtaConfig
from tvm_vitq.vta.stream.matmul import Product


@pytest.fixture(scope="module")
def quantized():
    images = refmodels.calibration_images(8)
    return tvm_vitq.quantize("refmodel:vit", recipe="p2-vit", calibration=images, progress=False)


@pytest.fixture(scope="module")
def tuned(quantized, tmp_path_factory):
    """What a run of 30 trials found."""
    folder = tmp_path_factory.mktemp("logs")
    return tvm_vitq.tune(quantized, "vta", trials=30, work_dir=folder, progress=False)


def test_tuned_tiles_are_no_slower_and_change_nothing(quantized, tuned):
    kernels = tuned["kernels"]
    assert tuned["trials"] == 30 and all(row["best"] <= row["default"] for row in kernels)
    assert any(row["best"] < row["default"] for row in kernels)
    folder = os.path.dirname(os.path.dirname(tuned["path"]))
    default, better = (
        tvm_vitq.compile(quantized, "vta", tuning_logs=logs).report["vta"] for logs in (False, folder)
    )
    assert better["cycles"] < default["cycles"]
    assert {row["schedule"] for row in default["launches"]} == {"default"}
    assert {row["schedule"] for row in better["launches"]} == {"tuned"}
    images = refmodels.calibration_images(1)
    logits = tvm_vitq.compile(quantized, "vta", tuning_logs=tuned["path"])(images)
    assert np.array_equal(logits, quantized.reference(images))


def test_records_name_machine_and_command(tuned):
    run = read_run(tuned["path"])
    assert run.target == vta_name(VtaConfig()) == "vta-sim-1x16_i8w8a32_15_15_18_17"
    assert run.about["config"] == VtaConfig().to_json() and run.about["trials"] == 30
    assert {"date", "command", "versions", "model"} <= run.about.keys()
    assert os.path.basename(os.path.dirname(tuned["path"])) == "vta"


def test_records_of_another_machine_are_refused(tuned, tmp_path):
    other = VtaConfig("pynq", 4, 15, 15, 18, 17)
    (tmp_path / "pynq.json").write_text(json.dumps(other.to_json()))
    profile = targets.parse(f"vta -config={tmp_path / 'pynq.json'}")
    with pytest.raises(VitqError, match="another target"):
        find_runs(profile, tuned["path"])


def test_records_that_do_not_fit_are_told(quantized, tuned, tmp_path):
    """The default tile is used instead."""
    lines = open(tuned["path"]).read().splitlines()
    changed = [lines[0]]
    for line in lines[1:]:
        record = json.loads(line)
        if record["schedule"]:
            record["schedule"] = {"rows": 99, "height": 1}
            record["seconds"] = [1e-9]
        changed.append(json.dumps(record))
    (tmp_path / "run.jsonl").write_text("\n".join([*changed, ""]))
    report = tvm_vitq.compile(quantized, "vta", tuning_logs=tmp_path).report
    assert any("default tile" in warning for warning in report["warnings"])
    assert all(name.endswith(".residual") for name in report["vta"]["on_host"]), "all layers are launches"


def test_only_the_cycle_model_tunes(quantized, tmp_path):
    with pytest.raises(VitqError, match="cycle model"):
        tvm_vitq.tune(quantized, "vta", runner="rpc://localhost:9190/vta", work_dir=tmp_path)


def test_a_run_that_is_interrupted_goes_on(quantized, tmp_path, monkeypatch):
    measured = Product.cycles
    count = 0

    def interrupted(product, tile):
        nonlocal count
        count += 1
        if count > 12:
            raise KeyboardInterrupt
        return measured(product, tile)

    monkeypatch.setattr(Product, "cycles", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tvm_vitq.tune(quantized, "vta", trials=20, work_dir=tmp_path, progress=False)
    monkeypatch.undo()
    (file,) = (tmp_path / "vta").iterdir()
    before = read_run(file).records
    assert 0 < len(before) < 20
    with pytest.raises(VitqError, match="resume"):
        tvm_vitq.tune(quantized, "vta", trials=20, work_dir=tmp_path, progress=False)
    found = tvm_vitq.tune(quantized, "vta", trials=20, work_dir=tmp_path, resume=True, progress=False)
    assert found["trials"] == 20
    after = read_run(file).records
    assert after[: len(before)] == before
    keys = [(record.kernel, str(record.schedule)) for record in after]
    assert len(set(keys)) == len(keys), "nothing is measured twice"


def test_records_that_come_along_are_for_the_default_machine():
    runs = [run for run in find_runs(targets.parse("vta")) if run.target == vta_name(VtaConfig())]
    assert {run.about["model"] for run in runs} >= {
        f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")
    }
