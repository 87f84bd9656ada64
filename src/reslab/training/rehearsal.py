"""Checks before the first step: build everything that training needs, and throw it away.

An error here costs seconds and claims no run directory.
"""

import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import nn

from reslab.data import ImageData
from reslab.errors import UserError, cause
from reslab.training.classifier import Classifier
from reslab.training.optimizers import parameter_groups


class Steps(NamedTuple):
    """Optimizer steps of a training."""

    per_epoch: int
    total: int


def rehearse(trainer: Trainer, model: Classifier, data: ImageData, monitors: list[str]) -> Steps:
    """Load the data, and check network, optimizer, schedule and validation; change nothing. Return the steps to come.

    Args:
        trainer, model, data: Those of the run. The data stay loaded.
        monitors: Names of validation metrics that the run cannot do without.

    Raises:
        UserError: Data are missing, or training, validation or test could not take place as configured.
    """
    model.execution.check(trainer)
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    batches = _limited(
        len(data.split[0]) // data.batch_size * trainer.accumulate_grad_batches, trainer.limit_train_batches
    )
    total = _total_batches(trainer, batches)
    if math.isinf(total):
        raise UserError("the schedule requires an end of training: set trainer.max_epochs or trainer.max_steps")
    if total < trainer.accumulate_grad_batches:
        raise UserError("training would have no step: see trainer.max_epochs, max_steps and limit_train_batches")
    if monitors and not _validates(trainer, batches, total):
        raise UserError(
            f"{monitors[0]} is needed, but no validation would take place: see trainer.limit_val_batches, "
            "val_check_interval and check_val_every_n_epoch"
        )
    steps = trainer.accumulate_grad_batches
    check_model(model, data, total / steps, batches / steps)
    return Steps(math.ceil(batches / steps), math.ceil(total / steps))


def check_model(model: Classifier, data: ImageData, total_steps: float = 100, steps_per_epoch: float = 10) -> None:
    """Check network, optimizer and schedule; does not load the data. Raises UserError."""
    with torch.random.fork_rng(devices=[]):
        _check_network(model, data)
        _check_optimizer(model, total_steps, steps_per_epoch)


def _limited(batches: int, limit: int | float) -> int:
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)


def _total_batches(trainer: Trainer, batches: int) -> float:
    """Return the micro-batches of the whole training; infinity if it has no end."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    by_epochs = epochs * batches if epochs is not None and epochs >= 0 else math.inf
    return min(by_epochs, steps * trainer.accumulate_grad_batches if steps >= 0 else math.inf)


def _validates(trainer: Trainer, batches: int, total: float) -> bool:
    """Return whether a validation takes place within `total` micro-batches, `batches` per epoch."""
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if trainer.limit_val_batches == 0 or not isinstance(interval, int | float):  # an interval in time
        return trainer.limit_val_batches != 0
    first = interval if isinstance(interval, int) else int(interval * batches)
    return total >= (first if every is None else (every - 1) * batches + first)


@torch.no_grad()
def _check_network(model: Classifier, data: ImageData) -> None:
    """Pass one image of the size used in evaluation through the network."""
    if model.shift_tta >= min(data.image_shape[1:]):
        size = " × ".join(map(str, data.image_shape[1:]))
        raise UserError(f"model.shift_tta {model.shift_tta} must be less than the side of the images, {size} pixels")
    modes = {module: module.training for module in model.net.modules()}
    images = torch.zeros(1, *data.image_shape)
    try:
        logits = model.net.eval()(images)
    except Exception as error:
        shape = " × ".join(map(str, data.image_shape))
        raise UserError(f"the network cannot process images of {shape}: {cause(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, data.num_classes):
        output = f"of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"the network's output for one image must be of shape (1, {data.num_classes}), got {output}")


def _check_optimizer(model: Classifier, total_steps: float, steps_per_epoch: float) -> None:
    """Take one step on parameters of one value each, and build the schedule."""
    groups: list[dict[str, Any]] = parameter_groups(model.net, model.param_groups)
    for group in groups:
        group["params"] = [nn.Parameter(torch.zeros([1] * p.ndim, dtype=p.dtype)) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    try:
        optimizer = model.make_optimizer(groups)
        optimizer.step(lambda: 0.0)
    except Exception as error:
        raise UserError(f"model.optimizer: {cause(error)}") from error
    try:
        model.schedule.scheduler(optimizer, int(total_steps), steps_per_epoch)
    except Exception as error:
        raise UserError(f"model.schedule: {cause(error)}") from error
