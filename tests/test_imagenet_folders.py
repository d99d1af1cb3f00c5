"""ImageNet's folder layout, end to end: preprocessing, class order, calibration drawn at random."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tvm_vitq.calibrate.sources import load_images
from tvm_vitq.cli import main
from tvm_vitq.datasets import load_dataset
from tvm_vitq.errors import VitqError
from tvm_vitq.image_folders import draw, labelled
from tvm_vitq.recipes import RECIPES

MODEL = "deit_tiny_patch16_224"
NAMES = ("n01440764", "n01443537", "n02102040", "n03000684")
SHAPE = (1, 3, 224, 224)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """val/<wnid>/*.JPEG and train/<wnid>/*.JPEG with four classes, of different sizes."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for part, count in (("val", 2), ("train", 5)):
        for label, name in enumerate(NAMES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for n in range(count):
                small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
                small[..., label % 3] //= 3
                image = Image.fromarray(small).resize((240 + 40 * label, 230 + 10 * n))
                image.save(folder / f"ILSVRC2012_{part}_{n:08d}.JPEG")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights of a model of four classes, as a user's own fine-tuned one has them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model(MODEL, num_classes=len(NAMES), depth=12).state_dict(), path)
    return path


def test_images_are_timms(imagenet):
    module = timm.create_model("vit_small_patch16_224.augreg_in21k_ft_in1k", num_classes=4)
    from tvm_vitq.frontend.timm_models import preprocessing_of

    config = timm.data.resolve_data_config({}, model=module)
    transform = timm.data.create_transform(**config, is_training=False)
    dataset = load_dataset(imagenet / "val", SHAPE, preprocessing_of(module), classes=4)
    ((images, labels),) = list(dataset)
    assert dataset.count == 8 and labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    files = sorted((imagenet / "val").rglob("*.JPEG"))
    for image, file in zip(images, files, strict=True):
        assert np.array_equal(image, transform(Image.open(file).convert("RGB")).numpy())
    reader = timm.data.create_dataset("", root=str(imagenet / "val"))
    assert [label for _, label in reader] == labels.tolist()


def test_fewer_folders_are_imagenets_own_classes(imagenet):
    labels = [label for _, label in labelled(imagenet / "val", 1000)]
    synsets = timm.data.ImageNetInfo().label_names()
    assert labels == [synsets.index(name) for name in NAMES for _ in range(2)]


def test_class_lists(imagenet, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join([*reversed(NAMES), "n09999999"]))
    ((_, labels),) = list(load_dataset(imagenet / "val", SHAPE, {}, classes=5, class_list=listed))
    assert labels.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    for text, classes, message in (
        ("a b", 5, "as long as"),
        ("a b c d e", 5, "n01440764"),
    ):
        listed.write_text(text)
        with pytest.raises(VitqError, match=message):
            load_dataset(imagenet / "val", SHAPE, {}, classes=classes, class_list=listed)
    with pytest.raises(VitqError, match="class list"):
        load_dataset(imagenet / "val", SHAPE, {}, class_list=tmp_path / "missing.txt")


def test_wrong_layouts(imagenet, tmp_path):
    with pytest.raises(VitqError, match=r"4 folders: n01440764[\s\S]*expected: 10 folders[\s\S]*--classes"):
        labelled(imagenet / "val", 10)
    with pytest.raises(VitqError, match=r"fix: name .*val$"):
        labelled(imagenet, 1000)
    with pytest.raises(VitqError, match=r"2 images without class folders[\s\S]*imagenet\.md"):
        labelled(imagenet / "val" / NAMES[0], 1000)
    (tmp_path / "a").mkdir()
    with pytest.raises(VitqError, match="without images"):
        labelled(tmp_path, 1)


def test_calibration_is_drawn_across_classes(imagenet):
    train = imagenet / "train"
    found = load_images(train, (1, 3, 32, 32), limit=6, seed=3)
    assert found.source == "folder train: 6 images of 4 classes" and len(found.values) == 6
    assert {name.split("/")[0] for name in found.ids[:4]} == set(NAMES)
    assert found.ids == load_images(train, (1, 3, 32, 32), limit=6, seed=3).ids
    assert found.ids != load_images(train, (1, 3, 32, 32), limit=6, seed=4).ids
    everything = draw(train, 1000, 0)
    assert len(everything.files) == len(set(everything.files)) == 20
    assert len(load_images(train, (1, 3, 32, 32), wanted=5).values) == 5


def test_flat_folders_are_drawn_from_too(imagenet):
    flat = imagenet / "train" / NAMES[0]
    assert draw(flat, 3, 0).text == "3 of 5 images" and len(set(draw(flat, 3, 0).files)) == 3
    assert draw(flat, 3, 0) == draw(flat, 3, 0)
    with pytest.raises(VitqError, match="1 or more"):
        load_images(flat, (1, 3, 32, 32), limit=0)


def test_one_command_a_row(imagenet, checkpoint, tmp_path, capsys):
    arguments = [
        "eval", MODEL, "--checkpoint", checkpoint, "--recipes", "repq-vit", "--bits", "w4a4",
        "--data", imagenet / "val", "--calibration", imagenet / "train", "--calibration-count", 3,
        "--batch", 3, "--store", tmp_path / "rows.jsonl", "--no-latency",
    ]  # fmt: skip
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    (row,) = json.loads(capsys.readouterr().out)
    assert row["images"] == 8 and row["bits"] == "w4a4" and row["latency"] is None
    assert row["data"] == str(imagenet / "val") and "3 images, seed 0" in row["calibration"]
    assert row["agreement"] >= 50 and row["sqnr"] > 0
    assert main([*map(str, arguments), "--json"]) == 0  # from the store
    assert json.loads(capsys.readouterr().out) == [row]


def test_mistakes_are_told_before_the_work(imagenet, checkpoint, capsys):
    arguments = ["eval", MODEL, "--checkpoint", str(checkpoint), "--recipes", "minmax", "--data"]
    assert main([*arguments, str(imagenet)]) == 2
    assert "fix: name" in capsys.readouterr().err
    calibrated = [*arguments, str(imagenet / "val"), "--calibration"]
    for extra, says in (
        (["nowhere"], "no such folder"),
        ([str(imagenet / "train"), "--calibration-count", "0"], "1 or more"),
    ):
        assert main([*calibrated, *extra]) == 2
        assert says in capsys.readouterr().err
    assert main([*arguments, str(imagenet / "val" / NAMES[0])]) == 2
    assert "class folders" in capsys.readouterr().err


def test_the_page_has_every_recipes_images():
    page = (Path(__file__).resolve().parent.parent / "docs" / "imagenet.md").read_text(encoding="utf-8")
    said = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and cells[1].startswith("`") and cells[2].isdigit():
            said |= {name.strip("` "): int(cells[2]) for name in cells[1].split(",")}
    assert said == {name: recipe.calibration_images for name, recipe in RECIPES.items()}
