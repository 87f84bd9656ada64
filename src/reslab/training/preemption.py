"""Stopping on a signal, at a step's end, with everything saved."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from reslab.host import STOP_SIGNALS
from reslab.training.checkpoint import Checkpoints, at_step_end, max_over_ranks


class Preempted(Exception):
    """The run was asked to stop and did, with a checkpoint written: run it again to go on."""


class Preemption(Callback):
    """Answers SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 with a checkpoint and a clean end.

    A handler only sets a flag: saving inside it deadlocks as soon as two processes take part. Several processes
    agree on the flag every few steps, so that all stop at the same one, whichever of them was signalled.

    As a context manager it also takes signals that come before the training begins, and gives them back after it.

    Args:
        saver: Writes the checkpoint.
    """

    def __init__(self, saver: Checkpoints) -> None:
        self.saver = saver
        self._received = 0

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning would put handlers of its own in place of these: one that broadcasts from within a handler.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)  # asked twice: stop at once
        self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_end(trainer, batch_idx) and (number := max_over_ranks(trainer, self._received, trainer.global_step)):
            self._stop(trainer, number)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if trainer.state.fn == "fit" and (number := self._agreed_within(trainer, batch_idx, trainer.num_val_batches)):
            self._stop(trainer, number)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if number := self._agreed_within(trainer, batch_idx, trainer.num_test_batches):
            raise Preempted(f"{signal.Signals(number).name} during the test: run the same command again to repeat it")

    def _agreed_within(self, trainer: Trainer, batch_idx: int, batches: list[int | float]) -> int:
        done = batch_idx + 1
        return max_over_ranks(
            trainer, self._received, 0 if done == batches[0] else done
        )  # 0: now, however few they are

    def _stop(self, trainer: Trainer, number: int) -> None:
        self.saver.write(trainer)
        name = signal.Signals(number).name
        raise Preempted(f"{name} at step {trainer.global_step}: run the same command again to go on")
