"""One row per optimizer step in every logger, whoever logs: `self.log`, a callback, or reslab itself."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from reslab.training.lightning_internals import current_step


class LogRows(Callback):
    """Collect what is logged at one optimizer step into one row, and number rows by that step.

    In plain Lightning, `self.log` and callbacks such as LearningRateMonitor log one step early, so their rows lie
    between those of code that logs `trainer.global_step`. Here the step passed to `log_metrics` is replaced by the
    optimizer step being taken (`current_step`), and a row reaches the logger when the next one begins. A logger with
    `merges_rows = True` updates its last row itself and receives everything at once. With `test_follows`, the row of
    the last step stays open after the fit, for the metrics of the test.
    """

    def __init__(self, test_follows: bool = False) -> None:
        self.test_follows = test_follows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if not isinstance(getattr(logger.log_metrics, "__self__", None), _Row):
                _Row(logger, trainer, self.test_follows)


class _Row:
    """The row that one logger's `log_metrics` fills."""

    def __init__(self, logger: Logger, trainer: Trainer, test_follows: bool) -> None:
        self.trainer, self.test_follows = trainer, test_follows
        self.merges = getattr(logger, "merges_rows", False)
        self.send, self.close = logger.log_metrics, logger.finalize
        self.step, self.values = -1, dict[str, Any]()
        logger.log_metrics, logger.finalize = self.add, self.finalize  # type: ignore[method-assign]

    def add(self, metrics: dict[str, Any], step: int | None = None) -> None:
        step = current_step(self.trainer)
        metrics = {"epoch": self.trainer.current_epoch, **metrics}
        if self.merges:
            self.send(metrics, step)
            return
        if step != self.step:
            self.flush()
            self.step = step
        self.values.update(metrics)

    def flush(self) -> None:
        if self.values:
            self.send(self.values, self.step)
        self.values = {}

    def finalize(self, status: str) -> None:
        if not (self.test_follows and self.trainer.state.fn == "fit" and status == "success"):
            self.flush()
        self.close(status)
