"""Runs on several ranks (gloo on the CPU): same results, one run directory, common exit, no redundant collectives."""

import json
import math
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from runner import (
    DIGITS,
    REPO,
    SHORT,
    TRAINING,
    VALIDATION,
    Ended,
    Fault,
    fit,
    manifest,
    metrics,
    reslab,
    spawn,
    torchrun,
    traces,
)

CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
TWO = ["--config", str(REPO / "configs/trainer/ddp.yaml"), *CPU, "--trainer.devices=2", "--model.ema_decay=0.9"]
# At the usual rate (0.1), rounding alone makes two fp32 runs of this net diverge after about 10 steps (not in fp64).
GENTLE = ["--model.net.init_args.norm=group", "--model.optimizer.init_args.lr=0.002", "--trainer.log_every_n_steps=1"]
MIXED = ["--data.augment.mixup=0.4", "--data.augment.cutmix=1", "--data.augment.flip=random"]
COUNT = Fault(TRAINING, "count_collectives", 3)


def fit_two(folder: Path, *options: str, fault: Fault | None = None, **environ: str) -> Ended:
    return spawn("fit", *DIGITS, *SHORT, "--run.dir", folder, *TWO, *options, fault=fault, **environ)


@pytest.fixture(scope="module")
def undisturbed_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    ended = fit_two(folder, fault=COUNT, COLLECTIVES=str(folder / "collectives"))
    assert ended.status == 0, ended.output
    return folder


def test_two_ranks_train_into_one_run_directory(undisturbed_two: Path) -> None:
    assert manifest(undisturbed_two)["environment"]["world_size"] == 2
    rows = metrics(undisturbed_two)
    assert [int(row["step"]) for row in rows] == list(range(5, 61, 5))  # as with one process: the batch is global
    assert len(manifest(undisturbed_two)["attempts"]) == 1


def test_training_step_all_reduces_gradients_and_nothing_else(undisturbed_two: Path) -> None:
    counts = [int(line) for line in (undisturbed_two / "collectives").read_text().split()]  # before step 3, 4, …
    after = {step: b - a for step, a, b in zip(range(3, 60), counts, counts[1:], strict=False)}
    quiet = [step for step in after if all(step % n for n in (3, 5, 8, 20))]  # checkpoint, log, signals, validation
    assert len(quiet) > 20 and {after[step] for step in quiet} == {1}  # all gradients of this net fit into one bucket
    assert after[16] > 1  # otherwise they are not counted at all


def relative(a: dict[str, str], b: dict[str, str], name: str) -> float:
    return math.fabs(float(a[name]) / float(b[name]) - 1)


def test_two_ranks_match_one_process(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    from reslab.inference import load_run

    one, two = tmp_path / "one", tmp_path / "two"
    assert fit(one, *GENTLE, *MIXED, "--model.ema_decay=0.9").status == 0
    ended = fit_two(two, *GENTLE, *MIXED)
    assert ended.status == 0, ended.output
    steps = list(zip(metrics(one), metrics(two), strict=True))
    assert len(steps) == 60
    assert max(relative(a, b, "train/loss") for a, b in steps) < 1e-5
    assert all(a[name] == b[name] for a, b in steps for name in ("lr", "epoch", "val/acc"))

    data, model, settings = load_run(str(two), ["--trainer.devices=1", "--trainer.strategy=auto"])
    Trainer(**settings).test(model, datamodule=data, verbose=False)  # the same weights, 359 images in one process
    tested = {name: value for name, value in manifest(two)["results"].items() if name.startswith("test/")}
    assert tested == model.latest


@pytest.mark.slow
def test_evaluation_is_the_same_on_any_number_of_ranks(undisturbed_two: Path) -> None:
    results = manifest(undisturbed_two)["results"]
    expected = [f"{name} {results[name]:.6f}" for name in ("test/loss", "test/acc", "test/acc5")]
    for devices in (1, 2, 3):
        ended = spawn("test", undisturbed_two, f"--trainer.devices={devices}")
        assert ended.status == 0, ended.output
        assert [line for line in ended.output.splitlines() if line.startswith("test/")] == expected


def test_batch_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    ended = fit_two(tmp_path / "run", "--data.batch_size=63")
    assert ended.status == 2 and ended.output.count("63 is not a multiple of 2 devices") == 1, ended.output
    assert "use 62 or 64" in ended.output and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "fault", "step"), [(0, TRAINING, 16), (1, VALIDATION, 20)])
def test_signal_to_one_rank_stops_both(undisturbed_two: Path, tmp_path: Path, rank: int, fault: str, step: int) -> None:
    ended = fit_two(tmp_path, fault=Fault(fault, "terminate", 11 if fault == TRAINING else 1, rank))
    assert ended.status == 75, ended.output
    how = manifest(tmp_path)["attempts"][0]["how"]
    assert manifest(tmp_path)["status"] == "preempted" and f"at step {step}" in how
    ended = fit_two(tmp_path)
    assert ended.status == 0, ended.output
    assert traces(tmp_path) == traces(undisturbed_two)


LOADING = "reslab.data.batches:ArrayBatches.__getitem__"
START = "reslab.experiment:Run._resume_point"
# Fault in one rank, message of the run, exit status (2 where the user can fix it).
FAILURES = {
    "an error": (Fault(TRAINING, "fail", 7, 1), "rank 1 on .*: ArithmeticError: injected", 1),
    "an error in rank 0": (Fault(TRAINING, "fail", 7, 0), "ArithmeticError: injected", 1),
    "a damaged picture": (Fault(LOADING, "damage", 7, 1), "rank 1 on .*: the injected picture is damaged", 2),
    "killed": (Fault(TRAINING, "die", 7, 1), "rank 1 was killed by SIGKILL", 1),
    "killed before the rendezvous": (Fault(START, "die", 1, 1), "rank 1 was killed by SIGKILL", 1),
}


