"""The trained networks in weights/: whole, without private paths, and as accurate as they say."""

import csv
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from reslab.hub import PATH
from reslab.models import network_of_run
from reslab.training.checkpoint import weights_sha256
from runner import REPO, manifest, reslab

SHIPPED = sorted((REPO / "weights").glob("*/"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_files_belong_together(folder: Path) -> None:
    record, weights = manifest(folder), load_file(folder / "weights.safetensors")
    assert record["status"] == "complete"
    assert weights_sha256(weights) == record["weights_sha256"]
    assert hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest() == record["config_sha256"]
    net = network_of_run(folder)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{100 * record['results']['test/acc']:.2f}" in card


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_no_file_names_a_path_of_the_machine(folder: Path) -> None:
    texts = [file.read_text(encoding="utf-8") for file in folder.iterdir() if file.suffix != ".safetensors"]
    paths = {match[0] for text in texts for match in PATH.finditer(text)}
    assert all(path.startswith("/path/to/") for path in paths)
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"] is None


def test_images_are_classified_without_any_data(tmp_path: Path) -> None:
    for color in ("red", "blue"):
        Image.new("RGB", (40, 50), color).save(tmp_path / f"{color}.png")
    out = tmp_path / "classes.csv"
    ended = reslab("predict", REPO / "weights/cifar10_resnet20", "--images", tmp_path, "--out", out)
    assert ended.status == 0, ended.output
    classes = manifest(REPO / "weights/cifar10_resnet20")["data"]["class_names"]
    with out.open() as file:
        rows = {row["file"]: row["prediction"] for row in csv.DictReader(file)}
    assert rows.keys() == {"blue.png", "red.png"} and set(rows.values()) <= set(classes)


@pytest.mark.shared_data
def test_network_is_as_accurate_as_stated(shared_data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(REPO / "weights/cifar10_resnet20", tmp_path / "run")
    ended = reslab("test", folder, "--data.root", shared_data)
    assert ended.status == 0, ended.output
    assert f"test/acc {manifest(folder)['results']['test/acc']:.6f}" in ended.output
