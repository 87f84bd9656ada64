"""Using a finished run: evaluate its weights again, classify a folder of images."""

import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import UserError
from reslab.files import replacing
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.training import Classifier


def load_run(run: str, overrides: list[str], data_needed: bool = True) -> tuple[ImageData, Classifier, dict[str, Any]]:
    """A finished run's data, its model with the weights that were tested, and a trainer's settings that write nothing.

    Args:
        run: The run folder.
        overrides: Of the run's config.
        data_needed: Ask the data for the names of the classes; else take those that the run noted, so that the data
            need not be there.

    Raises:
        UserError: it is no run folder, or the run has not come to its weights yet.
    """
    folder = RunFolder.existing(run)
    manifest = manifests.read(folder.manifest)
    if not folder.weights.exists():
        raise UserError(f"{run} has no {folder.weights.name} yet: its status is {manifest['status']}")
    # The file holds the weights that were evaluated: of the average, where there was one.
    once = ["--model.ema_decay", "null", "--model.weights", "null", "--model.compile", "false"]
    if not data_needed:
        once += ["--data.classes", json.dumps(manifest["data"]["class_names"])]
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


class Answer(NamedTuple):
    """What a network says about an image file: its classes' probabilities (num_classes,), or why there are none."""

    path: str
    probabilities: Tensor | None
    error: str = ""


def predict(run: str, images: Path, out: Path, all_classes: bool, overrides: list[str]) -> None:
    """Writes a CSV row an image: file, prediction, probability, error; unreadable files have only the last.

    Rows are written as they come, so that a folder may be of any size.

    Args:
        run: The run folder.
        images: Image files lie in it and in the folders below it.
        out: The CSV file; it appears when it is whole.
        all_classes: Adds the probability of every class.
        overrides: Of the run's config, such as --data.num_workers 4.
    """
    data, model, settings = load_run(run, overrides, data_needed=False)
    device = torch.device("cuda" if torch.cuda.is_available() and settings["accelerator"] != "cpu" else "cpu")
    names = data.class_names if all_classes else []
    count = failed = 0
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names of files are bytes, not always UTF-8: they are written as they are.
    with replacing(out) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "prediction", "probability", "error", *names])
        for answer in _answers(data, model.to(device).eval(), images, device):
            writer.writerow(_row(answer, data.class_names, all_classes))
            count += 1
            failed += answer.probabilities is None
    rate = count / (time.monotonic() - began)
    print(f"{count} images ({rate:.0f}/s)\npredictions: {out}")
    if failed:
        print(f"{failed} files could not be read: their rows say why", file=sys.stderr)


@torch.inference_mode()
def _answers(data: ImageData, model: Classifier, images: Path, device: torch.device) -> Iterator[Answer]:
    for batch, paths, unreadable in data.folder_dataloader(images, skip_unreadable=True):
        answers = [Answer(path, None, reason) for path, reason in unreadable]
        if paths:
            batch = data.on_after_batch_transfer(batch._replace(images=batch.images.to(device)))
            answers += map(Answer, paths, model.predict_step(batch, 0).cpu())
        yield from sorted(answers, key=lambda answer: answer.path)


def _row(answer: Answer, classes: list[str], all_classes: bool) -> list[str]:
    if answer.probabilities is None:
        return [answer.path, "", "", answer.error]
    values = answer.probabilities.tolist()
    best = max(range(len(values)), key=values.__getitem__)
    return [answer.path, classes[best], f"{values[best]:.6f}", "", *(f"{p:.6f}" for p in values if all_classes)]
