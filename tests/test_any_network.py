"""Networks of timm, torchvision and of users live the whole life of a run; users' objectives and callbacks, too."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from runner import DIGITS, REPO, TRAINING, Ended, Fault, manifest, metrics, reslab, spawn, traces

USER = Path(__file__).with_name("user")
TIMM, TORCHVISION = (f"--model.net={REPO / f'configs/net/{name}.yaml'}" for name in ("timm", "torchvision"))
NETWORKS = {
    "timm resnet10t": [TIMM],
    "timm vit": [
        TIMM,
        "--model.net.init_args.name=vit_tiny_patch16_224",
        "--model.net.dict_kwargs={patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}",
    ],
    "torchvision mobilenet": [TORCHVISION, "--model.net.init_args.name=mobilenet_v3_small"],
    "user": ["--model.net=reslab.user_code.TinyNet"],
}
SHORT = [
    *("--trainer.max_epochs=2", "--trainer.limit_train_batches=8", "--trainer.log_every_n_steps=4"),
    *("--run.checkpoint_every_steps=3", "--model.ema_decay=0.9", "--model.optimizer.init_args.lr=0.02"),
    *("--data.augment.flip=random", "--data.augment.mixup=0.2"),
]


def fit(folder: Path, *options: str, **how: object) -> Ended:
    return reslab("fit", *DIGITS, *SHORT, "--run.dir", folder, *options, **how)  # type: ignore[arg-type]


SLOW = ("timm resnet10t", "timm vit", "torchvision mobilenet")  # the user's own network goes the same ways


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETWORKS])
def network(request: pytest.FixtureRequest) -> list[str]:
    if request.param.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    return NETWORKS[request.param]


@pytest.fixture(scope="module")
def finished(network: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    ended = fit(folder, *network)
    assert ended.status == 0, ended.output
    return folder


def test_killed_and_resumed_with_the_same_bits(network: list[str], finished: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, *network, fault=Fault(TRAINING, call=6)).status == -signal.SIGKILL
    assert fit(tmp_path, *network, fault=Fault(TRAINING, "terminate", call=8)).status == 75
    ended = fit(tmp_path, *network)
    assert ended.status == 0, ended.output
    assert "resuming at step" in ended.output and traces(tmp_path) == traces(finished)


def test_tested_verified_and_used_for_predictions(finished: Path, tmp_path: Path) -> None:
    results = manifest(finished)["results"]
    tested = reslab("test", finished)
    assert tested.status == 0 and f"test/acc {results['test/acc']:.6f}" in tested.output, tested.output
    assert reslab("verify", finished).status == 0
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    ended = reslab("predict", finished, "--images", tmp_path, "--out", tmp_path / "predictions.csv")
    assert ended.status == 0, ended.output
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert [row["prediction"] in set("0123456789") for row in csv.DictReader(file)] == [True] * 3


@pytest.mark.parametrize("format", ["onnx", "pt2", "safetensors"])
def test_exported_in_every_format(finished: Path, tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnx, onnxscript or onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnx, onnxscript or onnxruntime is not installed")
    ended = reslab("export", finished, "--format", format, "--out", tmp_path / f"net.{format}")
    assert ended.status == 0, ended.output  # compared with the network before it is written
    assert json.loads((tmp_path / f"net.{format}.json").read_text())["output"]["shape"] == ["batch", 10]


def test_fine_tuned_from_its_own_weights_with_a_frozen_stem(network: list[str], finished: Path, tmp_path: Path) -> None:
    tuning = [f"--model.weights={finished}", "--model.param_groups.backbone_lr_scale=0.1"]
    tuning += ["--model.param_groups.layer_decay=0.8"]
    wrong = fit(tmp_path, *network, *tuning, "--model.param_groups.freeze=[nowhere]")
    assert wrong.status == 2 and not (tmp_path / "manifest.json").exists()
    groups = wrong.output.rpartition("there are: ")[2].split(",")
    ended = fit(tmp_path, *network, *tuning, f"--model.param_groups.freeze=[{groups[0].strip()}]")
    assert ended.status == 0, ended.output
    assert f"weights: {finished}" in ended.output


@pytest.mark.slow
def test_reproduced_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    if "user_code" in (finished / "config.yaml").read_text():
        environ = {"PYTHONPATH": f"{USER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    else:
        environ = {}
    ended = reslab("reproduce", finished, "--out", tmp_path / "again", **environ)
    assert ended.status == 0 and "identical" in ended.output, ended.output


@pytest.mark.slow
def test_compiled(network: list[str], tmp_path: Path) -> None:
    ended = fit(tmp_path, *network, "--model.execution.compile=true", "--trainer.max_epochs=1")
    assert ended.status == 0, ended.output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_on_two_ranks(network: list[str], tmp_path: Path, strategy: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    gentle = ["--model.optimizer.init_args.lr=0.002", "--model.ema_decay=null", "--trainer.log_every_n_steps=1"]
    several = [f"--config={REPO / f'configs/trainer/{strategy}.yaml'}", "--trainer.accelerator=cpu"]
    several += ["--trainer.precision=32-true", "--trainer.devices=2"]
    assert fit(one, *network, *gentle).status == 0
    ended = spawn("fit", *DIGITS, *several, *SHORT, *gentle, "--run.dir", two, *network)
    assert ended.status == 0, ended.output
    assert manifest(two)["environment"]["world_size"] == 2
    assert [row["step"] for row in metrics(one)] == [row["step"] for row in metrics(two)]


# Objectives, metrics and callbacks of a user


def test_users_metric_and_callback_reach_logs_manifest_and_report(tmp_path: Path) -> None:
    options = ["--model.objective=reslab.user_code.WithF1", "--run.monitor=val/f1", "--run.test_weights=best"]
    options += ["--trainer.callbacks=[{class_path: LearningRateMonitor}, {class_path: reslab.user_code.GradientNorm}]"]
    ended = fit(tmp_path, *options)
    assert ended.status == 0, ended.output
    assert "test/f1" in manifest(tmp_path)["results"] and "val/f1" in ended.output
    rows = metrics(tmp_path)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == 16
    assert all(
        row["train/loss"] and row["grad_norm"] and row["lr-SGD/pg1"] for row in rows if int(row["step"]) % 4 == 0
    )
    assert rows[-1]["val/f1"] and rows[-1]["test/f1"]
    assert "f1" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_users_metric_decides_a_study(tmp_path: Path) -> None:
    study = {
        "name": "f1",
        "base": [
            str(REPO / "configs/experiment/digits.yaml"),
            {"model.objective": {"class_path": "reslab.user_code.WithF1"}},
        ],
        "question": "Does a mixup of 0.2 change the macro F1?",
        "arms": {"plain": {}, "mixed": {"data.augment.mixup": 0.2}},
        "baseline": "plain",
        "metric": "test/f1",
        "margin": 0.5,
        "seeds": [0, 1, 2],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    environ = {**os.environ, "PYTHONPATH": f"{USER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "reslab", "ablate", "run", "study.yaml", "--out", "out"]
    options = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["arms"]["mixed"]["verdict"] == "equivalent" and report["metric"] == "test/f1"
    study["metric"] = "test/f2"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    done = subprocess.run([*command[:-1], "other", *options], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and "test/f2" in done.stderr and "test/f1" in done.stderr


def test_distillation_from_a_run_is_recorded_and_survives_a_kill(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert fit(teacher).status == 0
    options = [f"--config={REPO / 'configs/recipe/distill.yaml'}", f"--model.objective.init_args.teacher={teacher}"]
    options += ["--model.net.init_args.width=8"]
    missing = fit(student, *options[:1], f"--model.objective.init_args.teacher={tmp_path / 'nowhere'}")
    assert missing.status == 2 and "nowhere is not a run directory" in missing.output and not student.exists()
    assert fit(tmp_path / "whole", *options).status == 0
    assert fit(student, *options, fault=Fault(TRAINING, call=7)).status == -signal.SIGKILL
    ended = fit(student, *options)
    assert ended.status == 0, ended.output
    assert traces(student) == traces(tmp_path / "whole")
    recorded = manifest(student)["objective"]
    assert recorded == {"teacher": str(teacher), "teacher_sha256": manifest(teacher)["weights_sha256"]}
    assert reslab("test", student).status == 0
