"""Exports reproduce the run's predictions, describe their use, and are removed if they fail the check."""

import csv
import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open

import reslab.export
from reslab import create_model
from reslab.cli import main
from reslab.data import Digits
from reslab.files import sha256_file
from reslab.models import ResNet
from runner import REPO, fit

Undisturbed = Callable[..., Path]

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, reslab.export.ONNX_PACKAGES)),
    reason="onnx, onnxscript or onnxruntime is missing",
)
FORMATS = [pytest.param("onnx", marks=needs_onnx), "pt2", "safetensors"]


def export(run: Path, format: str, out: Path, *options: str) -> int:
    return main(["export", str(run), "--format", format, "--out", str(out), *options])


def logits(file: Path, images: torch.Tensor) -> torch.Tensor:
    """Return an exported file's logits, read without reslab (except for safetensors, which holds only weights)."""
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
    """Export the short run, once per combination of format and options."""

    @cache
    def exported_file(format: str, *options: str) -> Path:
        file = tmp_path_factory.mktemp("exports") / "new directory" / f"m.{format}"
        assert export(undisturbed(), format, file, *options) == 0
        return file

    return exported_file


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
def test_export_reproduces_the_predictions(
    exported: Callable[..., Path], undisturbed: Undisturbed, format: str, options: list[str], dtype: torch.dtype
) -> None:
    file = exported(format, *options)
    spec = record(file)["input"]
    assert f"torch.{spec['dtype']}" == str(dtype) and spec["shape"] == ["batch", 1, 8, 8]
    images = torch.from_numpy(Digits().load(Path(), "test").images).permute(0, 3, 1, 2).contiguous()
    if dtype.is_floating_point:
        images = (images / 255 - spec["mean"][0]) / spec["std"][0]
    confidence, prediction = logits(file, images).softmax(1).max(1)
    predictions = np.load(undisturbed() / "predictions.npz")
    assert prediction.tolist() == predictions["prediction"].tolist()
    assert confidence.numpy() == pytest.approx(predictions["confidence"], abs=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_export_describes_itself(exported: Callable[..., Path], undisturbed: Undisturbed, format: str) -> None:
    file = exported(format)
    description, check = record(file), record(file)["check"]
    assert description["sha256"] == sha256_file(file)
    run = json.loads((undisturbed() / "manifest.json").read_text())
    assert description["run"]["weights_sha256"] == run["weights_sha256"]
    assert description["classes"] == [str(digit) for digit in range(10)]
    assert check["n"] == 16 and check["images"] == "test images"
    assert check["max_abs_difference"] <= 1e-4 * check["max_abs_logit"]
    embedded = metadata(file)
    assert all(embedded[key] == description[key] for key in ("classes", "input", "run"))
    assert str(REPO).encode() not in file.read_bytes()  # no paths of this machine
    assert {p.name for p in file.parent.iterdir()} == {file.name, f"{file.name}.json"}


def metadata(file: Path) -> dict:
    """Return the metadata embedded in the file, parsed from JSON."""
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


def test_export_that_differs_is_removed(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = reslab.export.WRITERS["pt2"]

    def slightly_wrong(graph: torch.nn.Module, *args: object) -> None:
        with torch.no_grad():
            wrong = type(graph)(in_channels=1, num_classes=10, **kwargs)
            wrong.load_state_dict(graph.state_dict())
            wrong.fc.bias += 0.01
        write(wrong.eval().requires_grad_(False), *args)

    kwargs = {"layers": (1, 1, 1), "width": 16, "stem": "cifar", "shortcut": "A"}
    monkeypatch.setitem(reslab.export.WRITERS, "pt2", slightly_wrong)
    assert export(undisturbed(), "pt2", tmp_path / "m.pt2") == 2
    assert "max abs difference 1.0e-02" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS[:2])
def test_network_that_fixes_the_batch_size_is_explained(
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format: str,
) -> None:
    forward = ResNet.forward
    monkeypatch.setattr(ResNet, "forward", lambda net, images: torch.cat([forward(net, x[None]) for x in images]))
    assert export(undisturbed(), format, tmp_path / "m") == 2
    message = capsys.readouterr().err
    assert f"{format} export with a dynamic batch size failed" in message and "Traceback" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name",
    [
        "timm.resnet10t",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("torchvision.mobilenet_v3_small", "timm.vit_tiny_patch16_224")
        ),
    ],
)
def test_networks_of_libraries_are_exported_with_any_batch_size(name: str, format: str, tmp_path: Path) -> None:
    library, _, name = name.partition(".")
    if library == "timm":
        timm = pytest.importorskip("timm")
        size = {"img_size": 32, "patch_size": 8, "depth": 2} if name.startswith("vit") else {}
        net = timm.create_model(name, num_classes=10, **size)
    else:
        net = torchvision.models.get_model(name, num_classes=10)
    net.eval().requires_grad_(False)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reslab.export.WRITERS[format](net, images[:2], {"classes": ["a", "b"]}, tmp_path / "m")
    exported = reslab.export.READERS[format](net, tmp_path / "m")
    for batch in (images, images[:1]):
        torch.testing.assert_close(exported(batch), net(batch), atol=1e-4, rtol=1e-4)


def test_missing_packages_are_named_with_the_install_command(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert export(undisturbed(), "onnx", tmp_path / "m.onnx") == 2
    assert "pip install onnxscript" in capsys.readouterr().err
    assert export(undisturbed(), "safetensors", tmp_path / "m", "--with-normalization") == 2
    assert "--with-normalization" in capsys.readouterr().err


def test_predict_and_export_work_without_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, directory in enumerate(f"{split}/{name}" for split in ("train", "val") for name in ("no", "cat, größer")):
        for j in range(8):
            file = tmp_path / "photos" / directory / f"{j}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (200 * (i % 2), 10 * j, 90)).save(file)
    dataset = ["--data.dataset", str(REPO / "configs/data/imagefolder.yaml"), "--data.dataset.init_args.folder=photos"]
    small = ["--data.dataset.init_args.image_size=8", "--data.batch_size=4", "--trainer.max_epochs=1"]
    result = fit(tmp_path / "run", *dataset, *small, f"--data.root={tmp_path}", "--data.val_split=0")
    assert result.status == 0, result.output
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    out = tmp_path / "out.csv"
    assert main(["predict", str(tmp_path / "run"), "--images", str(tmp_path / "elsewhere"), "--out", str(out)]) == 0
    assert {row["prediction"] for row in csv.DictReader(out.open())} <= {"no", "cat, größer"}
    assert export(tmp_path / "run", "safetensors", tmp_path / "m.safetensors") == 0
    assert record(tmp_path / "m.safetensors")["classes"] == ["cat, größer", "no"]
    assert "noise" in capsys.readouterr().out
