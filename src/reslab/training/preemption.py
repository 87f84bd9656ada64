"""Stopping on a signal, at a step's end, with everything saved."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from reslab.training.checkpoint import Checkpoints, agreed, at_step_end

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


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
        self._batches = 0  # of evaluation, since it began

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self, *args: Any) -> None:
        """Takes the signals. Lightning installs its own handlers at each start, so this is said again after it."""
        self._batches = 0
        for number in SIGNALS:
            signal.signal(number, self._note)

    on_train_start = on_validation_start = on_test_start = listen  # type: ignore[assignment]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)  # asked twice: stop at once
        self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_end(trainer, batch_idx) and (number := agreed(trainer, self._received, trainer.global_step)):
            self._stop(trainer, number)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._batches += 1
        if trainer.state.fn == "fit" and (number := agreed(trainer, self._received, self._batches)):
            self._stop(trainer, number)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._batches += 1
        if number := agreed(trainer, self._received, self._batches):
            raise Preempted(f"{signal.Signals(number).name} during the test: run the same command again to repeat it")

    def _stop(self, trainer: Trainer, number: int) -> None:
        self.saver.write(trainer)
        name = signal.Signals(number).name
        raise Preempted(f"{name} at step {trainer.global_step}: run the same command again to go on")
