"""Models compiled for VTA: the logits of the NumPy reference, on the simulator and behind the C interface."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from timm.models.vision_transformer import VisionTransformer
from tvm import relax
from vta_stand_in import build, give_machine, simulated

import tvm_vitq
from tvm_vitq import refmodels, targets
from tvm_vitq.cli import main
from tvm_vitq.errors import VitqError
from tvm_vitq.ops import call
from tvm_vitq.quantized_model import QuantizedModel
from tvm_vitq.relax_passes import offload_vta
from tvm_vitq.vta.machine.config import VtaConfig

SIZE = 32


@pytest.fixture(scope="module")
def quantized():
    """A small ViT, by recipe and bits."""
    import torch

    made: dict[tuple, QuantizedModel] = {}

    def make(recipe: str = "p2-vit", bits: str = "w8a8", batch: int = 1, **sizes) -> QuantizedModel:
        key = (recipe, bits, batch, *sizes.items())
        if key not in made:
            torch.manual_seed(0)
            shape = {"embed_dim": 48, "num_heads": 3, "depth": 1, **sizes}
            model = VisionTransformer(img_size=SIZE, patch_size=8, num_classes=10, **shape)
            images = np.random.default_rng(0).standard_normal((16, 3, SIZE, SIZE)).astype(np.float32)
            made[key] = tvm_vitq.quantize(
                model, bits=bits, recipe=recipe, calibration=images, input_shape=(batch, 3, SIZE, SIZE)
            )
        return made[key]

    return make


@pytest.fixture
def exported(quantized, tmp_path):
    """A library file of the small ViT."""
    return tvm_vitq.compile(quantized(), "vta").export_library(tmp_path / "vta.so")


def images_for(model: QuantizedModel) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(model.input_shape).astype(np.float32)


@pytest.mark.parametrize(
    ("recipe", "bits", "batch"),
    [
        ("p2-vit", "w8a8", 1),
        ("p2-vit", "w4a4", 2),
        ("percentile", "w8a8", 1),
        ("minmax", "w4a4", 2),
        ("repq-vit", "w8a8", 1),
    ],
)
def test_logits_are_those_of_the_reference(quantized, recipe, bits, batch):
    model = quantized(recipe, bits, batch)
    images = images_for(model)
    library = tvm_vitq.compile(model, "vta")
    assert np.array_equal(library(images), model.reference(images))
    report = library.report["vta"]
    launched = {row["name"] for row in report["launches"]}
    layers = {"patch_embed.proj", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "head"}
    attention = set() if report["on_host"] else {"blocks.0.attn"}
    assert {name.removeprefix("blocks.0.") for name in launched - attention} == layers
    if recipe == "p2-vit":
        assert not report["on_host"], "all products of a shift plan, attention's too"
        assert report["macs"] == library.report["macs"]
    assert all(row["cycles"] > 0 for row in report["launches"])
    assert report["cycles"] == sum(row["cycles"] for row in report["launches"])


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_the_same_behind_the_c_interface(quantized, tmp_path, monkeypatch, bits):
    """The driver that the environment names, and the one that the target does."""
    model = quantized("p2-vit", bits)
    images = images_for(model)
    driver = build(tmp_path / "libvta.so")
    stand_in = simulated(driver)
    library = tvm_vitq.compile(model, f"vta -driver={driver}")
    assert np.array_equal(library(images), model.reference(images))
    flushed = stand_in.StandInFlushed()
    assert flushed > 0
    monkeypatch.setenv("VITQ_VTA_DRIVER", str(driver))
    file = tvm_vitq.compile(model, "vta").export_library(tmp_path / "vta.so")
    assert np.array_equal(tvm_vitq.load_library(file)(images), model.reference(images))
    assert stand_in.StandInFlushed() > flushed


def test_a_file_holds_everything(quantized, exported):
    model = quantized()
    images = images_for(model)
    first, second = tvm_vitq.load_library(exported), tvm_vitq.load_library(exported)
    assert np.array_equal(first(images), model.reference(images))
    assert np.array_equal(second(-images), model.reference(-images)), "each has a machine of its own"
    assert np.array_equal(first(images), model.reference(images))
    assert first.info.target == targets.parse("vta")
    again = first.export_library(exported.with_name("again.so"))
    assert again.read_bytes() == exported.read_bytes()
    assert [kernel.name for kernel in first.profile(images, repeat=1)]


@pytest.mark.parametrize("target", ["llvm", "vta"])
def test_a_file_that_is_written_anew_is_another_library(quantized, tmp_path, target):
    """Also while the first one is in use, which goes on."""
    file, images, libraries = tmp_path / "vit.so", images_for(quantized()), []
    for bits in ("w8a8", "w4a4"):
        tvm_vitq.compile(quantized("p2-vit", bits), target).export_library(file)
        libraries.append(tvm_vitq.load_library(file))
        assert np.array_equal(libraries[-1](images), quantized("p2-vit", bits).reference(images))
    assert np.array_equal(libraries[0](images), quantized().reference(images))


def test_another_configuration(quantized, tmp_path):
    """Half the scratchpads, on a board: other tiles, the same logits."""
    model = quantized()
    small = VtaConfig("ultra96", 4, 14, 14, 17, 16)
    (tmp_path / "small.json").write_text(json.dumps(small.to_json()))
    library = tvm_vitq.compile(model, f"vta -config={tmp_path / 'small.json'}")
    assert library.info.target.vta == small
    assert library.report["vta"]["megahertz"] == 333
    images = images_for(model)
    assert np.array_equal(library(images), model.reference(images))
    assert targets.parse({"kind": "vta", "config": small.to_json()}) == library.info.target


def test_what_stays_on_the_host_says_why(quantized):
    """A plan whose q, k and v are no shifts."""
    report = tvm_vitq.compile(quantized("percentile"), "vta").report["vta"]
    assert "no shifts of sums" in report["on_host"]["blocks.0.attn"]


@pytest.mark.parametrize("sizes", [{"num_heads": 2}, {"embed_dim": 40, "num_heads": 4}], ids=str)
def test_heads_that_are_no_whole_blocks(quantized, sizes):
    model = quantized("p2-vit", "w8a8", 2, **sizes)
    library = tvm_vitq.compile(model, "vta")
    assert not library.report["vta"]["on_host"]
    assert library.report["vta"]["macs"] == library.report["macs"]
    images = images_for(model)
    assert np.array_equal(library(images), model.reference(images))


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_reference_models(kind, bits, tmp_path, monkeypatch):
    """Windows, shifted ones too, and heads of 24 channels; on the simulator and behind the C interface. All
    layers are launches, and all residual sums but those that could saturate.
    """
    images = refmodels.calibration_images(16)
    model = tvm_vitq.quantize(
        f"refmodel:{kind}", bits=bits, recipe="p2-vit", calibration=images, progress=False
    )
    expected = model.reference(images[:1])
    library = tvm_vitq.compile(model, "vta")
    assert np.array_equal(library(images[:1]), expected)
    on_host = library.report["vta"]["on_host"]
    assert all(name.endswith(".residual") and "may saturate" in why for name, why in on_host.items())
    assert len(on_host) <= 1 and (bits == "w8a8" or not on_host)
    file = library.export_library(tmp_path / "vta.so")
    driver = build(tmp_path / "libvta.so")
    stand_in = simulated(driver)
    monkeypatch.setenv("VITQ_VTA_DRIVER", str(driver))
    assert np.array_equal(tvm_vitq.load_library(file)(images[:1]), expected)
    assert stand_in.StandInFlushed() > 0


def test_residual_sums_of_the_cpu(quantized):
    """The same logits, fewer cycles, nothing that is added."""
    model = quantized("p2-vit", embed_dim=96)
    images = images_for(model)
    made = {where: tvm_vitq.compile(model, f"vta -residual={where}") for where in ("vta", "cpu")}
    assert all(np.array_equal(library(images), model.reference(images)) for library in made.values())
    reports = {where: library.report["vta"] for where, library in made.items()}
    assert not reports["vta"]["on_host"] and not reports["cpu"]["on_host"]
    inputs = {
        where: {name: len(launch.inputs) for name, launch in library.program.launches.items()}
        for where, library in made.items()
    }
    more = {name for name, count in inputs["vta"].items() if count > inputs["cpu"][name]}
    assert more == {"blocks.0.attn.proj", "blocks.0.mlp.fc2"}
    assert reports["cpu"]["cycles"] < reports["vta"]["cycles"]


def test_codes_of_attention_that_the_host_makes_are_told(quantized, monkeypatch):
    """Where attention and the layer behind are no launch together, each is one."""
    model = quantized()

    def without_room(*given, **named):
        raise VitqError("no tile of the product fits VTA")

    monkeypatch.setattr(offload_vta, "layer_launch", without_room)
    library = tvm_vitq.compile(model, "vta")
    report, why = library.report["vta"], "no tile of the product fits VTA"
    assert report["on_host"] == {"blocks.0.attn.codes": why, "blocks.0.attn.proj.residual": why}
    assert {"blocks.0.attn", "blocks.0.attn.proj"} <= {row["name"] for row in report["launches"]}
    images = images_for(model)
    assert np.array_equal(library(images), model.reference(images))


def test_sums_of_what_was_put_together_are_no_layers():
    """Neither side of the sum is one layer, moved at most."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 4, 16), "int32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            twice = [builder.emit(relax.op.concat([x, x], axis=1)) for _ in range(2)]
            total = builder.emit_output(call("vitq.int_add", twice, out_dtype="int32"))
        builder.emit_func_output(total)
    assert offload_vta.residual_sums(builder.get()["main"]) == {}


