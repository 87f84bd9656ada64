"""Preemption: on a signal, stop at the end of a step with a checkpoint."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from reslab import interrupt
from reslab.training.checkpoint import Checkpoints, at_step_end, max_over_ranks
from reslab.training.lightning_internals import keep_signal_handlers


class Preempted(Exception):
    """The run was stopped by a signal and has written a checkpoint."""


class Preemption(Callback):
    """Write a checkpoint and stop on SIGTERM, SIGINT, SIGUSR1 or SIGUSR2.

    The handler only sets a flag: saving inside it deadlocks with two ranks. Ranks exchange the flag every few steps, so
    all stop at the same step, whichever of them got the signal.

    `note` is the signal handler. It may be installed before training begins. `saver` writes the checkpoint.
    """

    def __init__(self, saver: Checkpoints) -> None:
        self.saver = saver
        self._received = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal; the second Ctrl-C stops at once."""
        if self._received == number == signal.SIGINT:
            interrupt.close()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self._received = number

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        keep_signal_handlers(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if at_step_end(trainer, batch_idx) and (number := max_over_ranks(trainer, self._received, trainer.global_step)):
            self._stop(trainer, number)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if trainer.state.fn == "fit" and (number := self._received_by_any(trainer, batch_idx, trainer.num_val_batches)):
            self._stop(trainer, number)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if number := self._received_by_any(trainer, batch_idx, trainer.num_test_batches):
            raise Preempted(f"{signal.Signals(number).name} during the test: run the same command again to repeat it")

    def _received_by_any(self, trainer: Trainer, batch_idx: int, batches: list[int | float]) -> int:
        done = batch_idx + 1
        return max_over_ranks(trainer, self._received, 0 if done == batches[0] else done)  # 0: exchange now

    def _stop(self, trainer: Trainer, number: int) -> None:
        self.saver.write(trainer)
        name = signal.Signals(number).name
        raise Preempted(f"{name} at step {trainer.global_step}: run the same command again to resume")
