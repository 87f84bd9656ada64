"""Classifying a folder of any size: rows as they come, a whole file or none."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reslab.cli import main
from reslab.data.files import image_names
from reslab.data.samplers import FolderOrder

Undisturbed = Callable[..., Path]


def predict(run: Path, images: Path, out: Path, *options: str) -> int:
    return main(["predict", str(run), "--images", str(images), "--out", str(out), *options])


def grey(file: Path | bytes, level: int = 0) -> None:
    with open(file, "wb") as opened:  # noqa: PTH123 - a name of bytes
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(opened, "png")


def test_a_row_an_image_in_the_order_of_their_names(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.png", "b/0.png", "b/c/1.PNG", "b-.png", "d.png"]
    for level, name in enumerate(names):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        grey(tmp_path / "images" / name, 50 * level)
    (tmp_path / "images" / "c.jpg").write_bytes(b"not an image")
    (tmp_path / "images" / ".hidden.png").touch()
    (tmp_path / "images" / "notes.txt").touch()
    out = tmp_path / "new folder" / "out.csv"
    assert predict(undisturbed(), tmp_path / "images", out, "--all", "--data.eval_batch_size=2") == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [row["file"] for row in rows] == sorted([*names, "c.jpg"])
    for row in rows:
        if row["file"] == "c.jpg":
            assert "not a readable image" in row["error"] and not row["prediction"] and not row["0"]
        else:
            chances = [float(row[str(digit)]) for digit in range(10)]
            assert sum(chances) == pytest.approx(1, abs=1e-5) and not row["error"]
            assert float(row["probability"]) == max(chances) == float(row[row["prediction"]])
    told = capsys.readouterr()
    assert "6 images" in told.out and "1 files could not be read" in told.err


@pytest.mark.skipif(os.name != "posix", reason="names of files are text here")
def test_a_name_that_is_no_text_is_written_as_it_is(undisturbed: Undisturbed, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    grey(os.fsencode(tmp_path / "images") + b"/caf\xe9.png")  # Latin-1
    assert predict(undisturbed(), tmp_path / "images", tmp_path / "out.csv") == 0
    assert b"caf\xe9.png," in (tmp_path / "out.csv").read_bytes()


@pytest.mark.parametrize("images", ["empty", "nowhere"])
def test_without_images_no_file_is_written(
    undisturbed: Undisturbed, tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out.csv").write_text("from before")
    assert predict(undisturbed(), tmp_path / images, tmp_path / "out.csv") == 2
    assert images in capsys.readouterr().err
    assert (tmp_path / "out.csv").read_text() == "from before"
    assert {file.name for file in tmp_path.iterdir()} == {"empty", "out.csv"}


def test_a_folder_is_listed_when_its_turn_comes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        grey(tmp_path / name / "0.png")
    paths = image_names(tmp_path)
    assert next(paths) == "a/0.png"
    grey(tmp_path / "b" / "1.png")
    assert list(paths) == ["b/0.png", "b/1.png"]
    assert list(FolderOrder(tmp_path, 2)) == [(0, ["a/0.png", "b/0.png"]), (2, ["b/1.png"])]
