"""The command line: every verb on a reference model, exit codes, JSON, errors, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tvm_vitq.cli import VERBS, main, parser
from tvm_vitq.errors import VitqError

PLAN_SITE = "blocks.0.mlp.fc2.input"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def vitq(folder):
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        out, err = folder / "out.txt", folder / "err.txt"
        with pytest.MonkeyPatch.context() as patch, out.open("w") as stdout, err.open("w") as stderr:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            code = main([str(a) for a in arguments])
        return code, out.read_text(), err.read_text()

    return run


@pytest.fixture(scope="module")
def model(folder, vitq):
    """A quantized reference model; calibrated on few images, since only the command line is tested."""
    from tvm_vitq import refmodels

    images = folder / "calibration.npy"
    np.save(images, refmodels.calibration_images()[:8])
    path = folder / "vit.vitq"
    arguments = (
        "quantize",
        "refmodel:vit",
        "--calibration",
        images,
        "-o",
        path,
        "--plan",
        folder / "plan.json",
    )
    code, out, _ = vitq(*arguments, "--override", f"{PLAN_SITE}=7", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["integer_coverage"] == 1.0 and report["calibration"]["count"] == 8
    return path


@pytest.fixture(scope="module")
def library(folder, model, vitq):
    path = folder / "vit.so"
    code, out, _ = vitq("build", model, "-o", path)
    assert code == 0
    assert "integer coverage  100.00 %" in out
    return path


def test_parser_describes_every_verb(capsys):
    assert set(VERBS) == {"demo", "doctor", "quantize", "tune", "build", "eval", "bench", "inspect"}
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["build"], ["bench", "x.so", "--repeat", "many"]])
def test_wrong_usage_is_2(arguments, capsys):
    assert main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


def test_plan_is_written_and_shown(folder, model, vitq):
    code, out, _ = vitq("inspect", folder / "plan.json")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith(PLAN_SITE)]
    assert line.split()[2] == "7"
    code, out, _ = vitq("inspect", folder / "plan.json", "--json")
    assert json.loads(out)["plan"]["sites"][PLAN_SITE]["bits"] == 7


def test_debug_levels_show_more_and_more(model, folder, vitq, monkeypatch):
    lengths = []
    for level in range(5):
        monkeypatch.setenv("VITQ_DEBUG", str(level))
        code, _, err = vitq("build", model, "-o", folder / "shown.so")
        assert code == 0
        lengths.append(len(err))
    assert lengths == sorted(set(lengths))


def test_inspect_model_and_library(model, library, vitq):
    code, out, _ = vitq("inspect", model)
    assert code == 0 and "100.00 %" in out and "blocks.5.attn.probs" in out
    code, out, _ = vitq("inspect", library)
    assert code == 0 and "vitq_attention" in out
    code, out, _ = vitq("inspect", library, "--json")
    data = json.loads(out)
    assert data["kind"] == "library" and data["report"]["kernels"]


def test_eval_compares_library_reference_and_float(library, model, vitq):
    arguments = ("eval", library, model, "--data", "refmodel", "--limit", 60, "--exact")
    code, out, _ = vitq(*arguments, "--max-drop", 10, "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["form"] for row in rows] == ["library", "reference", "float"]
    assert rows[1]["equal_logits"] == rows[1]["logits"] == 60 * 36
    assert rows[0]["correct"] == rows[1]["correct"]


def test_missed_threshold_is_1(library, vitq):
    code, out, _ = vitq("eval", library, "--data", "refmodel", "--limit", 20, "--min-top1", 100.1)
    assert code == 1 and "top-1" in out
    code, out, _ = vitq("bench", library, "--repeat", 10, "--max-ms", 1e-6)
    assert code == 1


def test_eval_of_files(folder, library, vitq):
    from PIL import Image

    from tvm_vitq import refmodels

    images, labels = refmodels.test_set()
    np.savez(folder / "data.npz", images=images[:20], labels=labels[:20])
    code, out, _ = vitq("eval", library, "--data", folder / "data.npz", "--json")
    first = json.loads(out)["rows"][0]
    assert code == 0 and first["count"] == 20

    raw = refmodels.test_set_uint8()[0][:20]
    np.savez(folder / "raw.npz", images=raw, labels=labels[:20])
    code, out, _ = vitq("eval", library, "--data", folder / "raw.npz", "--json")
    assert json.loads(out)["rows"][0]["correct"] == first["correct"]

    for label in range(36):
        (folder / "classes" / f"{label:02d}").mkdir(parents=True)
    for n in range(20):
        Image.fromarray(raw[n]).save(folder / "classes" / f"{labels[n]:02d}" / f"{n}.png")
    code, out, _ = vitq("eval", library, "--data", folder / "classes", "--json")
    assert json.loads(out)["rows"][0]["correct"] == first["correct"]


def test_bench_names_kernels(library, vitq):
    code, out, _ = vitq("bench", library, "--threads", 1, "--repeat", 10, "--json")
    data = json.loads(out)
    assert code == 0 and data["threads"] == 1 and data["median_ms"] > 0
    linear = [k for k in data["kernels"] if k["name"].startswith("vitq_linear")]
    assert linear and all(k["milliseconds"] > 0 and k["instruction"] != "-" for k in linear)


def test_doctor(vitq):
    code, out, _ = vitq("doctor")
    assert code == 0
    assert out.splitlines()[-1].startswith("ready for: ")
    data = json.loads(vitq("doctor", "--json")[1])
    assert data["healthy"] and "percentile" in data["recipes"] and "VITQ_DEBUG" in data["settings"]


def test_demo_is_exact(vitq):
    arguments = ("demo", "--rows", "vit:w8a8", "--images", 32, "--no-emulation")
    code, out, _ = vitq(*arguments, "--json")
    data = json.loads(out)
    assert code == 0 and data["exact"]
    (row,) = data["rows"]
    assert row["equal_logits"] == row["logits"] == 32 * 36
    assert row["bytes_aarch64"] > 10**6 and row["latency_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "deit_tny_patch16_224", "-o", "x.so"], "deit_tiny_patch16_224"),
        (["build", "refmodel:vit", "-t", "llvm -mcpu=nonsense", "-o", "x.so"], "nonsense"),
        (["build", "missing.vitq", "-o", "x.so"], "missing.vitq"),
        (["quantize", "refmodel:vit", "--bits", "w9a8", "-o", "x.vitq"], "2 to 8"),
        (["quantize", "refmodel:vit", "--recipe", "percentil", "-o", "x.vitq"], "percentile"),
        (["quantize", "refmodel:vit", "--override", "nowhere=8", "-o", "x.vitq"], "nowhere"),
        (["quantize", "refmodel:vit", "--override", "head=", "-o", "x.vitq"], "SITE=BITS"),
        (["quantize", "refmodel:vit", "--calibration", "missing.npy", "-o", "x.vitq"], "missing.npy"),
        (["quantize", "refmodel:vit", "--calibration", "missing_folder", "-o", "x.vitq"], "no such folder"),
        (["quantize", "refmodel:vit", "--calibration", "refmodel", "-o", "nowhere/x.vitq"], "mkdir"),
        (["inspect", "missing.so"], "missing.so"),
        (["eval", "refmodel:vit", "--data", "nowhere"], "no such dataset"),
        (["eval", "refmodel:vit", "--data", "refmodel", "--limit", "0"], "limit"),
        (["demo", "--images", "0"], "images"),
        (["demo", "--rows", "vit"], "MODEL:BITS"),
    ],
)
def test_mistakes_are_told_without_traceback(arguments, says, vitq, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = vitq(*arguments)
    assert code == 2 and out == ""
    assert says in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_options_of_quantization_do_not_apply_to_a_quantized_model(model, vitq):
    code, _, err = vitq("build", model, "--bits", "w4a4", "-o", "x.so")
    assert code == 2 and "--bits" in err


def test_foreign_and_truncated_files(library, model, tmp_path, vitq):
    for name, content in (("empty.so", b""), ("text.so", b"hello"), ("cut.so", library.read_bytes()[:-100])):
        (tmp_path / name).write_bytes(content)
        assert vitq("bench", tmp_path / name)[0] == 2
        assert vitq("inspect", tmp_path / name)[0] == 2
    (tmp_path / "cut.vitq").write_bytes(model.read_bytes()[:-1000])
    assert vitq("inspect", tmp_path / "cut.vitq")[0] == 2
    (tmp_path / "plan.json").write_text('{"format": ')
    code, _, err = vitq("inspect", tmp_path / "plan.json")
    assert code == 2 and "truncated" in err


def test_library_of_another_architecture(model, folder, vitq):
    path = folder / "arm.so"
    assert vitq("build", model, "-t", "aarch64-neon", "-o", path)[0] == 0
    assert vitq("inspect", path)[0] == 0
    code, _, err = vitq("bench", path)
    assert code == 2 and "another architecture" in err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing_behind(how, tmp_path):
    command = [sys.executable, "-m", "tvm_vitq", "quantize", "refmodel:swin", "-o", "model.vitq"]
    command += ["--calibration", "refmodel", "--recipe", "mse"]
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir()
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}

    def hear_signals() -> None:  # a background job of a shell starts with SIGINT ignored, and passes that on
        signal.signal(how, signal.SIG_DFL)

    with subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    ) as process:
        assert process.stderr is not None
        # The first progress bar: imports are done, calibration runs.
        assert process.stderr.read(1)
        process.send_signal(how)
        err = process.stderr.read()
        assert process.wait(60) == 130
    assert "interrupted" in err and "Traceback" not in err
    assert list(work.iterdir()) == []
    # torch may have made its own cache folder
    assert not [path for path in scratch.iterdir() if not path.name.startswith("torchinductor")]


def test_parser_has_no_abbreviated_surprises():
    asked = parser().parse_args(["build", "refmodel:vit", "-o", "x.so"])
    assert asked.target == "llvm" and asked.bits == "w8a8" and not asked.strict


def test_error_text_names_all_parts():
    text = str(VitqError("what", where="where", got=1, expected=2, fix="fix"))
    assert text.splitlines() == ["what", "  where: where", "  got: 1", "  expected: 2", "  fix: fix"]
