"""Figures and report of a run, made from its run directory."""

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from reslab.errors import UserError
from reslab.metric_text import wilson
from reslab.runs.figures import CAPTIONS, confusion, draw_figures, draw_grid, draw_lr, learning_curves, shorten
from reslab.runs.predictions import Predictions, calibrate, confusion_counts, most_confused
from reslab.runs.report import duration, write_report

NAMES = ["cat", "dog", "<script>alert(1)</script>", "cost_$5$_{x", "a very long name " * 9]
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)


def log(run: Path, epochs: int = 3, val: bool = True, **last: float) -> None:
    """Write a metrics.csv with four rows per epoch; `last` changes values in the last row."""
    rows = []
    for step in range(1, 4 * epochs + 1):
        row = {"step": 10 * step, "epoch": (step - 1) // 4, "train/loss": 2 / step, "train/acc": 1 - 1 / step}
        row |= {"lr": 0.1 / step, "images_per_second": 900.0}
        if val and step % 4 == 0:
            row |= {"val/loss": 3 / step, "val/acc": 0.9 - 1 / step, "val/acc5": 0.99}
        rows.append(row)
    rows[-1] |= last
    pd.DataFrame(rows).to_csv(run / "metrics.csv", index=False)


def predict(run: Path, wrong: int, n: int = 50, classes: int = 5) -> None:
    """Write predictions of n images; the first `wrong` of them are predicted as the next class."""
    label = np.arange(n) % classes
    prediction = np.where(np.arange(n) < wrong, (label + 1) % classes, label)
    confidence = np.linspace(0.5, 1, n, dtype=np.float32)
    np.savez(
        run / "predictions.npz",
        index=np.arange(n),
        label=label,
        prediction=prediction,
        confidence=confidence,
        correct_probability=np.where(label == prediction, confidence, 1 - confidence),
    )


def manifest(run: Path, **entries: object) -> None:
    (run / "manifest.json").write_text(json.dumps({"status": "complete", "seed": 7} | entries))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run: 40 of 50 test images are predicted correctly."""
    run = tmp_path / "exp" / "seed-7"
    run.mkdir(parents=True)
    log(run, **{"test/loss": 0.5, "test/acc": 0.8, "test/acc5": 1.0})
    predict(run, wrong=10)
    manifest(
        run,
        command="reslab fit --config a.yaml",
        git={"sha": "f00d", "dirty": True, "diff": "git.diff"},
        environment={"python": "3.12.1", "packages": {"torch": "2.11.0"}, "gpus": []},
        data={"files": "aa11", "split": "bb22", "classes": "cc33", "class_names": NAMES},
        attempts=[{"started": "2026-01-01T00:00:00+00:00", "status": "preempted"}],
        results={"test/acc": 0.8, "test/loss": 0.5},
        weights_sha256="dd44",
        wall_seconds=754.2,
        samples_per_second=3210.0,
    )
    net = "{class_path: reslab.models.ResNet, init_args: {width: 16}}"
    (run / "config.yaml").write_text(f"model: {{net: {net}}}\ntrainer: {{max_epochs: 3}}\n")
    (run / "weights.safetensors").touch()
    return run


def assert_pictures(paths: list[Path]) -> None:
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert 300 <= image.width <= 2000 and 200 <= image.height <= 2000
            assert len(image.convert("L").getcolors(256) or []) > 1  # not blank


def test_all_figures_are_drawn(run: Path) -> None:
    paths = draw_figures(run, NAMES, IMAGES)
    assert [path.stem for path in paths] == list(CAPTIONS)
    assert_pictures(paths)


@pytest.mark.parametrize("channels", [1, 3])
def test_draw_figures_accepts_image_function_grey_or_colour(run: Path, channels: int) -> None:
    requested = []

    def image(index: int) -> np.ndarray:
        requested.append(index)
        return np.full((8 + index, 20, channels), 10 * index, np.uint8)

    assert_pictures(draw_figures(run, NAMES, image))
    assert requested == list(range(9, -1, -1))  # the mistakes only, the most confident first


def test_figures_without_validation_and_with_nan(run: Path) -> None:
    log(run, epochs=1, val=False, **{"train/loss": float("nan"), "train/acc": float("inf")})
    names = [path.stem for path in draw_figures(run, NAMES, IMAGES)]
    assert names[:2] == ["learning_curves", "learning_rate"]


def test_figures_from_one_logged_step(run: Path) -> None:
    (run / "metrics.csv").write_text("step,epoch,train/loss,lr\n5,0,2.3,0.1\n")
    assert_pictures(draw_figures(run, NAMES, IMAGES))


def test_old_mistakes_figure_is_removed(run: Path) -> None:
    draw_figures(run, NAMES, IMAGES)
    predict(run, wrong=0)
    paths = draw_figures(run, NAMES, IMAGES)
    assert "mistakes" not in [path.stem for path in paths]
    assert not (run / "figures" / "mistakes.png").exists()


def test_confusion_matrix_shows_every_count_also_zero() -> None:
    index = np.arange(4)
    label, prediction = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    figure = confusion(Predictions(index, label, prediction, np.ones(4)), NAMES[:3])
    assert figure and [text.get_text() for text in figure.axes[0].texts] == [
        "1",
        "1",
        "0",
        "0",
        "1",
        "0",
        "0",
        "0",
        "1",
    ]


def test_confusion_of_many_classes_shows_pairs(run: Path) -> None:
    predict(run, wrong=10, classes=100)
    assert_pictures(draw_figures(run, [f"n{i:08d}" for i in range(100)], IMAGES))


@pytest.mark.parametrize("text", [None, "", "step,epoch,train/loss\n", "step,epoch,train/loss,lr\n10,0,2.1,0.1\n20,"])
def test_figures_of_untested_run(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    expected = ["learning_curves", "learning_rate"] if text and "2.1" in text else []
    assert [path.stem for path in draw_figures(tmp_path, NAMES, IMAGES)] == expected


def test_draw_lr_and_draw_grid(tmp_path: Path) -> None:
    draw_lr(range(100), [0.1] * 100, tmp_path / "lr.png")
    grid = np.random.default_rng(1).integers(0, 256, (2, 6, 8, 8, 1), dtype=np.uint8)
    draw_grid(grid, tmp_path / "grid.png", ["original", "epoch $0$"], ["3", "7"])
    assert_pictures([tmp_path / "lr.png", tmp_path / "grid.png"])


def test_confusion_counts_has_true_classes_in_rows() -> None:
    counts = confusion_counts(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0]), 3)
    assert counts.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 0]]
    assert most_confused(counts, top=5) == [(0, 1, 2), (2, 0, 1)]


def test_calibration_error_of_known_example() -> None:
    # Bin (0.4, 0.6] holds 2 images, half of them correct at 0.5; bin (0.8, 1] holds 3, two correct at 0.9.
    confidence = np.array([0.5, 0.5, 0.9, 0.9, 0.9], np.float32)
    calibration = calibrate(confidence, np.array([True, False, True, True, False]), bins=5)
    assert calibration.count.tolist() == [0, 0, 2, 0, 3]
    assert calibration.ece == pytest.approx(2 / 5 * 0 + 3 / 5 * (0.9 - 2 / 3), abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1))
def test_calibration_counts_every_image_and_is_at_most_1(images: list[tuple[float, bool]]) -> None:
    confidence, correct = (np.array(column) for column in zip(*images, strict=True))
    calibration = calibrate(confidence, correct)
    assert calibration.count.sum() == len(images)
    assert abs(correct.mean() - confidence.mean()) - 1e-9 <= calibration.ece <= 1  # the triangle inequality


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_matches_scipy(case: tuple[int, int]) -> None:
    expected = binomtest(*case).proportion_ci(method="wilson")
    assert wilson(*case) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_shorten_cuts_long_names_to_one_line() -> None:
    assert shorten("tabby\n cat") == "tabby cat"
    assert len(shorten("x" * 99, 10)) == 10


def test_report_shows_numbers_and_figures(run: Path) -> None:
    figures = draw_figures(run, NAMES, IMAGES)
    page = write_report(run).read_text()
    text = " ".join(unescape(re.sub("<[^>]*>", " ", page)).split())
    low, high = wilson(40, 50)
    for part in (
        "exp/seed-7",
        "80.00 %",
        f"{100 * low:.2f}–{100 * high:.2f} %",
        "50 test images",
        "12 min 34 s",
        "3,210",
        "ResNet(width=16)",
        "git checkout f00d",
        f"git apply {run}/git.diff",
        f"reslab fit --config {run}/config.yaml",
        "3.12.1",
        "2.11.0",
        "aa11",
        "bb22",
        "cc33",
        "dd44",
        "preempted",
        "max_epochs: 3",
    ):
        assert part in text, part
    assert page.count('src="data:image/png;base64,') == len(figures) == 5


def test_class_table_is_sorted_by_accuracy_with_confusions(run: Path) -> None:
    predict(run, wrong=1)  # one of the ten cats, predicted as a dog
    manifest(run, results={"test/acc": 0.98}, data={"class_names": NAMES})
    page = write_report(run).read_text()
    first = re.search(r"<tbody>\s*<tr>(.*?)</tr>", page, re.S)[1]
    assert [unescape(cell) for cell in re.findall(r">([^<>]*\w[^<>]*)<", first)] == [
        "cat", "10", "90.0 %", "dog ", "(1)",
    ]  # fmt: skip
    assert page.count("never wrong") == 4


def test_report_has_no_external_resources_and_escapes_html(run: Path) -> None:
    draw_figures(run, NAMES, IMAGES)
    manifest(run, command="<script>", data={"class_names": NAMES}, attempts=[{"error": "<img src=http://x>"}])
    page = write_report(run).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    loaded = re.findall(r"\b(?:src|srcset|href|action|poster)=(\S+)", page)
    assert [link for link in loaded if not link.startswith('"data:')] == ["http://x&gt;"]  # the escaped one
    assert "url(" not in page and "@import" not in page


@pytest.mark.parametrize("status", ["running", "preempted", "failed", "diverged"])
def test_report_of_unfinished_run_lists_what_is_missing(tmp_path: Path, status: str) -> None:
    manifest(tmp_path, status=status, attempts=[{"status": status, "error": "out\nof memory"}])
    log(tmp_path, epochs=2)
    page = write_report(tmp_path).read_text()
    assert f">{status}</span>" in page
    assert "The test set has not been evaluated" in page
    assert "no predictions.npz" in page and "no weights.safetensors" in page and "no config.yaml" in page
    assert "no metrics.csv" not in page
    assert "latest validation accuracy" in page and "77.50 %" in page
    assert "reslab fit" not in page  # the run cannot be repeated without its config


def test_report_from_manifest_only(tmp_path: Path) -> None:
    manifest(tmp_path, status="running", results=None, data=None, git=None)
    assert "none yet" in write_report(tmp_path).read_text()


def test_report_notices_contradicting_predictions(run: Path) -> None:
    assert "disagree" not in write_report(run).read_text()
    predict(run, wrong=9)
    assert "disagree" in write_report(run).read_text()


def test_report_of_other_directory_is_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


@pytest.mark.parametrize(("seconds", "text"), [(41.24, "41.2 s"), (754, "12 min 34 s"), (11100, "3 h 05 min")])
def test_duration_is_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_report_of_any_metrics(run: Path) -> None:
    """An objective without accuracy: its first test metric is the headline, the others are tiles and panels."""
    rows = [{"step": step, "val/f1_macro": step / 100, "val/auroc": 0.5, "train/loss": 1.0} for step in (10, 20)]
    pd.DataFrame(rows).to_csv(run / "metrics.csv", index=False)
    manifest(run, results={"val/f1_macro": 0.2, "test/f1_macro": 0.25, "test/auroc": 0.75})
    (run / "predictions.npz").unlink()
    paths = draw_figures(run, NAMES, IMAGES)
    assert [path.stem for path in paths] == ["learning_curves"]
    page = write_report(run).read_text()
    text = " ".join(unescape(re.sub("<[^>]*>", " ", page)).split())
    for part in ("test f1 macro 0.2500", "test auroc 0.7500", "validation f1 macro 0.2000", "validation auroc 0.5000"):
        assert part in text, part
    assert "accuracy" not in text and "has not been evaluated" not in text


def test_learning_curves_have_one_panel_per_metric() -> None:
    points = np.array([10.0, 20.0]), np.array([0.1, 0.2])
    metrics = dict.fromkeys(("train/loss", "val/loss", "val/acc", *(f"val/m{i}" for i in range(6)), "lr"), points)
    figure = learning_curves(metrics)
    titles = ["Loss", "Accuracy (%)", "m0", "m1", "m2", "m3"]
    assert figure and [ax.get_title() for ax in figure.axes] == titles
    assert learning_curves({"lr": points}) is None


def test_report_does_not_import_torch() -> None:
    code = "import sys, reslab.runs.report, reslab.runs.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
