"""Classify a directory of any size: rows are streamed, and the file is written completely or not at all."""

import csv
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image

from reslab.cli import main
from reslab.data.files import Walk
from reslab.data.samplers import FolderOrder

Undisturbed = Callable[..., Path]


def predict(run: Path, images: Path, out: Path, *options: str) -> int:
    return main(["predict", str(run), "--images", str(images), "--out", str(out), *options])


def save_gray(file: Path | bytes, level: int = 0) -> None:
    with open(file, "wb") as opened:  # noqa: PTH123 - the name may be bytes
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(opened, "png")


def test_one_row_per_image_sorted_by_name(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.png", "b/0.png", "b/c/1.PNG", "b-.png", "d.png"]
    for level, name in enumerate(names):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        save_gray(tmp_path / "images" / name, 50 * level)
    (tmp_path / "images" / "c.jpg").write_bytes(b"not an image")
    (tmp_path / "images" / ".hidden.png").touch()
    (tmp_path / "images" / "notes.txt").touch()
    out = tmp_path / "new directory" / "out.csv"
    assert predict(undisturbed(), tmp_path / "images", out, "--all", "--data.eval_batch_size=2") == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [row["file"] for row in rows] == sorted([*names, "c.jpg"])
    for row in rows:
        if row["file"] == "c.jpg":
            assert "not a readable image" in row["error"] and not row["prediction"] and not row["0"]
        else:
            probabilities = [float(row[str(digit)]) for digit in range(10)]
            assert sum(probabilities) == pytest.approx(1, abs=1e-5) and not row["error"]
            assert float(row["probability"]) == max(probabilities) == float(row[row["prediction"]])
    output = capsys.readouterr()
    assert "6 images" in output.out and "1 unreadable files" in output.err


@pytest.mark.skipif(os.name != "posix", reason="file names are text on this system")
def test_file_name_that_is_not_utf8_is_written_unchanged(undisturbed: Undisturbed, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    save_gray(os.fsencode(tmp_path / "images") + b"/caf\xe9.png")  # Latin-1
    assert predict(undisturbed(), tmp_path / "images", tmp_path / "out.csv") == 0
    assert b"caf\xe9.png," in (tmp_path / "out.csv").read_bytes()


@pytest.mark.parametrize("images", ["empty", "missing"])
def test_no_images_is_an_error_and_keeps_the_old_file(
    undisturbed: Undisturbed, tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out.csv").write_text("old")
    assert predict(undisturbed(), tmp_path / images, tmp_path / "out.csv") == 2
    assert images in capsys.readouterr().err
    assert (tmp_path / "out.csv").read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"empty", "out.csv"}


def test_directories_are_listed_lazily(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_gray(tmp_path / name / "0.png")
    paths = Walk(tmp_path).images()
    assert next(paths) == "a/0.png"
    save_gray(tmp_path / "b" / "1.png")
    assert list(paths) == ["b/0.png", "b/1.png"]
    assert list(FolderOrder(tmp_path, 2)) == [(0, ["a/0.png", "b/0.png"]), (2, ["b/1.png"])]


@pytest.mark.parametrize(
    ("init_args", "overrides"),
    [
        ("{name: resnet10t, pretrained: true}", ["--model.net.init_args.pretrained=false"]),
        ("{name: resnet18, weights: DEFAULT}", ["--model.net.init_args.weights=null"]),
        ("{layers: [1, 1, 1]}", []),
    ],
)
def test_pretrained_weights_are_not_fetched_again(tmp_path: Path, init_args: str, overrides: list[str]) -> None:
    from reslab.inference import _without_pretrained

    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{net: {{class_path: Net, init_args: {init_args}}}}}")
    assert _without_pretrained(config) == overrides


# ---- class directories


def class_directories(top: Path, *names: str, images: int = 3) -> Path:
    for name in names:
        (top / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            save_gray(top / name / f"{i}.png", 80 * i)
    return top


def test_class_directories_give_true_classes_and_accuracy(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = class_directories(tmp_path / "images", "3", "8", "8/deeper")
    (images / "3" / "broken.png").write_bytes(b"not an image")
    assert predict(undisturbed(), images, tmp_path / "out.csv", "--all") == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["true_class"] for row in rows] == ["3"] * 4 + ["8"] * 6
    assert all(row["0"] for row in rows if not row["error"])
    correct = sum(row["prediction"] == row["true_class"] for row in rows)
    assert f"accuracy: {100 * correct / 9:.2f} %  (95 % interval" in (output := capsys.readouterr().out)
    assert "n = 9)" in output and "not counted" not in output  # an unreadable file has no prediction to be right


@pytest.mark.parametrize(
    ("directories", "messages"),
    [
        (
            ["3", "cats", "dogs"],
            ["n = 3)", "not counted: 6 images", "1 of 10 classes (3)", "not recognised: cats, dogs"],
        ),
        (["3", ""], ["n = 3)", "not counted: 3 images outside of the class directories", "1 of 10 classes (3)"]),
        (["cats", "dogs"], ["no accuracy: no directory", "10 classes (0, 1, 2,"]),
        (["train/3", "val/3"], ["no accuracy: no directory", "try --images {images}/train"]),
    ],
)
def test_directories_that_are_not_recognised_are_named(
    directories: list[str],
    messages: list[str],
    undisturbed: Undisturbed,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = class_directories(tmp_path / "images", *directories)
    assert predict(undisturbed(), images, tmp_path / "out.csv") == 0
    output = capsys.readouterr().out
    assert not [text for text in messages if text.format(images=images) not in output], output
    columns = next(csv.reader((tmp_path / "out.csv").open()))
    assert ("true_class" in columns) == ("95 % interval" in output) == ("3" in directories)


def test_flat_directory_has_no_true_classes(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = class_directories(tmp_path / "images", "")
    assert predict(undisturbed(), images, tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_text().startswith("file,prediction,probability,error\n")
    assert "accuracy" not in capsys.readouterr().out


# ---- what libraries print

MESSAGES = ["torch warns", "lightning warns", "lightning gives a tip", "torch logs a warning"]
USES = {
    "test": lambda run: ["test", run],
    "validate": lambda run: ["validate", run],
    "predict": lambda run: ["predict", run, "--images", class_directories(run / "images", "3")],
    "export": lambda run: ["export", run, "--format", "safetensors"],
    "verify": lambda run: ["verify", run],
    "doctor": lambda run: ["doctor", "--config", run / "config.yaml"],
    "preview": lambda run: ["preview", "lr", "--config", run / "config.yaml", "--out", run / "lr.png"],
    "summary": lambda run: ["summary", "resnet20", "--input", "3,8,8"],
}


@pytest.mark.parametrize("command", USES)
def test_messages_of_libraries_are_not_printed(
    command: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    create, emitted = torch.nn.Conv2d.__init__, []

    def noisy(self: Any, *args: Any, **options: Any) -> None:
        warnings.warn(MESSAGES[0], stacklevel=2)
        rank_zero_warn(MESSAGES[1])
        rank_zero_info(MESSAGES[2])
        logging.getLogger("torch.distributed").warning(MESSAGES[3])
        emitted.append(self)
        create(self, *args, **options)

    shutil.copytree(undisturbed(), tmp_path / "run")
    monkeypatch.setattr(torch.nn.Conv2d, "__init__", noisy)
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # pytest records warnings, so they would not be printed
        warnings.showwarning = lambda message, *args, **options: print(message, file=sys.stderr)
        assert main([*map(str, USES[command](tmp_path / "run"))]) == 0
    output = capfd.readouterr()
    assert emitted or command == "verify"
    assert not [text for text in MESSAGES if text in output.out + output.err]
    assert "warn" not in (output.out + output.err).lower()


# ---- where outputs go: the same for all commands that write a file

COMMANDS = {
    "predict": lambda run, images: ["predict", run, "--images", images],
    "export": lambda run, images: ["export", run, "--format", "safetensors"],
    "preview": lambda run, images: ["preview", "lr", "--config", run / "config.yaml"],
}
IMPOSSIBLE = {
    "directory": ("here", "it is a directory"),
    "parent": ("here/..", "it is a directory"),
    "file in the way": ("file/out", "Not a directory|File exists"),
    "file further up": ("file/a/b/out", "Not a directory"),
    "no rights": ("locked/out", "Permission denied"),
    "name too long": ("x" * 300, "name too long"),
    "no regular file": ("pipe", "not a regular file"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_impossible_outputs_are_refused_before_anything_is_loaded(
    command: str,
    kind: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, message = IMPOSSIBLE[kind]
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "locked").mkdir(mode=0o500)
    if kind == "no rights" and os.access(tmp_path / "locked", os.W_OK):  # root may write anywhere
        monkeypatch.setattr(Path, "touch", lambda *args: os.open(tmp_path / "none", os.O_RDONLY))
        message = "No such file"
    loaded = []
    monkeypatch.setattr("reslab.config.Experiment.__init__", lambda *args: loaded.append(args))
    words = COMMANDS[command](undisturbed(), tmp_path)
    assert main([*map(str, words), "--out", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"cannot write .*({message})", error, re.IGNORECASE) and error.count("\n") == 1
    assert not loaded
    assert not list(tmp_path.rglob("*.test"))


@pytest.mark.parametrize(
    ("command", "output"), [("predict", "predictions-images.csv"), ("export", "export/*.safetensors")]
)
@pytest.mark.parametrize("directory", ["", "."])
def test_default_outputs_are_inside_of_the_run_directory(
    command: str,
    output: str,
    directory: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(undisturbed(), run)
    images.mkdir()
    save_gray(images / "a.png")
    monkeypatch.chdir(images)
    before = {*tmp_path.rglob("*")}
    assert main([*map(str, COMMANDS[command](run, directory or images))]) == 0
    new = {path.relative_to(run) for path in {*tmp_path.rglob("*")} - before}  # nothing elsewhere
    files = [path for path in new if (run / path).match(output)]
    assert len(files) == 1 and str(run / files[0]) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["p.foo", "p"])
def test_format_of_a_preview_is_checked_before_the_work(
    name: str, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = COMMANDS["preview"](undisturbed(), tmp_path)
    assert main([*map(str, words), "--out", str(tmp_path / name)]) == 2
    assert re.fullmatch(r"reslab: --out must end in \.png, .*\n", capsys.readouterr().err)


def test_weights_of_another_network_are_described_in_one_line(
    undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    run = undisturbed()
    assert main(["test", str(run), "--model.net.init_args.width=32"]) == 2
    error = capsys.readouterr().err
    assert f"{run} is ResNet [1, 1, 1], width 16; this network is [1, 1, 1], width 32" in error
    assert error.count("\n") == 1
