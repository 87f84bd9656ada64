"""A run from the command line to its run directory, as a user sees it."""

import csv
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from reslab.training.checkpoint import weights_sha256
from runner import Ended, reslab

SHORT = ["--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "5"]


def fit(repo: Path, *args: str | Path, cwd: Path | None = None) -> Ended:
    return reslab("fit", "--config", repo / "configs/experiment/digits.yaml", *SHORT, *args, cwd=cwd)


@pytest.fixture(scope="module")
def run(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ein Lauf, größer"  # spaces and non-ASCII letters
    command = [sys.executable, "-m", "reslab", "fit", "--config", repo / "configs/experiment/digits.yaml", *SHORT]
    done = subprocess.run([*command, "--run.dir", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\nreport +\S.*report\.html\n", done.stdout)
    assert "epoch 2/2" in done.stdout  # one line per epoch when the output is a file
    return folder


def test_run_directory_contents(run: Path) -> None:
    names = {"config.yaml", "manifest.json", "metrics.csv", "weights.safetensors", "predictions.npz", "report.html"}
    assert names <= {p.name for p in run.iterdir()}
    assert {"last.ckpt", "best.ckpt", "SHA256SUMS"} <= {p.name for p in (run / "checkpoints").iterdir()}
    figures = {p.stem for p in (run / "figures").iterdir()}
    assert {"learning_curves", "learning_rate", "confusion", "mistakes", "reliability"} <= figures
    assert not list(run.rglob("*.part")) and not list(run.rglob("probe"))


def test_manifest_records_provenance_and_results(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["seed"] == 0
    assert manifest["config_sha256"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert manifest["weights_sha256"] == weights_sha256(load_file(run / "weights.safetensors"))
    assert [a["how"] for a in manifest["attempts"]] == ["complete"]
    assert manifest["samples_per_second"] > 0 and manifest["wall_seconds"] > 0
    assert {"files", "split", "classes"} <= set(manifest["data"])
    assert {"python", "packages", "cpu", "threads", "determinism"} <= set(manifest["environment"])
    assert 0 < manifest["results"]["test/acc"] <= 1


def test_metrics_have_one_row_per_logged_step(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40]  # 1,294 // 64 = 20 steps per epoch, two epochs
    assert all(row["train/loss"] and row["lr"] for row in rows)
    assert [row["step"] for row in rows if row["val/acc"]] == ["20", "40"]
    assert [row["step"] for row in rows if row["test/acc"]] == ["40"]  # the only test


def test_predictions_cover_the_test_set_and_match_the_result(run: Path) -> None:
    predictions = np.load(run / "predictions.npz")
    assert predictions["index"].tolist() == list(range(359))
    accuracy = (predictions["prediction"] == predictions["label"]).mean()
    assert accuracy == pytest.approx(json.loads((run / "manifest.json").read_text())["results"]["test/acc"])


def test_saved_config_repeats_the_run(run: Path, tmp_path: Path) -> None:
    again = reslab("fit", "--config", run / "config.yaml", "--run.dir", tmp_path / "again", "--data.num_workers", "1")
    assert again.status == 0, again.output
    first, second = (json.loads((d / "manifest.json").read_text()) for d in (run, tmp_path / "again"))
    assert first["weights_sha256"] == second["weights_sha256"]


def test_finished_run_is_not_changed(repo: Path, run: Path) -> None:
    before = (run / "manifest.json").read_bytes()
    done = fit(repo, "--run.dir", run)
    assert done.status == 0 and "nothing to do" in done.output
    assert (run / "manifest.json").read_bytes() == before


def test_finished_run_without_report_gets_one(repo: Path, run: Path) -> None:
    (run / "report.html").unlink()
    assert fit(repo, "--run.dir", run).status == 0
    assert (run / "report.html").exists()


def test_different_config_in_the_same_directory_is_refused(repo: Path, run: Path) -> None:
    before = (run / "manifest.json").read_bytes()
    done = fit(repo, "--run.dir", run, "--seed_everything", "7")
    assert done.status == 2 and "seed_everything: 0 (in the run directory) != 7 (requested)" in done.output
    assert "Traceback" not in done.output and (run / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("split", ["test", "validate"])
def test_evaluation_repeats_the_recorded_result(run: Path, split: str) -> None:
    done = reslab(split, run)
    assert done.status == 0, done.output
    results = json.loads((run / "manifest.json").read_text())["results"]
    values = dict(line.split() for line in done.output.splitlines() if "/" in line.split()[0])
    prefix = {"test": "test", "validate": "val"}[split]
    assert float(values[f"{prefix}/acc"]) == pytest.approx(results[f"{prefix}/acc"], abs=1e-6)
    assert float(values[f"{prefix}/loss"]) == pytest.approx(results[f"{prefix}/loss"], abs=1e-6)


def test_predict_writes_one_row_per_image_and_reports_unreadable_ones(run: Path, tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(20):
        pixels = np.rint(digits.images[i] * 255 / 16).astype(np.uint8)
        (tmp_path / "images" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / str(i % 3) / f"{i:02d}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"not an image")
    done = reslab("predict", run, "--images", tmp_path / "images", "--out", tmp_path / "out.csv")
    assert done.status == 0, done.output
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 21
    broken = [row for row in rows if row["error"]]
    assert len(broken) == 1 and broken[0]["file"].endswith("broken.png") and not broken[0]["prediction"]
    correct = [str(digits.target[int(Path(row["file"]).stem)]) == row["prediction"] for row in rows if not row["error"]]
    assert sum(correct) >= 12  # two epochs of training; chance is 2
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows if not row["error"])


def test_default_run_directory(repo: Path, tmp_path: Path) -> None:
    done = fit(repo, "--trainer.max_epochs", "1", "--run.test_weights", "best", cwd=tmp_path)
    assert done.status == 0, done.output
    (folder,) = (tmp_path / "runs" / "digits").iterdir()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["run"]["test_weights"] == "best" and "-seed0-" in folder.name
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]  # no other files


def test_data_error_is_one_message_and_claims_no_run_directory(repo: Path, tmp_path: Path) -> None:
    config = repo / "configs/experiment/cifar10_resnet20.yaml"
    options = ["--data.root", tmp_path, "--data.download", "false", "--run.dir", tmp_path / "r"]
    done = reslab("fit", "--config", config, *options)
    assert done.status == 2 and "Traceback" not in done.output
    assert str(tmp_path) in done.output and not (tmp_path / "r").exists()


def test_refused_value_creates_no_run_directory(repo: Path, tmp_path: Path) -> None:
    done = fit(repo, "--run.dir", tmp_path / "r", "--model.objective.init_args.label_smoothing", "3")
    assert done.status == 2 and "label_smoothing" in done.output and not (tmp_path / "r").exists()
