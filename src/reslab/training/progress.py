"""Progress of training: a bar on a terminal, one line per epoch in a file; and its throughput."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reslab.training.checkpoint import at_step_end
from reslab.training.lightning_internals import is_logged_step, publish


class ProgressReport(Callback):
    """Show metrics, images/s and time left, from values that are already on the host.

    Also measure the throughput of training, without validation and checkpoints: logged as `images_per_second`, and
    kept in `images` and `seconds` for the manifest.
    """

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._console = Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._mark = 0.0  # start of the current stretch of training
        self._logged = (0.0, 0)  # seconds and images at the last logged step
        self._validated_in = -1  # epoch of the last validation

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        self._first_step = trainer.global_step
        self._mark = time.monotonic()
        self._logged = (self.seconds, self.images)
        if trainer.is_global_zero and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task(
                "training", total=trainer.estimated_stepping_batches, completed=trainer.global_step, values=""
            )
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += len(batch[1]) * trainer.world_size
        step = trainer.global_step
        if at_step_end(trainer, batch_idx) and is_logged_step(trainer, step):
            self._stop_clock()
            seconds, images = self.seconds - self._logged[0], self.images - self._logged[1]
            self._logged = (self.seconds, self.images)
            publish(trainer, {"images_per_second": images / max(seconds, 1e-9)})
            self._refresh(pl_module)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:  # the clock is not running yet
            self._stop_clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = time.monotonic()
        self._validated_in = trainer.current_epoch
        self._refresh(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._bar is None:
            done = f"{trainer.current_epoch + 1}"
            if trainer.max_epochs and trainer.max_epochs > 0:  # otherwise the length is given in steps
                done += f"/{trainer.max_epochs}"
            values = self._values(pl_module, validated=self._validated_in == trainer.current_epoch)
            remaining = trainer.estimated_stepping_batches - trainer.global_step
            taken = max(trainer.global_step - self._first_step, 1)
            seconds = int((time.monotonic() - self._began) * remaining / taken)
            print(f"epoch {done}  {values}  left {seconds // 60}:{seconds % 60:02d}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock()
        self._close_bar()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close_bar()

    def images_per_second(self) -> float | None:
        """Return training images per second over the whole run so far; None before the first step."""
        return self.images / self.seconds if self.seconds > 0 else None

    def _stop_clock(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._mark
        self._mark = now

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _refresh(self, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, values=self._values(pl_module))

    def _values(self, pl_module: LightningModule, validated: bool = True) -> str:
        latest: dict[str, float] = getattr(pl_module, "latest", {})  # host values: no sync
        splits = ("train/", "val/") if validated else ("train/",)
        shown = [f"{name} {latest[name]:.4f}" for split in splits for name in latest if name.startswith(split)]
        speed = self.images_per_second()
        return "  ".join([*shown, f"{speed:,.0f} images/s"] if speed else shown)
