"""Whatever logs, and however: one row per optimizer step, at the step it belongs to, in every logger."""

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers.logger import Logger

from reslab import Classifier, ImageData, create_model
from reslab.data import Digits
from reslab.runs.csv_logger import MetricsCSV
from reslab.training.log_rows import LogRows
from reslab.training.progress import ProgressReport


class Recorder(Logger):
    """A logger that only remembers its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    name, version = "recorder", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})


class GradientNorm(Callback):
    """A user's callback: logs inside the step, by self.log."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        pl_module.log("grad_norm", sum(float(p.grad.norm()) ** 2 for p in pl_module.net.parameters()) ** 0.5)


class StepNumber(Callback):
    """Logs the number of the step it is called in, from every hook and by every route."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.send(trainer, "batch_start", trainer.global_step + 1)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.log("zero_grad", float(trainer.global_step + 1))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.send(trainer, "batch_end", trainer.global_step)
        pl_module.log("batch_end_self", float(trainer.global_step))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("validation_self", float(trainer.global_step))
        self.send(trainer, "validation", trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("epoch_self", float(trainer.global_step))
        self.send(trainer, "epoch_end", trainer.global_step)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("test_self", float(trainer.global_step))

    def send(self, trainer: Trainer, name: str, step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({name: step}, step=trainer.global_step)


def run(folder: Path, callbacks: list[Callback], **settings: Any) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Train and test on digits (20 steps per epoch); return the rows of metrics.csv and of another logger."""
    recorder, path = Recorder(), folder / "metrics.csv"
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        accelerator="cpu",
        logger=[recorder, MetricsCSV(path, ["step"])],
        callbacks=[*callbacks, LogRows(test_follows=True), ProgressReport()],
        **{**dict.fromkeys(quiet, False), "max_epochs": 2, "log_every_n_steps": 5, **settings},
    )
    model = Classifier(create_model("resnet8", in_channels=1, num_classes=10))
    data = ImageData(Digits(), batch_size=64)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    with path.open(newline="") as file:
        return list(csv.DictReader(file)), recorder.rows


HOOKS = ("batch_start", "zero_grad", "batch_end", "validation", "epoch_end")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"accumulate_grad_batches": 2},
    {"val_check_interval": 7},
    {"log_every_n_steps": 50},
    {"log_every_n_steps": 1, "limit_train_batches": 3},
    {"check_val_every_n_epoch": 2, "limit_test_batches": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_route_and_hook_logs_at_its_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows, others = run(tmp_path, [StepNumber(), LearningRateMonitor(), GradientNorm()], **settings)
    for table in (rows, others):
        steps = [int(row["step"]) for row in table]
        assert steps == sorted(set(steps)), "one row per step, increasing"
        for row in table:
            names = [name for name in row if name.endswith("_self") or name in HOOKS]
            assert {float(row[name]) for name in names if row[name] != ""} <= {float(row["step"])}
    assert {int(row["step"]) for row in others} == {int(row["step"]) for row in rows}
    trained = [row for row in rows if row["train/loss"]]
    assert trained and all(row["lr"] and row["train/acc"] and row["images_per_second"] for row in trained)
    # LearningRateMonitor knows the rate in a step before it is taken, reslab after: they must agree in every row.
    both = [row for row in rows if row["lr"] and row.get("lr-SGD/pg1")]
    assert all(float(row["lr"]) == pytest.approx(float(row["lr-SGD/pg1"]), rel=1e-6) for row in both)
    assert all(row["grad_norm"] for row in both)


def test_epoch_shorter_than_the_logging_interval_still_has_a_training_curve(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, [], log_every_n_steps=50)
    assert [int(row["step"]) for row in rows] == [20, 40]
    assert all(float(row["train/loss"]) > 0 and row["train/acc"] and row["lr"] and row["val/loss"] for row in rows)


def test_monitors_see_training_and_validation_metrics(tmp_path: Path) -> None:
    stop = [EarlyStopping(name, stopping_threshold=0.0, mode="max") for name in ("train/acc", "val/acc")]
    rows, _ = run(tmp_path, stop, max_epochs=5)  # any accuracy is above 0: both would raise if they found no metric
    assert int(rows[-1]["step"]) == 20


def test_values_keep_their_digits(tmp_path: Path) -> None:
    rows, others = run(tmp_path, [])
    assert rows[-1]["test/acc"] == str(others[-1]["test/acc"])
    exact = float(rows[-1]["test/acc"]) * 359
    assert exact == pytest.approx(round(exact), abs=1e-4)