@pytest.mark.parametrize(
    ("fault", "message", "status"),
    [
        pytest.param(*end, id=name, marks=[] if name == "an error" else pytest.mark.slow)
        for name, end in FAILURES.items()
    ],
)
def test_failure_of_one_rank_ends_all_ranks(tmp_path: Path, fault: Fault, message: str, status: int) -> None:
    workers = "--data.num_workers=1" if fault.target == LOADING else "--data.num_workers=0"
    ended = fit_two(tmp_path, workers, fault=fault, HURT_AT=str(tmp_path / "hurt_at"))
    assert time.time() - float((tmp_path / "hurt_at").read_text()) < 60  # the other rank would wait for 30 minutes
    assert ended.status == status, ended.output
    assert manifest(tmp_path)["status"] == "failed"
    assert ended.output.count("Traceback") <= 1  # of the failing rank alone
    assert re.search(f"failed: {message}", manifest(tmp_path)["attempts"][0]["how"])


FSDP = ["--config", str(REPO / "configs/trainer/fsdp.yaml"), *CPU]
AVERAGE = ["--model.ema_decay=0.9", "--run.test_weights=best"]


def fit_sharded(folder: Path, devices: int, *options: str, fault: Fault | None = None) -> Ended:
    words = ["fit", *DIGITS, *SHORT, *FSDP, *AVERAGE, "--run.dir", folder, f"--trainer.devices={devices}", *options]
    return spawn(*words, fault=fault) if devices > 1 else reslab(*words, fault=fault)


@pytest.mark.slow
def test_sharded_network_matches_ddp_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    copied, whole, stopped = tmp_path / "copied", tmp_path / "whole", tmp_path / "stopped"
    gentle = "--model.optimizer.init_args.lr=0.002"
    assert fit_two(copied, *AVERAGE, gentle).status == 0
    ended = fit_sharded(whole, 2, gentle)
    assert ended.status == 0, ended.output
    assert max(relative(a, b, "train/loss") for a, b in zip(metrics(copied), metrics(whole), strict=True)) < 1e-5
    assert fit_sharded(stopped, 2, gentle, fault=Fault(TRAINING, "terminate", 26, 1)).status == 75
    assert fit_sharded(stopped, 2, gentle).status == 0
    assert traces(stopped) == traces(whole)


def test_sharding_strategy_resumes_with_the_same_bits(tmp_path: Path) -> None:
    """On one process, which is fast; test_sharded_network_matches_ddp has two."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fit_sharded(whole, 1).status == 0
    assert fit_sharded(stopped, 1, fault=Fault(TRAINING, "terminate", 26)).status == 75
    ended = fit_sharded(stopped, 1)
    assert ended.status == 0, ended.output
    assert traces(stopped) == traces(whole)


@pytest.mark.slow
def test_two_replicas_of_two_shards(tmp_path: Path) -> None:
    halves = ["--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=2"]
    ended = fit_sharded(tmp_path, 4, *halves)
    assert ended.status == 0, ended.output
    assert manifest(tmp_path)["environment"]["world_size"] == 4


@pytest.mark.slow
def test_two_nodes_under_torchrun_share_one_run_directory(undisturbed_two: Path, tmp_path: Path) -> None:
    argv = ["fit", *DIGITS, *SHORT, "--model.ema_decay=0.9", "--trainer.devices=1"]
    ended = torchrun(2, *argv, cwd=tmp_path)
    assert ended.status == 0, ended.output
    [folder] = (tmp_path / "runs/digits").iterdir()
    assert "job7" in folder.name and len(manifest(folder)["attempts"]) == 1
    assert manifest(folder)["weights_sha256"] == manifest(undisturbed_two)["weights_sha256"]


@pytest.mark.slow
def test_failure_of_one_rank_ends_all_under_torchrun(tmp_path: Path) -> None:
    argv = ["fit", *DIGITS, *SHORT, "--trainer.devices=1", "--run.dir", tmp_path]
    fault = Fault(TRAINING, "fail", 7, 1)
    ended = torchrun(2, *argv, fault=fault, cwd=tmp_path, HURT_AT=str(tmp_path / "hurt_at"))
    assert time.time() - float((tmp_path / "hurt_at").read_text()) < 60  # the other rank would wait for 30 minutes
    assert ended.status == 1 and re.search(
        "rank 1 on .*: ArithmeticError: injected", manifest(tmp_path)["attempts"][0]["how"]
    )


def test_other_world_size_is_refused_unless_allowed(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    assert fit(killed, fault=Fault(TRAINING, call=11)).status == -signal.SIGKILL
    record = manifest(killed)
    record["environment"]["world_size"] = 4  # as if four ranks had trained it so far
    (killed / "manifest.json").write_text(json.dumps(record))
    allowed = Path(shutil.copytree(killed, tmp_path / "allowed"))
    refused = fit(killed)
    assert (
        refused.status == 2
        and "4 processes, not 1" in refused.output
        and "--run.allow_world_size_change" in refused.output
    )
    ended = fit(allowed, "--run.allow_world_size_change=true")
    assert ended.status == 0, ended.output
    assert "bits may differ" in manifest(allowed)["elastic"]
