"""What a plan says about each site: signal-to-noise ratios, histograms, levels, plots."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from canonical_vit import tiny_vit

from tvm_vitq import explain
from tvm_vitq.calibrate import calibrate
from tvm_vitq.cli import main
from tvm_vitq.errors import VitqError
from tvm_vitq.evaluation import sqnr
from tvm_vitq.frontend.model import FloatModel
from tvm_vitq.plan import QuantPlan, SiteQuantizer
from tvm_vitq.plotting import plot_plan
from tvm_vitq.quantizers import codec_of
from tvm_vitq.site_statistics import BINS, SiteStatistics

IMAGES = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)


def calibrated(recipe="percentile", bits="w4a4", batch=2):
    model = FloatModel(tiny_vit(batch=batch), "tiny", (batch, 3, 16, 16), None, None)
    return calibrate(model, bits, recipe, IMAGES, progress=False)


@pytest.fixture(scope="module")
def plan():
    return calibrated("adalog").plan


@pytest.mark.parametrize("batch", [1, 4])
def test_every_quantizer_is_measured(batch):
    found = calibrated(batch=batch)
    assert set(found.plan.statistics) == set(found.plan.sites)
    for name, seen in found.plan.statistics.items():
        assert seen.low < seen.high and len(seen.counts) == BINS and sum(seen.counts) > 0, name
        assert 8 < seen.sqnr < 60, name
    assert found.plan.statistics["head.weight"].sqnr < found.plan.statistics["patch_embed.proj.input"].sqnr


def test_ratio_is_that_of_the_weight():
    from tvm_vitq.calibrate.executor import Executor

    found = calibrated()
    weight = Executor(found.mod).constants["blocks.0.mlp.fc1.weight"].numpy()
    site = found.plan["blocks.0.mlp.fc1.weight"]
    seen = found.plan.statistics["blocks.0.mlp.fc1.weight"]
    assert seen.sqnr == pytest.approx(sqnr(weight, codec_of(site).round_trip(weight, site)), abs=0.01)
    assert (seen.low, seen.high) == (weight.min(), weight.max()) and sum(seen.counts) == weight.size


def test_more_bits_less_noise():
    few, many = (calibrated(bits=bits).plan.statistics for bits in ("w4a4", "w8a8"))
    for name in few:
        if not name.startswith("patch_embed.proj.input"):
            assert many[name].sqnr > few[name].sqnr + 15, name


def test_statistics_change_no_hash_and_may_be_missing(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert QuantPlan.load(tmp_path / "plan.json") == plan
    data = plan.to_dict()
    del data["statistics"]
    old = QuantPlan.from_dict(data)
    assert old.statistics == {} and old.hash == plan.hash
    assert explain.sqnr_text(old, "head.input") == "-"
    with pytest.raises(VitqError, match="anew"):
        plot_plan(old, tmp_path / "x.png")


def test_lists_of_numbers_take_one_line(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert len(lines) < 12 * (len(plan.sites) + len(plan.statistics)) + 2 * len(plan.ranges) + 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [-1]}, "negative"),
        ({"low": 2.0, "high": 1.0}, "low first"),
        ({"counts": [1.5]}, "wrong type"),
        ({"mean": 1.0}, "unknown key"),
    ],
)
def test_malformed_statistics(plan, change, message):
    data = json.loads(json.dumps(plan.to_dict()))
    data["statistics"]["head.input"].update(change)
    with pytest.raises(VitqError, match=message):
        QuantPlan.from_dict(data)


def test_levels_are_what_the_codecs_give(plan):
    values = np.linspace(-4, 4, 20001, dtype=np.float32)
    for name in ("head.input", "blocks.0.mlp.fc2.input", "blocks.0.attn.probs"):
        site = plan[name]
        given = np.unique(codec_of(site).round_trip(values, site))
        distance = np.abs(given[:, None] - explain.levels(site)).min(1)
        assert distance.max() < 1e-6, name
        assert len(explain.levels(site)) <= 2**site.bits
    row = SiteQuantizer(2, [], [], "row_maximum", granularity="token", axis=-2, dynamic=True)
    assert explain.levels(row, 0.3) == pytest.approx([0, 0.1, 0.2, 0.3])
    many = SiteQuantizer(2, [1.0, 3.0, 2.0], [0, 0, 0], signed=True, granularity="channel", axis=0)
    assert explain.levels(many).tolist() == [-2, 0, 2]


def test_sites_are_chosen_by_pattern(plan):
    assert explain.chosen_sites(plan, "head") == ["head.input", "head.weight"]
    assert len(explain.chosen_sites(plan, "blocks.*.fc1.weight")) == 2
    with pytest.raises(VitqError, match=r"head\.weight"):
        explain.chosen_sites(plan, "head.weigt")
    with pytest.raises(VitqError, match="regular expression"):
        explain.chosen_sites(plan, "re:(")
    blocks = explain.by_block(list(plan.sites))
    assert list(blocks) == ["model", "blocks.0", "blocks.1"]
    assert blocks["model"][-1] == "head.weight"


def test_inspect_shows_and_plots(plan, tmp_path, capsys):
    plan.save(tmp_path / "plan.json")
    file, folder = str(tmp_path / "plan.json"), tmp_path / "plots"
    assert main(["inspect", file, "--site", "blocks.0.mlp.fc2.input"]) == 0
    out = capsys.readouterr().out
    assert "SQNR dB" in out and "base=" in out and "fc1" not in out
    assert main(["inspect", file, "--plot", str(folder), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["plots"]
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        ["overview.png", "model.png", "blocks.0.png", "blocks.1.png"]
    )
    assert len(written) == 4 and all((folder / f).read_bytes()[:4] == b"\x89PNG" for f in written)
    one = tmp_path / "one.png"
    assert main(["inspect", file, "--plot", str(one), "--site", "head.input"]) == 0
    assert one.stat().st_size > 5000
    assert main(["inspect", file, "--plot", str(tmp_path / "x.pdf")]) == 2
    assert ".png" in capsys.readouterr().err


def test_plots_say_what_their_lines_are(plan):
    from tvm_vitq import plotting

    figure = plotting._distributions(plan, ["head.input", "head.weight", "blocks.0.mlp.fc2.input"], "tiny")
    titles = [axes.get_title() for axes in figure.axes]
    assert "uniform 4 bit" in titles[0] and "dB" in titles[0]
    assert "median scale" in titles[1] and "base=" in titles[2]
    dynamic = calibrated().plan
    assert "dynamic" in plotting._panel_title(dynamic, "blocks.0.attn.probs")


def test_models_are_plotted_too(tmp_path, monkeypatch, capsys):
    import tvm_vitq

    quantized = tvm_vitq.quantize(
        "refmodel:vit", calibration=np.zeros((1, 3, 32, 32), np.float32), progress=False
    )
    quantized.save(tmp_path / "vit.vitq")
    image = tmp_path / "head.png"
    arguments = ["inspect", str(tmp_path / "vit.vitq"), "--site", "head", "--plot", str(image)]
    assert main(arguments) == 0 and image.is_file()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(arguments) == 2
    assert "pip install 'tvm-vitq[plot]'" in capsys.readouterr().err


def test_constant_operands_have_one_bin():
    SiteStatistics(None, 1.0, 1.0, [5]).check("here")
