"""Learning-rate range test (Smith 2017, "Cyclical learning rates for training neural networks", section 3.3)."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import UserError
from reslab.runs.figures import draw_lr_range
from reslab.training import Classifier
from reslab.training.checkpoint import at_step_end
from reslab.training.classifier import Diverged
from reslab.training.optimizers import Constant

MIN_STEPS = 20  # fewer show no curve
WINDOW = 5  # steps over which the loss is averaged to notice divergence
RISE = 1.0  # the test stops when that average has risen by this share of its first value
SMOOTHING = 1 / 40  # sd of the Gaussian that smooths the loss, as a share of the steps
FALL = 0.9  # share of the whole fall of the loss that the suggested rate reaches

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Suggestion:
    """What the losses of a range test show; rates are learning rates."""

    smooth: Floats  # smoothed loss at every step
    steepest: float | None  # rate at which it falls fastest, below `rate`
    rate: float | None  # suggested; None if the loss does not show one
    reason: str = ""  # why there is none, and what to change


class Ramp(Constant):
    """Set the rate of the first parameter group to `rates` (n,), step by step; the others keep their ratio to it."""

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates, self.base = rates, math.nan

    def scheduler(self, optimizer: Optimizer, total_steps: int, steps_per_epoch: float) -> LambdaLR:
        self.base = float(optimizer.param_groups[0]["lr"])
        if not self.base > 0:
            raise UserError(f"model.optimizer: the learning rate must be more than 0 for a range test, got {self.base}")
        last = len(self.rates) - 1
        return LambdaLR(optimizer, lambda step: self.rates[min(step, last)] / self.base)


class Losses(Callback):
    """Record the training loss of every optimizer step, and stop when it diverges."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._sum = 0.0  # Lightning divides each micro-batch's loss by their number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sum += float(outputs["loss"])
        if at_step_end(trainer, batch_idx):
            self.values.append(self._sum)
            self._sum = 0.0
            trainer.should_stop = trainer.should_stop or has_diverged(self.values)


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether the last loss is not finite, or the last few are far above the first ones."""
    first, last = float(np.mean(losses[:WINDOW])), float(np.mean(losses[-WINDOW:]))
    return not math.isfinite(losses[-1]) or last - first > RISE * abs(first)


def preview_lr_range(experiment: Experiment, out: Path, steps: int, low: float, high: float) -> None:
    """Train for some steps with a growing learning rate, draw the loss to `out`, and print a suggestion.

    Nothing is left behind: no run directory, no checkpoint, no log.
    """
    if not 0 < low < high < math.inf:
        raise UserError(f"--min must be above 0 and below --max, got --min {low:g} --max {high:g}")
    if steps < MIN_STEPS:
        raise UserError(f"--steps must be at least {MIN_STEPS}, got {steps}: fewer show no curve")
    ramp = Ramp(np.geomspace(low, high, steps).tolist())
    data, model, settings = experiment.build()
    losses = train(experiment, data, model, settings, ramp)
    rates = ramp.rates[: len(losses)]
    suggestion = suggest(rates, losses)
    draw_lr_range(rates, losses, suggestion.smooth, suggestion.rate, out)
    scale = data.batch_size / model.base_batch_size if model.base_batch_size else 1.0
    print(*describe(suggestion, rates, scale, ramp.base, len(losses) < steps), out, sep="\n")


def train(
    experiment: Experiment, data: ImageData, model: Classifier, settings: Mapping[str, Any], ramp: Ramp
) -> list[float]:
    """Return the training loss of every step, with the batch size, accumulation, precision and clipping of the run."""
    model.schedule, losses = ramp, Losses()
    one = {"devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False, "logger": False}
    length = {"max_epochs": -1, "max_steps": len(ramp.rates), "min_epochs": None, "min_steps": None, "max_time": None}
    quiet = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "callbacks": [losses], "profiler": None}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = experiment.build_trainer({**settings, **one, **length, **quiet, "default_root_dir": scratch})
        try:
            trainer.fit(model, datamodule=data)
        except Diverged:
            losses.values.append(math.inf)
    return [loss for loss in losses.values if math.isfinite(loss)]


def suggest(rates: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """Return what the losses of a range test show.

    The loss is smoothed by a Gaussian over neighboring steps, which does not delay it as a moving average does. The
    suggested rate is the smallest at which the smoothed loss has a minimum that reaches nine tenths of its whole fall:
    at higher rates it becomes ragged or rises, which is Smith's upper bound of the rate.
    """
    n, reason = len(losses), ""
    if n < MIN_STEPS:
        reason = f"the loss diverged after {n} steps: use a smaller --min"
        return Suggestion(np.asarray(losses), None, None, reason)
    smooth, edge = smoothed(losses), max(1, round(2 * SMOOTHING * n))
    start, lowest = smooth[:edge].mean(), smooth.min()
    inner = np.flatnonzero((smooth[1:-1] <= smooth[:-2]) & (smooth[1:-1] <= smooth[2:])) + 1
    deep = [i for i in (*inner, n - 1) if smooth[i] <= start - FALL * (start - lowest)]
    best = int(deep[0])
    steepest = int(np.gradient(smooth, np.log(rates))[: best + 1].argmin())
    if start - smooth[best] < 3 * np.std((np.asarray(losses) - smooth)[: best + 1]):
        reason = "the loss hardly fell: use more --steps, or another range (--min, --max)"
    elif best >= n - edge:
        reason = f"the loss was still falling at the last rate, {rates[-1]:.3g}: use a larger --max"
    return Suggestion(smooth, rates[steepest], None if reason else rates[best], reason)


def smoothed(losses: Sequence[float]) -> Floats:
    """Return the losses (n,), each averaged with its neighbors."""
    step = np.arange(len(losses))
    weights = np.exp(-((np.subtract.outer(step, step) / max(1.0, SMOOTHING * len(step))) ** 2) / 2)
    return weights @ np.asarray(losses) / weights.sum(axis=1)


def describe(
    suggestion: Suggestion, rates: Sequence[float], scale: float, configured: float, stopped: bool
) -> list[str]:
    """Return the result as lines; `scale` is the rate used per model.optimizer.lr, because of base_batch_size."""
    lines = [
        f"{len(rates)} steps, learning rates {rates[0]:.3g} to {rates[-1]:.3g}" + ", then the loss diverged" * stopped
    ]
    if suggestion.rate is None or suggestion.steepest is None:
        return [*lines, f"no suggestion: {suggestion.reason}"]
    lines += [
        f"suggestion  --model.optimizer.lr {suggestion.rate / scale:.2g}  (configured: {configured / scale:.2g})",
        "            the peak of a schedule that begins lower: OneCycle, or any with warmup_epochs",
        f"            the loss falls fastest at {suggestion.steepest / scale:.2g}: the lower end of what to try",
    ]
    return lines + [f"            ({scale:.3g} times that is used: data.batch_size / model.base_batch_size)"] * (
        scale != 1
    )
