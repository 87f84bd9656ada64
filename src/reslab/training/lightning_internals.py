"""Every private or undocumented attribute of Lightning that reslab relies on, each with the reason.

At import it is checked that all of them exist: an incompatible Lightning fails here, with the supported versions.
This module imports nothing of reslab: the data modules use it too.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops import _FitLoop, _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher, subprocess_script
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_only

SUPPORTED = "lightning>=2.6.6,<2.7"
# (owner, name); a class lacks the attributes that its __init__ sets, so those are looked up among the names it uses.
_USED: tuple[tuple[Any, str], ...] = (
    (rank_zero_only, "rank"),
    (subprocess_script, "_launch_process_observer"),
    (_FitLoop, "_data_fetcher"),
    (_FitLoop, "epoch_loop"),
    (_FitLoop, "epoch_progress"),
    (_FitLoop, "setup_data"),
    (_LoggerConnector, "callback_metrics"),
    (_SignalConnector, "register_signal_handlers"),
    (_SubprocessScriptLauncher, "procs"),
    (_TrainingEpochLoop, "_batches_that_stepped"),
    (_TrainingEpochLoop, "_broadcast_sigterm_tensor"),
    (_TrainingEpochLoop, "_should_check_val_fx"),
    (_TrainingEpochLoop, "batch_progress"),
    (_TrainingEpochLoop, "total_batch_idx"),
    (_TrainingEpochLoop, "val_loop"),
    (LightningModule, "_trainer"),
    (Trainer, "_signal_connector"),
    (Trainer, "_logger_connector"),
)


def _exists(owner: Any, name: str) -> bool:
    if hasattr(owner, name) or not isinstance(owner, type):
        return hasattr(owner, name)
    return name in inspect.unwrap(vars(owner)["__init__"]).__code__.co_names


if _missing := [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in _USED if not _exists(owner, name)]:
    raise ImportError(
        f"reslab supports {SUPPORTED}; lightning {lightning.__version__} has no {', '.join(_missing)}: "
        f"pip install '{SUPPORTED}'"
    )


def rank() -> int:
    """Return this process's rank, before any Trainer exists: Lightning reads the launcher's environment at import."""
    return int(getattr(rank_zero_only, "rank", 0))


def is_attached(module: LightningModule) -> bool:
    """Return whether a Trainer runs this module: `module.trainer` raises otherwise."""
    return module._trainer is not None


def batches_taken(trainer: Trainer) -> int:
    """Return the number of micro-batches this rank has taken since training began, earlier attempts included."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def micro_batch_index(trainer: Trainer) -> int:
    """Return the index of the current micro-batch, counted from the start of training."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def current_step(trainer: Trainer) -> int:
    """Return the optimizer step that belongs to this moment, counted from 1.

    Inside a batch this is the step being taken; elsewhere (validation, end of an epoch, test) it is the last one taken.
    `trainer.global_step` changes in the middle of a batch, and Lightning's counter for loggers lags one step behind.
    """
    loop = trainer.fit_loop.epoch_loop
    in_batch = loop.batch_progress.current.ready > loop.batch_progress.current.completed
    before_optimizer_step = trainer.global_step == loop._batches_that_stepped
    return trainer.global_step + (in_batch and before_optimizer_step and not trainer.validating)


def steps_per_epoch(trainer: Trainer) -> float:
    """Return the optimizer steps of one epoch; a trailing incomplete accumulation counts as a fraction."""
    return trainer.num_training_batches / trainer.accumulate_grad_batches


def is_logged_step(trainer: Trainer, step: int) -> bool:
    """Return whether to log training metrics: every `log_every_n_steps` steps, or at the end of a shorter epoch."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step % every == 0 or (trainer.is_last_batch and steps_per_epoch(trainer) < every)


def set_up_data(trainer: Trainer) -> None:
    """Create the training loader: with `max_steps`, `configure_optimizers` would not know the number of batches."""
    trainer.fit_loop.setup_data()


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the batch just done, or is running."""
    loop = trainer.fit_loop
    return trainer.validating or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def resume_after_step(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Set the loop counters in a checkpoint so that a resumed run does next what this run does next.

    Unchanged, Lightning 2.6 skips a validation that was due, resumes an interrupted validation in its middle, and
    miscounts from the last step of an epoch on, so that a second resume loses its place.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if validation_is_due(trainer):
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        loops["epoch_loop.val_loop.batch_progress"].update(total=begun, current={**begun}, is_last_batch=False)
        for count in (batch["total"], batch["current"]):
            count["completed"] = count["processed"]
    elif trainer.is_last_batch:
        batch["total"]["completed"] = batch["total"]["processed"]
        batch.update(current=dict.fromkeys(batch["current"], 0), is_last_batch=False)
        for count in (epoch["total"], epoch["current"]):
            count["processed"] = count["completed"] = count["ready"]
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def publish(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log host values now: to all loggers, and to `callback_metrics`, where monitors look.

    `self.log` is not allowed in every hook and logs later: a row must be in metrics.csv before its step's checkpoint.
    """
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    trainer._logger_connector.callback_metrics.update(tensors)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=current_step(trainer))


# Processes and signals


def skip_sigterm_broadcast(trainer: Trainer) -> None:
    """Switch off the broadcast with which Lightning (since 2.5.2) waits for all ranks in every step."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def keep_signal_handlers(trainer: Trainer) -> None:
    """Keep Lightning from replacing our signal handlers; its own save a checkpoint inside the handler."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def skip_process_observer() -> None:
    """Keep Lightning from killing all ranks, this one included, before anyone can report why."""
    subprocess_script._launch_process_observer = lambda processes: None  # type: ignore[assignment]


def child_processes(trainer: Trainer) -> list[Any]:
    """Return the processes that Lightning started for the other local ranks; rank 1 first."""
    return getattr(trainer.strategy.launcher, "procs", [])
