"""Pictures of an experiment before it is run: its learning rate, its augmented images."""

from pathlib import Path
from typing import Any

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import UserError
from reslab.runs.figures import draw_grid, draw_lr
from reslab.training import Classifier
from reslab.training.optimizers import parameter_groups

IMAGES, EPOCHS = 6, 8


def preview(what: str, out: Path, args: list[str]) -> None:
    """Draws `lr` (the rate at every step) or `augment` (images by epochs, as the network sees them) into a PNG.

    Args:
        what: lr or augment.
        out: The PNG file.
        args: The experiment: --config FILE … and overrides.
    """
    data, model, settings = Experiment(args).build()
    data.prepare_data()
    out.parent.mkdir(parents=True, exist_ok=True)
    if what == "lr":
        rates = learning_rates(data, model, settings)
        draw_lr(range(len(rates)), rates, out)
    else:
        images, names = data.preview(IMAGES, EPOCHS)
        draw_grid(images, out, [f"epoch {i + 1}" for i in range(EPOCHS)], names)
    print(out)


def learning_rates(data: ImageData, model: Classifier, settings: dict[str, Any]) -> list[float]:
    """The rate of the first parameter group at each optimizer step."""
    per_epoch = len(data.split[0]) // data.batch_size
    epochs, steps = settings["max_epochs"], settings["max_steps"]
    total = steps if steps > 0 else per_epoch * (epochs or 0)
    if total <= 0:
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    base = model.make_optimizer(parameter_groups(model.net, model.decay_norm_and_bias)).param_groups[0]["lr"]
    scale = data.batch_size / (model.base_batch_size or data.batch_size)
    return [base * scale * model.schedule.factor(step, total, per_epoch) for step in range(total)]
