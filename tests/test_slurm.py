"""Under a real Slurm: a run that is told to stop is requeued and ends as if nothing had happened."""

import os
import re
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

from runner import DIGITS, REPO, SHORT, TRAINING, Fault, manifest, metrics, traces
from slurm import command, queue, slurm, until

__all__ = ["slurm"]  # the fixture
pytestmark = pytest.mark.slurm
TWO = ["--trainer.strategy=ddp", "--data.num_workers=1", "--trainer.max_epochs=6"]
SLOW_TO_REQUEUE = Fault("reslab.experiment:requeue", "linger")


def submit(folder: Path, *options: str, fault: Fault | None = None) -> str:
    """Submits scripts/slurm.sbatch with a short run in `folder`, and sbatch's options; returns the job's number."""
    program = folder.with_suffix(".bin") / "reslab"  # what the script finds in PATH
    program.parent.mkdir()
    words = " ".join(map(str, astuple(fault))) if fault else "-"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {REPO}/tests/runner.py "{words}" "$@"\n')
    program.chmod(0o755)
    path = f"--export=ALL,PATH={program.parent}{os.pathsep}{os.environ['PATH']}"
    script = [REPO / "scripts/slurm.sbatch", *DIGITS, *SHORT, *TWO, "--run.dir", folder]
    return re.search(r"\d+", command("sbatch", path, f"--output={folder}.txt", *options, *script))[0]  # type: ignore[index]


def has_begun(folder: Path) -> bool:
    return (folder / "metrics.csv").exists() and len(metrics(folder)) > 1


@pytest.fixture(scope="module")
def undisturbed_two(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    submit(folder, "--ntasks-per-node=2")
    until(lambda: not queue(), "the undisturbed run")
    assert manifest(folder)["status"] == "complete", Path(f"{folder}.txt").read_text()
    return folder


@pytest.mark.slow
def test_a_job_of_two_tasks_is_requeued_and_ends_with_the_same_weights(undisturbed_two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(run, "--ntasks-per-node=2", fault=SLOW_TO_REQUEUE)  # the other task must not end before that
    until(lambda: has_begun(run), "the first steps")
    command("scancel", "--signal=USR1", job)
    until(lambda: not queue(), "the job's end")
    first, second = manifest(run)["attempts"]
    assert first["how"].startswith("preempted: SIGUSR1 at step") and second["from_step"] > 0
    assert traces(run) == traces(undisturbed_two)


@pytest.mark.slow
def test_before_its_time_is_up_a_job_is_requeued(undisturbed_two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submit(run, "--ntasks-per-node=2", "--time=2", "--signal=USR1@30", fault=Fault(TRAINING, "wait_for_slurm", 11))
    until(lambda: not queue(), "the job's end")
    assert manifest(run)["attempts"][0]["how"].startswith("preempted: SIGUSR1 at step 16")
    assert traces(run) == traces(undisturbed_two)


def test_a_cancelled_job_keeps_a_checkpoint_and_stays_cancelled(slurm: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(run, "--ntasks-per-node=1")
    until(lambda: has_begun(run), "the first steps")
    command("scancel", job)
    until(lambda: not queue(), "the job's end")
    [attempt] = manifest(run)["attempts"]
    assert attempt["how"].startswith("preempted: SIGTERM") and (run / "checkpoints/last.ckpt").exists()
