"""Using a finished run: evaluate its weights again, classify a folder of images."""

import csv
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import UserError
from reslab.files import replacing
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.training import Classifier


def load_run(run: str, overrides: list[str]) -> tuple[ImageData, Classifier, dict[str, Any]]:
    """A finished run's data, its model with the weights that were tested, and a trainer's settings that write nothing.

    Raises:
        UserError: it is no run folder, or the run has not come to its weights yet.
    """
    folder = RunFolder.existing(run)
    if not folder.weights.exists():
        status = manifests.read(folder.manifest)["status"]
        raise UserError(f"{run} has no {folder.weights.name} yet: its status is {status}")
    # The file holds the weights that were evaluated: of the average, where there was one.
    once = ["--model.ema_decay", "null", "--model.weights", "null", "--model.compile", "false"]
    data, model, settings = Experiment(["--config", str(folder.config), *once, *overrides]).build()
    model.net.load_state_dict(load_file(folder.weights))
    return data, model, {**settings, "logger": False, "callbacks": []}


def evaluate(run: str, split: str, overrides: list[str]) -> None:
    """Prints the metrics of a run's weights on its validation or test set."""
    data, model, settings = load_run(run, overrides)
    trainer = Trainer(**settings)
    (trainer.test if split == "test" else trainer.validate)(model, datamodule=data, verbose=False, weights_only=True)
    if trainer.is_global_zero:
        for name, value in model.latest.items():
            print(f"{name} {value:.6f}")


@torch.inference_mode()
def predict(run: str, images: Path, out: Path, all_classes: bool, overrides: list[str]) -> None:
    """Writes a CSV row an image: file, prediction, probability, error; unreadable files have only the last.

    Args:
        run: The run folder.
        images: Image files lie in it and in the folders below it.
        out: The CSV file; it appears when it is whole.
        all_classes: Adds the probability of every class.
        overrides: Of the run's config, such as --data.num_workers 4.
    """
    data, model, settings = load_run(run, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() and settings["accelerator"] != "cpu" else "cpu")
    model.to(device).eval()
    failed = 0
    names = data.class_names if all_classes else []
    with replacing(out) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "prediction", "probability", "error", *names])
        for batch, paths, unreadable in data.folder_dataloader(images, skip_unreadable=True):
            if paths:
                batch = data.on_after_batch_transfer(batch._replace(images=batch.images.to(device)))
                probabilities = model.predict_step(batch, 0).cpu()
                for path, row in zip(paths, probabilities, strict=True):
                    best = int(row.argmax())
                    rest = [f"{p:.6f}" for p in row] if all_classes else []
                    writer.writerow([path, data.class_names[best], f"{row[best]:.6f}", "", *rest])
            for path, reason in unreadable:
                failed += 1
                writer.writerow([path, "", "", reason])
    print(f"predictions: {out}")
    if failed:
        print(f"{failed} files could not be read: their rows say why", file=sys.stderr)
