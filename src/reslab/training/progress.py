"""Progress of training: a bar on a terminal, one line per epoch in a file; and its throughput."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reslab.metric_text import main_metric
from reslab.training.checkpoint import at_step_end
from reslab.training.lightning_internals import is_logged_step, publish

REFRESH = 4  # pictures of the bar per second


class ProgressReport(Callback):
    """Show metrics, images/s and time left, from values that are already on the host.

    Also measure the throughput of training, without validation and checkpoints: logged as `images_per_second`, and
    kept in `images` and `seconds` for the manifest.
    """

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._console = Console(file=sys.stdout)
        self._bar: Live | None = None
        self._epoch = self._step = 0
        self._fields: list[str] = []  # the second line of the bar, most important first
        self._mark = 0.0  # start of the current stretch of training
        self._logged = (0.0, 0)  # seconds and images at the last logged step
        self._earlier = (0.0, 0)  # seconds and images before this process resumed the run
        self._validated_in = -1  # epoch of the last validation

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        self._first_step = trainer.global_step
        self._mark = time.monotonic()
        self._logged = self._earlier = (self.seconds, self.images)
        self._total, self._epochs = int(trainer.estimated_stepping_batches), max(trainer.max_epochs or 0, 0)
        self._step, self._epoch = trainer.global_step, trainer.current_epoch + 1
        if trainer.is_global_zero and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._fields = self._bar_fields(pl_module)
            self._bar = Live(get_renderable=self.picture, console=self._console, refresh_per_second=REFRESH)
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
        self._step, self._epoch = step, trainer.current_epoch + 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:  # the clock is not running yet
            self._stop_clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = time.monotonic()
        self._validated_in = trainer.current_epoch
        self._refresh(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._bar is None:
            values = self._values(pl_module, validated=self._validated_in == trainer.current_epoch)
            print(f"{self._epoch_text()}  {values}  left {self._time_left()}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock()
        self._close_bar()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close_bar()

    def images_per_second(self) -> float | None:
        """Return training images per second over the whole run so far; None before the first step."""
        return self.images / self.seconds if self.seconds > 0 else None

    def _speed(self) -> str:
        """Return the images per second of this process: before, the run may have been on another machine."""
        seconds, images = self.seconds - self._earlier[0], self.images - self._earlier[1]
        return f"{images / seconds:,.0f} images/s" if seconds > 0 else "– images/s"

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
            self._fields = self._bar_fields(pl_module)

    def picture(self) -> Table:
        """Return the bar, two lines that fit a terminal of 60 columns or more: where training is, and its values."""
        width = self._console.width
        place, left = f"{self._epoch_text()}  step {self._step:,}/{self._total:,}", f"left {self._time_left()}"
        first, second = Table.grid(padding=(0, 2)), Text(no_wrap=True, overflow="ellipsis")
        room = width - len(place) - len(left) - 4
        bar: list[Any] = [ProgressBar(self._total, self._step, width=room)] if room >= 4 else []
        first.add_row(*(Text(place, no_wrap=True), *bar, Text(left, no_wrap=True)))
        second.append("  ".join(_fitting(self._fields, width)))
        lines = Table.grid()
        lines.add_row(first)
        lines.add_row(second)
        return lines

    def _bar_fields(self, pl_module: LightningModule) -> list[str]:
        """Return the values of the bar, most important first."""
        latest: dict[str, float] = getattr(pl_module, "latest", {})  # host values: no sync
        names = list(dict.fromkeys([*getattr(pl_module, "metric_names", ()), *latest]))
        main = {split: main_metric(names, split) for split in ("train", "val")}
        others = [name for name in names if name.startswith("val/")]
        order = dict.fromkeys(filter(None, ["train/loss" if "train/loss" in names else None, *main.values(), *others]))
        texts = [f"{name.removeprefix('train/')} {_number(latest.get(name))}" for name in order]
        return [*texts[:2], self._speed(), *texts[2:]]

    def _epoch_text(self) -> str:
        return f"epoch {self._epoch}" + (f"/{self._epochs}" if self._epochs else "")  # else the length is in steps

    def _time_left(self) -> str:
        taken = self._step - self._first_step
        if not taken:
            return "–"
        seconds = int((time.monotonic() - self._began) * (self._total - self._step) / taken)
        minutes, hours = seconds // 60 % 60, seconds // 3600
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"

    def _values(self, pl_module: LightningModule, validated: bool = True) -> str:
        latest: dict[str, float] = getattr(pl_module, "latest", {})  # host values: no sync
        splits = ("train/", "val/") if validated else ("train/",)
        shown = [f"{name} {latest[name]:.4f}" for split in splits for name in latest if name.startswith(split)]
        return "  ".join([*shown, self._speed()])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _fitting(fields: list[str], width: int) -> list[str]:
    """Return the first fields that fit in one line, two columns apart; the first three in any case."""
    count = next((n for n in range(len(fields), 3, -1) if sum(map(len, fields[:n])) + 2 * (n - 1) <= width), 3)
    return fields[:count]
