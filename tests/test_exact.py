"""Exact runs: the same bits for any number of workers, any validation schedule, kills and resumes."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner import EPOCH_END, RENAME, SUMS, TEST, TRAINING, VALIDATION, Fault, fit, manifest, metrics, traces

Undisturbed = Callable[..., Path]


def killed_and_resumed(folder: Path, *options: str, faults: list[Fault]) -> Path:
    """Kill the run in `folder` with each fault in turn, then let it finish."""
    for fault in faults:
        ended = fit(folder, *options, fault=fault)
        assert ended.status == -signal.SIGKILL, f"{fault}: {ended}"
    ended = fit(folder, *options)
    assert ended.status == 0, ended.output
    assert [attempt["how"] for attempt in manifest(folder)["attempts"]] == ["killed"] * len(faults) + ["complete"]
    return folder


@pytest.mark.parametrize(
    "option", [pytest.param("--data.num_workers=1", marks=pytest.mark.slow), "--data.num_workers=2"]
)
def test_number_of_workers_changes_nothing(undisturbed: Undisturbed, tmp_path: Path, option: str) -> None:
    assert fit(tmp_path, option).status == 0
    assert traces(tmp_path) == traces(undisturbed())


@pytest.mark.parametrize(
    ("option", "steps"),
    [("--trainer.check_val_every_n_epoch=3", [60]), ("--trainer.val_check_interval=7", [7, 14, 27, 34, 47, 54])],
)
def test_validation_schedule_changes_no_weight(
    undisturbed: Undisturbed, tmp_path: Path, option: str, steps: list[int]
) -> None:
    assert fit(tmp_path, option).status == 0
    assert [int(row["step"]) for row in metrics(tmp_path) if row["val/acc"]] == steps
    assert manifest(tmp_path)["weights_sha256"] == manifest(undisturbed())["weights_sha256"]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_killed_and_resumed_at_random_points(undisturbed: Undisturbed, tmp_path: Path, workers: int) -> None:
    draw = random.Random(workers).randint
    faults = [
        Fault(TRAINING, call=draw(5, 18)),
        Fault(SUMS, "halve_and_die", call=3),  # while a checkpoint is written
        Fault(VALIDATION, call=draw(1, 3)),
        Fault(RENAME, call=draw(4, 20)),  # just before a checkpoint or the manifest is replaced
        Fault(EPOCH_END),
        Fault(TEST, call=draw(1, 6)),
    ]
    killed_and_resumed(tmp_path, f"--data.num_workers={workers}", faults=faults)
    assert traces(tmp_path) == traces(undisturbed())


# Every option that involves randomness or state.
RECIPE = [
    "--data.augment.transforms=[{class_path: torchvision.transforms.v2.RandAugment}]",
    *("--data.augment.erasing=0.25", "--data.augment.repeats=2"),
    *(
        "--data.augment.mixup=0.2",
        "--data.augment.cutmix=1",
        "--model.objective=BinaryCrossEntropy",
        "--model.objective.init_args.target_threshold=0.2",
    ),
    *("--model.ema_decay=0.9", "--model.flip_tta=true", "--model.net.init_args.blur=true"),
]


@pytest.mark.slow
def test_workers_and_kills_change_nothing_with_all_options(undisturbed: Undisturbed, tmp_path: Path) -> None:
    assert traces(undisturbed(*RECIPE)) != traces(undisturbed())
    faults = [Fault(TRAINING, call=call) for call in (9, 14)]
    killed_and_resumed(tmp_path, *RECIPE, "--data.num_workers=2", faults=faults)
    assert traces(tmp_path) == traces(undisturbed(*RECIPE))


SITUATIONS = {
    # Checkpoints at the last step of an epoch, with validation after it and without; resumed twice.
    "end of an epoch": (["--trainer.check_val_every_n_epoch=2", "--run.checkpoint_every_steps=10"], [22, 15, 12]),
    "validation within epochs": (["--trainer.val_check_interval=6"], [8, 11, 20]),
    "no validation": (["--data.val_split=0.2", "--trainer.limit_val_batches=0"], [20, 20]),
    "max_steps": (["--trainer.max_epochs=-1", "--trainer.max_steps=50"], [21, 4, 20]),
    "accumulation": (["--trainer.accumulate_grad_batches=2"], [7, 30, 29]),
    "EMA and stochastic depth": (
        ["--model.ema_decay=0.9", "--model.net.init_args.drop_path=0.2", "--model.net.init_args.shortcut=identity"],
        [9, 14],
    ),
    "mixup": (["--data.augment.mixup=0.4", "--data.augment.cutmix=1", "--data.augment.cutout=2"], [9, 14]),
    "bf16": (["--trainer.precision=bf16-mixed"], [9, 14]),
    "whitening layer": (
        [
            "--model.net={class_path: SpeedNet, init_args: {widths: [8, 16]}}",
            "--model.param_groups.norm_bias_lr_scale=64",
        ],
        [9, 14],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "calls"), SITUATIONS.values(), ids=SITUATIONS)
def test_killed_and_resumed_in_every_configuration(
    undisturbed: Undisturbed, tmp_path: Path, options: list[str], calls: list[int]
) -> None:
    whole = undisturbed(*options)
    killed_and_resumed(tmp_path, *options, faults=[Fault(TRAINING, call=call) for call in calls])
    assert metrics(tmp_path) == metrics(whole)
    assert manifest(tmp_path)["weights_sha256"] == manifest(whole)["weights_sha256"]
    assert manifest(tmp_path)["results"] == manifest(whole)["results"]


@pytest.mark.slow
def test_killed_and_resumed_fine_tuning(undisturbed: Undisturbed, tmp_path: Path) -> None:
    start = undisturbed()
    groups = ["--model.param_groups.freeze=[stem,stage1]", "--model.param_groups.backbone_lr_scale=0.1"]
    options = [f"--model.weights={start}", *groups]
    whole = undisturbed(*options)
    killed_and_resumed(tmp_path, *options, faults=[Fault(TRAINING, call=17), Fault(VALIDATION, call=2)])
    assert traces(tmp_path) == traces(whole)
    before, after = (load_file(folder / "weights.safetensors") for folder in (start, tmp_path))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if name.startswith(("conv1.", "bn1.", "layer1."))}


def test_run_resumes_after_its_pretrained_weights_are_gone(undisturbed: Undisturbed, tmp_path: Path) -> None:
    weights = shutil.copy(undisturbed() / "weights.safetensors", tmp_path / "start.safetensors")
    run, options = tmp_path / "run", [f"--model.weights={weights}"]
    assert fit(run, *options, fault=Fault(TRAINING, call=9)).status == -signal.SIGKILL
    Path(weights).unlink()
    ended = fit(run, *options)
    assert ended.status == 0, ended.output


# When the signal arrives, and the step that the run resumes from.
MOMENTS = {
    "a step": (Fault(TRAINING, "terminate", 11), 11),
    "the last step of an epoch": (Fault(TRAINING, "terminate", 20), 20),
    "validation": (Fault(VALIDATION, "terminate", 5), 40),
    "the last batch of validation": (Fault(VALIDATION, "terminate", 3), 20),
    "the test": (Fault(TEST, "terminate", 2), 60),
}


@pytest.mark.parametrize(("fault", "step"), MOMENTS.values(), ids=MOMENTS)
def test_signal_preempts_the_run_with_a_checkpoint(
    undisturbed: Undisturbed, tmp_path: Path, fault: Fault, step: int
) -> None:
    ended = fit(tmp_path, "--run.checkpoint_every_steps=1000", fault=fault)
    assert ended.status == 75 and "SIGTERM" in ended.output, ended.output
    assert "Traceback" not in ended.output and manifest(tmp_path)["status"] == "preempted"
    ended = fit(tmp_path, "--run.checkpoint_every_steps=1000")
    assert ended.status == 0, ended.output
    assert manifest(tmp_path)["attempts"][1]["from_step"] == step
    assert traces(tmp_path) == traces(undisturbed())


def test_second_interrupt_stops_immediately(undisturbed: Undisturbed, tmp_path: Path) -> None:
    ended = fit(tmp_path, fault=Fault(TRAINING, "interrupt_twice", 11))
    assert ended.status == -signal.SIGINT and manifest(tmp_path)["status"] == "running"
    assert fit(tmp_path).status == 0  # resumes from step 9, as after a kill
    assert traces(tmp_path) == traces(undisturbed())


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_slurm_requeues_preempted_but_not_cancelled_job(tmp_path: Path, state: str, requeued: bool) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\necho JobState={state}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    ended = fit(tmp_path / "run", fault=Fault(TRAINING, "terminate", 11), **slurm)
    assert ended.status == 75, ended.output
    calls = ["show job 12", *(["requeue 12"] if requeued else [])]
    assert (tmp_path / "calls").read_text().splitlines() == calls
    assert fit(tmp_path / "run", **slurm).status == 0  # a complete run is not requeued
    assert (tmp_path / "calls").read_text().splitlines() == calls


def test_early_stop_survives_resume(tmp_path: Path) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    options = [*stop, "--trainer.callbacks.mode=max", "--trainer.callbacks.patience=1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert fit(whole, *options).status == 0 and metrics(whole)[-1]["step"] == "40"  # not 60: the loss falls
    killed_and_resumed(resumed, *options, faults=[Fault(VALIDATION, call=5), Fault(TEST)])
    assert traces(resumed) == traces(whole)
