"""Real Slurm: a signalled run is requeued and ends with the same weights; studies run as job arrays."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest

from reslab.ablation.cells import states
from reslab.ablation.plan_log import read_decisions
from reslab.ablation.slurm import Cluster, jobs, run_slurm
from reslab.ablation.study import read_study
from reslab.errors import UserError
from runner import DIGITS, REPO, SHORT, TRAINING, Fault, manifest, metrics, traces
from slurm import PATIENCE, command, queue, slurm, until
from test_ablation import fake, tries, write
from test_looks import LR, RESULTS

__all__ = ["fake", "slurm"]  # fixtures
pytestmark = pytest.mark.slurm
TWO = ["--trainer.strategy=ddp", "--data.num_workers=1", "--trainer.max_epochs=6"]
SLOW_TO_REQUEUE = Fault("reslab.experiment:requeue", "linger")


# One run


def submit(folder: Path, *options: str, fault: Fault | None = None) -> str:
    """Submit scripts/slurm.sbatch with a short run in `folder` and options of sbatch; return the job number."""
    program = folder.with_suffix(".bin") / "reslab"  # found by the script in PATH
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
@pytest.mark.timeout(600)
def test_requeued_job_of_two_tasks_ends_with_the_same_weights(undisturbed_two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(run, "--ntasks-per-node=2", fault=SLOW_TO_REQUEUE)  # the other task must not end first
    until(lambda: has_begun(run), "the first steps")
    command("scancel", "--signal=USR1", job)
    until(lambda: not queue(), "the job's end")
    first, second = manifest(run)["attempts"]
    assert first["how"].startswith("preempted: SIGUSR1 at step") and second["from_step"] > 0
    assert traces(run) == traces(undisturbed_two)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_job_is_requeued_before_its_time_limit(undisturbed_two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submit(run, "--ntasks-per-node=2", "--time=2", "--signal=USR1@30", fault=Fault(TRAINING, "wait_for_slurm", 11))
    until(lambda: not queue(), "the job's end")
    assert manifest(run)["attempts"][0]["how"].startswith("preempted: SIGUSR1 at step 16")
    assert traces(run) == traces(undisturbed_two)


def test_cancelled_job_keeps_a_checkpoint_and_stays_cancelled(slurm: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(run, "--ntasks-per-node=1")
    until(lambda: has_begun(run), "the first steps")
    command("scancel", job)
    until(lambda: not queue(), "the job's end")
    [attempt] = manifest(run)["attempts"]
    assert attempt["how"].startswith("preempted: SIGTERM") and (run / "checkpoints/last.ckpt").exists()


# Studies, with a fake `fit`

HELD = Cluster(sbatch={"hold": True})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reslab.ablation.slurm.POLL", 0.2)


def test_study_is_a_job_array_and_failed_cells_are_retried(
    slurm: None, quick: None, fake: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake({"A/seed-0": ["failed", "complete"], "none/seed-0": ["failed"], "A/seed-1": ["diverged"]})
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    assert run_slurm(study, out, Cluster(), limit=2, retries=2) == 1
    assert tries(out) == {"A/seed-0": 2, "none/seed-0": 3, "none/seed-1": 1, "A/seed-1": 1}
    assert [s.status for s in states(study, out)] == ["complete", "failed", "diverged", "complete"]
    printed = capfd.readouterr().out
    assert "submitted to Slurm: 4 cells" in printed
    assert "will be retried" in printed and "outcome of this cell" not in printed
    assert "outcome of this cell" in (out / "A/seed-0/log.txt").read_text()
    assert (
        len({job.number.partition("_")[0] for name, job in jobs(out).items() if name.endswith("1")}) == 1
    )  # one array


def test_study_with_looks_submits_one_look_at_a_time_and_stops_by_itself(
    slurm: None,
    quick: None,
    fake: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fake({})
    monkeypatch.setenv("FAKE_RESULTS", json.dumps(RESULTS))
    arms = {"base": {}, "far": {LR: 0.2}, "late": {LR: 0.5}}
    study = read_study(write(tmp_path, arms=arms, baseline="base", looks=[3, 5], seeds=None, margin=0.002))
    out = tmp_path / "out"
    assert run_slurm(study, out, Cluster(), detach=True) == 0
    assert "run the same command again: it judges them" in capfd.readouterr().out
    until(lambda: not queue(), "the first look")
    assert len(tries(out)) == 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reslab.ablation.slurm.Queue.wait", interrupt)
        assert run_slurm(study, out, Cluster()) == 75  # submits the second look
    assert read_decisions(study, out)["far"] == {"look": 3, "stopped": "decided", "verdict": "worse"}
    until(lambda: not queue(), "the second look")  # so the next command has nothing to wait for
    assert run_slurm(study, out, Cluster()) == 0 and not queue()
    assert set(tries(out).values()) == {1}
    seeds = {"base": 5, "far": 3, "late": 5}
    assert set(tries(out)) == {f"{arm}/seed-{seed}" for arm, n in seeds.items() for seed in range(n)}
    assert set(read_decisions(study, out)) == {"far", "late"}


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_cell_with_a_job_is_not_submitted_again(
    slurm: None, quick: None, fake: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake({})
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reslab.ablation.slurm.Queue.wait", interrupt)
        assert run_slurm(study, out, HELD) == 75
    [array] = {number.partition("_")[0] for number in queue()}
    assert f"scancel {array}" in capfd.readouterr().out
    command("scancel", f"{array}_0")
    assert run_slurm(study, out, HELD, detach=True) == 0
    assert "submitted to Slurm: 1 cell; 3 already submitted" in capfd.readouterr().out
    assert len(queue()) == 4
    command("scontrol", "release", *queue())
    assert run_slurm(study, out, Cluster()) == 0
    assert set(tries(out).values()) == {1}
    assert run_slurm(study, out, Cluster()) == 0 and not queue()


@pytest.mark.slow
@pytest.mark.parametrize("one_by_one", [True, False])
def test_cancelled_cells_are_not_retried(
    slurm: None, quick: None, fake: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_by_one: bool
) -> None:
    fake({})
    study, out = read_study(write(tmp_path)), tmp_path / "out"
    numbers = []

    def cancel(*args: object) -> None:
        numbers.extend(sorted(queue()))
        command("scancel", *(numbers if one_by_one else [numbers[0].partition("_")[0]]))
        monkeypatch.undo()

    monkeypatch.setattr("reslab.ablation.progress.StudyProgress.refresh", cancel)
    assert run_slurm(study, out, HELD) == 1
    assert len(numbers) == 4 and not queue() and not tries(out)


def test_rejected_job_gives_a_plain_message(
    slurm: None, fake: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(write(tmp_path))
    with pytest.raises(UserError, match="nowhere"):
        run_slurm(study, tmp_path / "out", Cluster(partition="nowhere"))
    with pytest.raises(UserError, match="acount"):
        run_slurm(study, tmp_path / "out", Cluster(sbatch={"acount": "vision"}))
    monkeypatch.setitem(sys.modules, "submitit", None)  # not installed
    with pytest.raises(UserError, match=r"pip install 'reslab\[slurm\]'"):
        run_slurm(study, tmp_path / "out", Cluster())


def test_cell_with_several_processes_requests_as_many_tasks_and_gpus() -> None:
    cluster = Cluster(partition="gpu", cpus=4, sbatch={"account": "vision"})
    parameters = cluster.parameters({"accelerator": "gpu", "num_nodes": 2, "devices": 8})
    assert (
        parameters["nodes"],
        parameters["ntasks_per_node"],
        parameters["gpus_per_node"],
        parameters["cpus_per_task"],
    ) == (2, 8, 8, 4)
    assert parameters["additional_parameters"] == {"requeue": True, "account": "vision"}
    parameters = Cluster().parameters({"accelerator": "cpu"})
    assert (parameters["nodes"], parameters["ntasks_per_node"], parameters["gpus_per_node"]) == (1, 1, None)
    assert Cluster(gpus=4).parameters({"accelerator": "auto", "devices": "auto"})["ntasks_per_node"] == 4


@pytest.mark.parametrize("options", [{"gpus": 1}, {}])
def test_precision_is_not_chosen_by_a_machine_without_the_gpus_of_the_jobs(
    options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"precision": "auto", "accelerator": "auto" if options else "gpu"}
    study = read_study(write(tmp_path, base=[{"trainer": trainer}]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="which has no GPU: add --precision bf16-mixed"):
        run_slurm(study, tmp_path / "out", Cluster(**options))
    assert not (tmp_path / "out").exists()


def test_resources_are_read_from_a_file_and_overridden_by_flags(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("partition: gpu\nminutes: 60\nsbatch: {account: vision}\n")
    cluster = Cluster.read(str(file), minutes=90, gpus=None, sbatch={"qos": "low"})
    assert cluster == Cluster("gpu", 90, sbatch={"account": "vision", "qos": "low"})
    file.write_text("partitoin: gpu\n")
    with pytest.raises(UserError, match=r"cluster\.yaml: no such key 'partitoin'; keys: cpus"):
        Cluster.read(str(file))
    with pytest.raises(UserError, match="at least 5, got 1: a job saves 90 s before its end"):
        Cluster.read(None, minutes=1)


# Studies, from the command line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_study_outlives_the_submitting_process_and_a_signalled_cell_ends_the_same(
    slurm: None, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    options = [*SHORT, "--trainer.accelerator=cpu", "--trainer.max_epochs=12", "--data.num_workers=1"]
    out, log = tmp_path / "out", tmp_path / "log.txt"
    study = write(tmp_path, seeds=[0])
    words = ["ablate", "run", study, "--out", out, "--launcher", "slurm", "--minutes", "10", *options]

    def ablate() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            command = [sys.executable, "-m", "reslab", *map(str, words)]
            return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    process = ablate()
    until(lambda: has_begun(out / "A/seed-0") or process.poll(), "the first steps")
    os.killpg(process.pid, signal.SIGKILL)
    command("scancel", "--signal=USR2", jobs(out)["A/seed-0"].number)
    assert ablate().wait(PATIENCE) == 0, log.read_text()
    assert (
        "submitted to Slurm: 2 cells; 0 already submitted" in log.read_text()
        and "submitted to Slurm: 0 cells" in log.read_text()
    )
    first, second = manifest(out / "A/seed-0")["attempts"]
    assert first["how"].startswith("preempted: SIGUSR2 at step") and second["from_step"] > 0
    assert len(manifest(out / "none/seed-0")["attempts"]) == 1
    assert traces(out / "A/seed-0") == traces(undisturbed("--trainer.max_epochs=12"))
    assert (out / "report.html").exists()
