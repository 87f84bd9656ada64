"""What can be known before the first step is reported there, in one message, and claims no run directory."""

import re
import signal
import threading
from pathlib import Path

import pytest

from reslab import experiment
from runner import EPOCH_END, TRAINING, Fault, fit, manifest, reslab

NET = "--model.net.class_path=reslab.user_code."
REFUSED = {
    "learning rate": (
        ["--model.optimizer.init_args.lr=-0.1"],
        "model.optimizer.init_args: Invalid learning rate: -0.1",
    ),
    "optimizer refuses groups": (["--model.optimizer=LBFGS"], "model.optimizer: ValueError: LBFGS doesn't support"),
    "optimizer refuses gradients": (
        ["--model.optimizer=SparseAdam"],
        "model.optimizer: RuntimeError: SparseAdam does not",
    ),
    "optimizer refuses shapes": (["--model.optimizer=Muon"], "model.optimizer: ValueError: Muon only supports 2D"),
    "betas": (["--model.optimizer=Adam", "--model.optimizer.init_args.betas=[1.5, 2]"], "Invalid beta parameter"),
    "no validation for best": (
        ["--run.test_weights=best", "--trainer.limit_val_batches=0"],
        "best requires validation",
    ),
    "validation too late": (
        ["--run.test_weights=best", "--trainer.check_val_every_n_epoch=9"],
        "best requires validation",
    ),
    "validation beyond the end": (
        ["--run.test_weights=best", "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=1000"],
        "no validation would",
    ),
    "monitor never logged": (
        ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/acc", "--trainer.max_steps=9"],
        "val/acc is needed",
    ),
    "no epoch": (["--trainer.max_epochs=0"], "trainer.max_epochs must be"),
    "no batch": (["--trainer.limit_train_batches=0.001"], "no step"),
    "no end": (["--trainer.max_epochs=-1"], "trainer.max_"),
    "network with another output": ([f"{NET}TwoOutputs"], "(1, 10), got of shape (1, 2)"),
    "network that fails": ([f"{NET}TooDeep"], "the network cannot process images of 1 × 8 × 8: RuntimeError:"),
    "weights": (["--model.weights=nowhere/weights.pth"], "nowhere/weights.pth"),
    "data": (["--data.dataset=CIFAR10", "--data.root=/nowhere", "--data.download=false"], "/nowhere"),
    "batch size": (["--data.batch_size=5000"], "data.batch_size 5000 is larger than"),
    "devices": (["--trainer.accelerator=cuda"], "trainer.accelerator: "),
    "teacher": (["--model.objective=Distillation", "--model.objective.init_args.teacher=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistake_is_reported_before_the_run_directory_is_claimed(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    ended = fit(tmp_path / "runs/a", *options)
    assert ended.status == 2 and message in ended.output, ended.output
    assert "Traceback" not in ended.output and ended.output.count("reslab: ") == 1
    assert not (tmp_path / "runs").exists()


def test_error_in_the_users_code_names_its_line(tmp_path: Path) -> None:
    ended = fit(tmp_path / "run", f"{NET}TooDeep")
    assert "user_code.py, line " in ended.output


def test_config_may_change_until_there_is_a_checkpoint(tmp_path: Path) -> None:
    ended = fit(tmp_path, "--model.optimizer.init_args.lr=0.3", fault=Fault(TRAINING, "fail", 2))
    assert ended.status == 1 and manifest(tmp_path)["status"] == "failed"
    ended = fit(tmp_path, "--trainer.max_epochs=1")
    assert ended.status == 0, ended.output
    assert "has no checkpoint: its run is replaced" in ended.output and "model.optimizer.init_args.lr" in ended.output
    assert len(manifest(tmp_path)["attempts"]) == 1
    assert reslab("verify", tmp_path).status == 0


def test_config_is_fixed_once_there_is_a_checkpoint(tmp_path: Path) -> None:
    assert fit(tmp_path, fault=Fault(TRAINING, "die", 8)).status == -signal.SIGKILL
    before = (tmp_path / "config.yaml").read_bytes(), (tmp_path / "manifest.json").read_bytes()
    ended = fit(tmp_path, "--model.optimizer.init_args.lr=0.3")
    assert ended.status == 2 and "model.optimizer.init_args.lr: 0.1 (in the run directory) != 0.3" in ended.output
    assert before == ((tmp_path / "config.yaml").read_bytes(), (tmp_path / "manifest.json").read_bytes())


def test_error_in_the_middle_of_a_run_is_printed_once(tmp_path: Path) -> None:
    ended = fit(tmp_path, fault=Fault(EPOCH_END, "damage"))
    assert ended.status == 2 and ended.output.count("the injected picture is damaged") == 1
    assert manifest(tmp_path)["status"] == "failed"


def test_time_limit_is_reported(tmp_path: Path) -> None:
    ended = fit(tmp_path, "--trainer.max_epochs=100000", "--trainer.max_time=00:00:00:01")
    assert ended.status == 0
    reason = manifest(tmp_path)["ended_early"]
    assert "the time limit was reached" in reason
    assert re.search(rf"^ended +early, {re.escape(reason)}$", ended.output, re.MULTILINE)
    assert reason in (tmp_path / "report.html").read_text()


def test_early_stop_is_reported_and_a_whole_run_is_not(tmp_path: Path) -> None:
    stop = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    stop += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=100", "--trainer.max_epochs=50"]
    assert fit(tmp_path / "early", *stop).status == 0
    assert manifest(tmp_path / "early")["ended_early"].endswith("EarlyStopping on val/loss")
    assert fit(tmp_path / "whole").status == 0 and manifest(tmp_path / "whole")["ended_early"] is None


def test_fit_works_in_a_thread(tmp_path: Path, repo: Path) -> None:
    options = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--run.dir", str(tmp_path / "run")]
    argv = ["--config", str(repo / "configs/experiment/digits.yaml"), *options]
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(experiment.fit(argv)))
    thread.start()
    thread.join()
    assert statuses == [0]
