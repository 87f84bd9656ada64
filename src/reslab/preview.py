"""Pictures of an experiment before it runs: its learning rate, its augmented images, a learning-rate range test."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import UserError
from reslab.files import check_output
from reslab.runs.figures import draw_grid, draw_lr
from reslab.training import Classifier

IMAGES, EPOCHS = 6, 8
FORMATS = (".png", ".pdf", ".svg")


def preview(
    what: str, out: Path | None, overrides: list[str], steps: int = 100, low: float = 1e-5, high: float = 10.0
) -> None:
    """Draw an experiment's learning rate (`lr`), augmented training images (`augment`: images by epochs), or the loss
    in a learning-rate range test (`lr-range`) into a PNG.

    The default of `out` is preview-WHAT.png; `overrides` include --config FILE. `steps`, `low` and `high` are those of
    the range test.
    """
    out = out or Path(f"preview-{what}.png")
    check_output(out)
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out must end in {', '.join(FORMATS)}, got {out}")
    experiment = Experiment(overrides)
    if what == "lr-range":
        from reslab.lr_range import preview_lr_range

        return preview_lr_range(experiment, out, steps, low, high)
    data, model, settings = experiment.build()
    data.prepare_data()
    if what == "lr":
        rates = learning_rates(data, model, settings)
        draw_lr(range(len(rates)), rates, out)
    else:
        images, names = data.preview(IMAGES, EPOCHS)
        draw_grid(images, out, [f"epoch {i + 1}" for i in range(EPOCHS)], names)
    print(out)


def learning_rates(data: ImageData, model: Classifier, settings: dict[str, Any]) -> list[float]:
    """Return the learning rate of the first parameter group at every optimizer step.

    The Trainer sets up the run as in `fit`, on one CPU, and is stopped before the first step, so that limits,
    accumulation and lengths are those of the run.
    """
    one_cpu = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    stop = LambdaCallback(on_train_start=lambda trainer, _: setattr(trainer, "should_stop", True))
    no_steps = {"callbacks": [stop], "min_epochs": None, "min_steps": None, "logger": False, "sync_batchnorm": False}
    trainer = Trainer(**{**settings, **one_cpu, **no_steps})
    model.weights = None
    trainer.fit(model, datamodule=data)
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    base, multiplier = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    return [base * multiplier(step) for step in range(int(trainer.estimated_stepping_batches))]
