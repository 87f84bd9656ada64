"""The loggers of configs/logger: in the run directory by default, one log per run also after it is resumed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reslab.config import Experiment
from reslab.errors import UserError
from reslab.runs.tracking import MLflow, RunLogger, TensorBoard, WandB
from runner import DIGITS, REPO, TRAINING, Fault, fit, manifest, metrics

LOGGERS = ["TensorBoard", "MLflow", "WandB"]
OPTIONS = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=5", "--run.checkpoint_every_steps=8"]


@pytest.fixture(autouse=True)
def local_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all loggers that was killed at step 27 and resumed from step 24."""
    folder = tmp_path_factory.mktemp("run")
    init_args = {"WandB": {"mode": "offline", "weights_artifact": "digits"}}
    loggers = [{"class_path": f"reslab.runs.tracking.{n}", "init_args": init_args.get(n, {})} for n in LOGGERS]
    words = [*OPTIONS, f"--trainer.logger={json.dumps(loggers)}"]
    assert fit(folder, *words, fault=Fault(TRAINING, call=28)).status < 0
    ended = fit(folder, *words, FIGURES="1")
    assert ended.status == 0, ended.output
    return folder


def logged(folder: Path) -> dict[int, float]:
    """Return train/loss by step in metrics.csv."""
    return {int(row["step"]): float(row["train/loss"]) for row in metrics(folder) if row.get("train/loss")}


def test_tensorboard_shows_each_step_of_a_resumed_run_once(resumed: Path) -> None:
    events = EventAccumulator(str(resumed / "tensorboard")).Reload()
    points = events.Scalars("train/loss")
    assert {point.step: point.value for point in points} == pytest.approx(logged(resumed))
    assert len(points) == len(logged(resumed))
    assert "figures/confusion" in events.Tags()["images"]
    assert len([*(resumed / "tensorboard").iterdir()]) == 2  # one file per attempt


def test_mlflow_continues_the_run_that_is_resumed(resumed: Path) -> None:
    client = MlflowClient((resumed / "mlruns").as_uri())
    [experiment] = [e for e in client.search_experiments() if e.name == "reslab"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["reslab.id"] == manifest(resumed)["id"]
    assert run.data.params["trainer.max_epochs"] == "2"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == pytest.approx(logged(resumed))
    assert manifest(resumed)["results"].items() >= {"test/acc": run.data.metrics["test/acc"]}.items()
    assert "figures/report.html" in [file.path for file in client.list_artifacts(run.info.run_id, "figures")]


def test_wandb_logs_the_weights_once(resumed: Path) -> None:
    offline = sorted((resumed / "wandb").glob("offline-run-*/*.wandb"))
    assert [str(resumed / "weights.safetensors").encode() in file.read_bytes() for file in offline] == [False, True]


def build(*options: str) -> list[Any]:
    return Experiment([*DIGITS, *options]).build()[2]["logger"]


@pytest.mark.parametrize(
    ("name", "cls"), [("wandb", WandB), ("tensorboard", TensorBoard), ("mlflow", MLflow), ("csv", None)]
)
def test_config_selects_its_logger_and_replaces_an_earlier_one(name: str, cls: type[RunLogger] | None) -> None:
    path = f"{REPO}/configs/logger/{name}.yaml"
    other = f"{REPO}/configs/logger/{'wandb' if name != 'wandb' else 'mlflow'}.yaml"
    for options in ([f"--config={path}"], [f"--config={other}", f"--config={path}"]):
        assert [type(logger) for logger in build(*options)] == ([cls] if cls else [])


@pytest.mark.parametrize("name", LOGGERS)
@pytest.mark.parametrize("folder_of_this_name", [False, True])
def test_missing_package_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder_of_this_name: bool
) -> None:
    package = name.lower()
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / package).exists()])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    if folder_of_this_name:
        (tmp_path / package).mkdir()
    install = "pip install wandb" if name == "WandB" else rf"pip install -e '\.\[{package}\]'"
    with pytest.raises(UserError, match=f"requires the package {package}, which is not installed: {install}"):
        {"TensorBoard": TensorBoard, "MLflow": MLflow, "WandB": WandB}[name]()


@pytest.mark.parametrize("name", ["TensorBoard", "MLflow"])
def test_error_is_printed_once_and_the_run_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "tensorboard").write_text("a file where a directory is needed")
    (tmp_path / "mlruns").write_text("a file where a directory is needed")
    logger: RunLogger = TensorBoard() if name == "TensorBoard" else MLflow()
    logger.start(tmp_path, "digits-1", "digits", {"seed_everything": 3}, tags=["a"])
    for step in (1, 2):
        logger.log_metrics({"train/loss": 1.0}, step)
    logger.finish({"test/acc": 0.9}, [tmp_path / "missing.png"])
    assert capsys.readouterr().out.count(f"{name} logging stopped: ") == 1


def test_tensorboard_directory_can_be_shared_by_runs(tmp_path: Path) -> None:
    for id in ("a", "b"):
        logger = TensorBoard(save_dir=str(tmp_path / "logs"))
        logger.start(tmp_path, id, "digits", {})
        logger.log_metrics({"train/loss": 1.0}, 5)
        logger.finish({})
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["a", "b"]
