"""Runs of several processes (gloo on the CPU): they stop together, resume to the same bits, and share one folder."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from runner import DIGITS, SHORT, TRAINING, Ended, Fault, fit, manifest, metrics, spawn, traces

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.ema_decay=0.9"]


def fit_two(folder: Path, fault: Fault | None = None) -> Ended:
    return spawn("fit", *DIGITS, *SHORT, "--run.dir", folder, *TWO, fault=fault)


@pytest.fixture(scope="module")
def undisturbed_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    ended = fit_two(folder)
    assert ended.status == 0, ended.output
    return folder


def test_two_processes_train_into_one_folder(undisturbed_two: Path) -> None:
    assert manifest(undisturbed_two)["environment"]["world_size"] == 2
    rows = metrics(undisturbed_two)
    assert [int(row["step"]) for row in rows] == list(range(5, 61, 5))  # as one process: the batch is global
    assert len(manifest(undisturbed_two)["attempts"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both(undisturbed_two: Path, tmp_path: Path, rank: int) -> None:
    ended = fit_two(tmp_path, Fault(TRAINING, "terminate", 11, rank))
    assert ended.status == 75, ended.output
    assert manifest(tmp_path)["status"] == "preempted" and "at step 16" in manifest(tmp_path)["attempts"][0]["how"]
    ended = fit_two(tmp_path)
    assert ended.status == 0, ended.output
    assert traces(tmp_path) == traces(undisturbed_two)


def test_another_number_of_processes_is_refused_unless_allowed(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    assert fit(killed, fault=Fault(TRAINING, call=11)).status == -signal.SIGKILL
    said = manifest(killed)
    said["environment"]["world_size"] = 4  # as if four had trained it so far
    (killed / "manifest.json").write_text(json.dumps(said))
    allowed = Path(shutil.copytree(killed, tmp_path / "allowed"))
    refused = fit(killed)
    assert refused.status == 2 and "4 processes, not 1" in refused.output and "--run.elastic" in refused.output
    ended = fit(allowed, "--run.elastic=true")
    assert ended.status == 0, ended.output
    assert "bits may differ" in manifest(allowed)["elastic"]