def test_a_sum_that_fits_no_tile_leaves_the_layer_on_vta(quantized, monkeypatch):
    model = quantized()
    made = offload_vta.linear_launch

    def without_room(name, rows, weight, conversion, *others):
        if conversion.epilogue.left is not None:
            raise VitqError("no tile of the product fits VTA")
        return made(name, rows, weight, conversion, *others)

    monkeypatch.setattr(offload_vta, "linear_launch", without_room)
    library = tvm_vitq.compile(model, "vta")
    report = library.report["vta"]
    assert report["on_host"] == {"blocks.0.mlp.fc2.residual": "no tile of the product fits VTA"}
    assert "blocks.0.mlp.fc2" in {row["name"] for row in report["launches"]}
    images = images_for(model)
    assert np.array_equal(library(images), model.reference(images))


@pytest.mark.parametrize(
    "target", ["vta", "vta -residual=cpu", "vta -config=pynq-1x32_i8w8a32_15_15_18_17 -driver=libvta.so"]
)
def test_targets_are_read_as_they_are_written(target):
    profile = targets.parse(target)
    assert targets.parse(str(profile)) == profile
    assert targets.TargetProfile.from_json(profile.to_json()) == profile
    assert profile.residual != ("residual" in target)
    if "config" in target:
        assert (profile.vta.block, profile.vta.board.megahertz) == (32, 100)


