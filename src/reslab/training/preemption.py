"""Stopping on a signal, at a step's end, with everything saved."""

import signal
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from reslab.training.checkpoint import Checkpoints

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
AGREE_EVERY = 8  # steps between two agreements of several processes


class Preempted(Exception):
    """The run was asked to stop and did, with a checkpoint written: run it again to go on."""


class Preemption(Callback):
    """Answers SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 with a checkpoint and a clean end.

    A handler only sets a flag: saving inside it deadlocks as soon as two processes take part. Several processes
    agree on the flag every few steps, so that all stop at the same one, whichever of them was signalled.

    Args:
        saver: Writes the checkpoint.
    """

    def __init__(self, saver: Checkpoints) -> None:
        self.saver = saver
        self._received: signal.Signals | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # Lightning puts the handlers back that it found, at the end of fit
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)  # asked twice: stop at once
        self._received = signal.Signals(number)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer, trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_asked(trainer, AGREE_EVERY)

    def _stop_if_asked(self, trainer: Trainer, step: int) -> None:
        if trainer.world_size > 1:
            if step % AGREE_EVERY:
                return
            flag = torch.tensor(int(self._received or 0), device=trainer.strategy.root_device)
            agreed = int(trainer.strategy.reduce(flag, reduce_op="max"))
        else:
            agreed = int(self._received or 0)
        if agreed:
            self.saver.write(trainer)
            raise Preempted(f"{signal.Signals(agreed).name} at step {trainer.global_step}: run the same command again to go on")
