"""An export answers as its run did, says how to use it, and is not left behind where it does not."""

import csv
import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import reslab.export
from reslab import create_model
from reslab.cli import main
from reslab.data import Digits
from reslab.files import sha256_file
from runner import REPO, fit

Undisturbed = Callable[..., Path]

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, reslab.export.ONNX_PACKAGES)),
    reason="onnx, onnxscript or onnxruntime is missing",
)
FORMATS = [pytest.param("onnx", marks=needs_onnx), "pt2", "safetensors"]


def export(run: Path, format: str, out: Path, *options: str) -> int:
    return main(["export", str(run), "--format", format, "--out", str(out), *options])


def answers(file: Path, images: torch.Tensor) -> torch.Tensor:
    """The logits of an exported file, read without reslab (the weights alone need its network)."""
    if file.suffix == ".onnx":
        import onnxruntime

        return torch.from_numpy(onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})[0])
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(images)
    net = create_model("resnet8", num_classes=10, in_channels=1, shortcut="A", weights=file).eval()
    with torch.no_grad():
        return net(images)


def record(file: Path) -> dict:
    return json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def exported(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The file of the short run in a format, with normalisation or without; made once, in a folder of its own."""

    @cache
    def made(format: str, *options: str) -> Path:
        file = tmp_path_factory.mktemp("exports") / "new folder" / f"m.{format}"
        assert export(undisturbed(), format, file, *options) == 0
        return file

    return made


@pytest.mark.parametrize(
    ("format", "options", "dtype"),
    [
        pytest.param("onnx", [], torch.float32, marks=needs_onnx),
        pytest.param("onnx", ["--with-normalization"], torch.uint8, marks=needs_onnx),
        ("pt2", [], torch.float32),
        ("pt2", ["--with-normalization"], torch.uint8),
        ("safetensors", [], torch.float32),
    ],
)
def test_it_answers_as_the_run_did(
    exported: Callable[..., Path], undisturbed: Undisturbed, format: str, options: list[str], dtype: torch.dtype
) -> None:
    file = exported(format, *options)
    said = record(file)["input"]
    assert f"torch.{said['dtype']}" == str(dtype) and said["shape"] == ["batch", 1, 8, 8]
    images = torch.from_numpy(Digits().load(Path(), "test").images).permute(0, 3, 1, 2).contiguous()
    if dtype.is_floating_point:
        images = (images / 255 - said["mean"][0]) / said["std"][0]
    confidence, prediction = answers(file, images).softmax(1).max(1)
    predictions = np.load(undisturbed() / "predictions.npz")
    assert prediction.tolist() == predictions["prediction"].tolist()
    assert confidence.numpy() == pytest.approx(predictions["confidence"], abs=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_it_says_what_it_is(exported: Callable[..., Path], undisturbed: Undisturbed, format: str) -> None:
    file = exported(format)
    said, check = record(file), record(file)["check"]
    assert said["sha256"] == sha256_file(file)
    run = json.loads((undisturbed() / "manifest.json").read_text())
    assert said["run"]["weights_sha256"] == run["weights_sha256"]
    assert said["classes"] == [str(digit) for digit in range(10)]
    assert check["n"] == 16 and check["images"] == "test images"
    assert check["max_abs_difference"] <= 1e-4 * check["max_abs_logit"]
    inside = metadata(file)
    assert all(inside[key] == said[key] for key in ("classes", "input", "run"))
    assert str(REPO).encode() not in file.read_bytes()  # nothing of this machine goes along
    assert {p.name for p in file.parent.iterdir()} == {file.name, f"{file.name}.json"}


def metadata(file: Path) -> dict:
    """What a file says of itself; its values are JSON where they are more than text."""
    if file.suffix == ".pt2":
        extra = {"reslab.json": ""}
        torch.export.load(file, extra_files=extra)
        return json.loads(extra["reslab.json"])
    if file.suffix == ".onnx":
        import onnx

        pairs = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    else:
        with safe_open(file, "pt") as opened:
            pairs = opened.metadata()
    return {key: json.loads(value) for key, value in pairs.items() if value[0] in "[{"}


def test_a_file_that_answers_otherwise_is_not_left_behind(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = reslab.export.WRITERS["pt2"]

    def slightly_wrong(graph: torch.nn.Module, *args: object) -> None:
        with torch.no_grad():
            wrong = type(graph)(in_channels=1, num_classes=10, **kwargs)
            wrong.load_state_dict(graph.state_dict())
            wrong.fc.bias += 0.01
        write(wrong.eval(), *args)

    kwargs = {"layers": (1, 1, 1), "width": 16, "stem": "cifar", "shortcut": "A"}
    monkeypatch.setitem(reslab.export.WRITERS, "pt2", slightly_wrong)
    assert export(undisturbed(), "pt2", tmp_path / "m.pt2") == 2
    assert "max abs difference 1.0e-02" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_with_the_line_that_installs_it(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert export(undisturbed(), "onnx", tmp_path / "m.onnx") == 2
    assert "pip install onnxscript" in capsys.readouterr().err
    assert export(undisturbed(), "safetensors", tmp_path / "m", "--with-normalization") == 2
    assert "--with-normalization" in capsys.readouterr().err


def test_a_run_is_used_where_its_data_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, place in enumerate(f"{split}/{name}" for split in ("train", "val") for name in ("no", "cat, größer")):
        for j in range(8):
            file = tmp_path / "photos" / place / f"{j}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (200 * (i % 2), 10 * j, 90)).save(file)
    dataset = ["--data.dataset", str(REPO / "configs/data/imagefolder.yaml"), "--data.dataset.init_args.folder=photos"]
    small = ["--data.dataset.init_args.image_size=8", "--data.batch_size=4", "--trainer.max_epochs=1"]
    ended = fit(tmp_path / "run", *dataset, *small, f"--data.root={tmp_path}", "--data.val_split=0")
    assert ended.status == 0, ended.output
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    out = tmp_path / "out.csv"
    assert main(["predict", str(tmp_path / "run"), "--images", str(tmp_path / "elsewhere"), "--out", str(out)]) == 0
    assert {row["prediction"] for row in csv.DictReader(out.open())} <= {"no", "cat, größer"}
    assert export(tmp_path / "run", "safetensors", tmp_path / "m.safetensors") == 0
    assert record(tmp_path / "m.safetensors")["classes"] == ["cat, größer", "no"]
    assert "noise" in capsys.readouterr().out