def test_attention_and_the_layer_behind_are_one_launch(quantized):
    """Of a shift plan; where the result of attention is no shift, each is a launch of its own."""
    launches = {
        recipe: {row["name"] for row in tvm_vitq.compile(quantized(recipe), "vta").report["vta"]["launches"]}
        for recipe in ("p2-vit", "repq-vit")
    }
    assert "blocks.0.attn" not in launches["p2-vit"]
    assert all("blocks.0.attn.proj" in found for found in launches.values())


def test_command_line(quantized, tmp_path, capsys):
    """`vitq build` reports every launch, `vitq inspect` lists its instructions."""
    quantized().save(tmp_path / "vit.vitq")
    library = tmp_path / "vit.so"
    assert main(["build", str(tmp_path / "vit.vitq"), "-t", "vta", "-o", str(library)]) == 0
    built = capsys.readouterr().out
    assert "utilization" in built and "blocks.0.attn.qkv" in built
    assert main(["inspect", str(library)]) == 0
    assert "blocks.0.attn.qkv" in capsys.readouterr().out
    assert main(["inspect", str(library), "--vta", "--site", "*.fc?"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["blocks.0.mlp.fc1:", "blocks.0.mlp.fc2:"]
    assert sum(line.endswith("finish") for line in lines) == 2
    assert any("<- blocks.0.mlp.fc2 weight[" in line for line in lines)
    for arguments, words in (
        (["inspect", str(library), "--vta", "--site", "blocks.0.mlp.fc"], "blocks.0.mlp.fc1"),
        (["inspect", str(tmp_path / "vit.vitq"), "--vta"], "a library that was built for"),
        (
            ["build", str(tmp_path / "vit.vitq"), "-t", "vta -confg=a", "-o", str(library)],
            "did you mean -config",
        ),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def broken_config(tmp_path, **change):
    data = {**VtaConfig().to_json(), **change}
    file = tmp_path / "vta.json"
    file.write_text(json.dumps(data))
    return f"vta -config={file}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOG_BATCH": 1}, "one row for each element"),
        ({"LOG_ACC_BUFF_SIZE": 20}, "instruction format"),
        ({"TARGET": "pinq"}, "unknown VTA TARGET"),
        ({"LOG_INP_BUF_SIZE": 15}, "LOG_INP_BUFF_SIZE"),
        (
            {"LOG_BLOCK": 1, "LOG_INP_BUFF_SIZE": 9, "LOG_WGT_BUFF_SIZE": 10, "LOG_ACC_BUFF_SIZE": 12},
            "blocks are too small",
        ),
    ],
)
def test_configurations_that_cannot_be(tmp_path, change, words):
    with pytest.raises(VitqError, match=words):
        targets.parse(broken_config(tmp_path, **change))


def test_a_machine_too_small_for_a_layer(quantized, tmp_path):
    """What no tile fits stays on the host, with the reason."""
    model = quantized()
    library = tvm_vitq.compile(model, broken_config(tmp_path, LOG_WGT_BUFF_SIZE=9, LOG_INP_BUFF_SIZE=9))
    assert "no tile of the product fits VTA" in library.report["vta"]["on_host"]["blocks.0.mlp.fc1"]
    images = images_for(model)
    assert np.array_equal(library(images), model.reference(images))


def test_layers_of_attention_that_cannot_be_launches(quantized, tmp_path):
    """Too few inputs fit for attention, but for its layer's products."""
    model = quantized()
    library = tvm_vitq.compile(model, broken_config(tmp_path, LOG_INP_BUFF_SIZE=10, LOG_ACC_BUFF_SIZE=12))
    report = library.report["vta"]
    assert set(report["on_host"]) == {"blocks.0.attn"}
    assert "blocks.0.attn.qkv" in {row["name"] for row in report["launches"]}
    images = images_for(model)
    assert np.array_equal(library(images), model.reference(images))


def test_drivers_that_fail(exported, quantized, tmp_path, monkeypatch):
    """Each is an error with the reason, after which another driver, or the simulator, may be tried."""
    images = images_for(quantized())
    expected = quantized().reference(images)
    drivers = {
        "cannot load": tmp_path / "missing.so",
        "lacks functions": build(tmp_path / "lacking.so", "LACKS_RUN"),
        "finds no machine": build(tmp_path / "none.so", "NO_MACHINE"),
        "reports an error": build(tmp_path / "failing.so"),
    }
    kept = give_machine(drivers["reports an error"], lambda address, count: 3)
    for words, driver in drivers.items():
        monkeypatch.setenv("VITQ_VTA_DRIVER", str(driver))
        with pytest.raises(VitqError, match=words):
            tvm_vitq.load_library(exported)(images)
    assert kept
    monkeypatch.delenv("VITQ_VTA_DRIVER")
    assert np.array_equal(tvm_vitq.load_library(exported)(images), expected)


def test_sizes_of_launches_grow_with_the_batch(quantized):
    one, two = (tvm_vitq.compile(quantized("p2-vit", "w4a4", batch), "vta").report["vta"] for batch in (1, 2))
    assert all(a["macs"] < b["macs"] for a, b in zip(one["launches"], two["launches"], strict=True))
    assert all(a < b for a, b in pairwise((0, one["cycles"], two["cycles"])))
