"""Use a finished run: evaluate its weights, classify image files."""

import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.errors import UserError
from reslab.files import check_output, replacing
from reslab.models.zoo import load_state
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.training import Classifier
from reslab.training.launchers import check_trainer


def load_run(run: str, overrides: list[str]) -> tuple[ImageData, Classifier, dict[str, Any]]:
    """Return a finished run's data, its model with the tested weights, and settings for a Trainer that writes nothing.

    The data may be missing: the class names are those in the manifest. `overrides` change the run's config.

    Raises:
        UserError: `run` is not a run directory, or has no weights yet.
    """
    folder = RunFolder.existing(run)
    manifest = manifests.read(folder.manifest)
    if not folder.weights.exists():
        raise UserError(f"{run} has no {folder.weights.name} yet: its status is {manifest['status']}")
    # The file holds the evaluated weights (the average, if there was one): no other weights are loaded or fetched.
    fixed = ["--model.ema_decay", "null", "--model.weights", "null", "--model.execution.compile", "false"]
    fixed += [*_without_pretrained(folder.config), "--data.classes", json.dumps(manifest["data"]["class_names"])]
    data, model, settings = Experiment(["--config", str(folder.config), *fixed, *overrides]).build()
    load_state(model.net, load_file(folder.weights), run)
    return data, model, {**settings, "logger": False, "callbacks": []}


def _without_pretrained(config: Path) -> list[str]:
    """Return the overrides that keep a library's network from fetching its pretrained weights again."""
    init_args = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["net"].get("init_args", {})
    empty = {"pretrained": "false", "weights": "null"}
    return [f"--model.net.init_args.{name}={value}" for name, value in empty.items() if name in init_args]


def evaluate(run: str, split: str, overrides: list[str], on: Sequence[str] = ()) -> None:
    """Print the metrics of a run's weights on the data of a split (validation or test), or on further test sets.

    If the data are not those of the run, so that the metrics may differ from its results, report what has changed.
    """
    if on:
        from reslab.further_tests import test_on

        return test_on(run, on, overrides)
    data, model, settings = load_run(run, overrides)
    trainer = Trainer(**settings)
    check_trainer(trainer)
    (trainer.test if split == "test" else trainer.validate)(model, datamodule=data, verbose=False, weights_only=True)
    if trainer.is_global_zero:
        for name, value in model.latest.items():
            print(f"{name} {value:.6f}")
        folder = RunFolder(run)
        for change in data.identity().changes(manifests.read(folder.manifest)["data"], folder.data):
            print(f"note: the data are not those of the run: {change}")


def predict(run: str, images: str, out: Path | None, all_classes: bool, overrides: list[str]) -> None:
    """Write a CSV with one row per image (file, prediction, probability, error); an unreadable file has only an error.

    `images` is searched recursively and may hold any number of images. `out` (default: RUN/predictions-IMAGES.csv)
    appears when it is complete; with `all_classes`, it has one probability column per class.
    """
    folder = RunFolder.existing(run)
    out = out or folder.path / f"predictions-{Path(images).resolve().name or 'images'}.csv"
    check_output(out)
    data, model, settings = load_run(run, overrides)
    device = "cuda" if torch.cuda.is_available() and settings["accelerator"] != "cpu" else "cpu"
    count = failed = 0
    start = time.monotonic()
    # File names are bytes and not always UTF-8: surrogateescape writes them unchanged.
    with replacing(out) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "prediction", "probability", "error", *(data.class_names if all_classes else [])])
        for row in _rows(data, model.to(device).eval(), images, all_classes):
            writer.writerow(row)
            count += 1
            failed += bool(row[3])
    print(f"{count} images ({count / (time.monotonic() - start):.0f}/s)\npredictions: {out}")
    if failed:
        print(f"{failed} unreadable files: see the column `error`", file=sys.stderr)


@torch.inference_mode()
def _rows(data: ImageData, model: Classifier, images: str, all_classes: bool) -> Iterator[list[str]]:
    """Yield one CSV row per image file, sorted by path."""
    for batch, paths, unreadable in data.folder_dataloader(images, skip_unreadable=True):
        rows = [[path, "", "", error] for path, error in unreadable]
        if paths:
            batch = data.on_after_batch_transfer(batch._replace(images=batch.images.to(model.device)))
            for path, probabilities in zip(paths, model.predict_step(batch, 0).cpu(), strict=True):
                columns = [f"{p:.6f}" for p in probabilities.tolist()]
                best = int(probabilities.argmax())
                rows.append([path, data.class_names[best], columns[best], "", *(columns if all_classes else [])])
        yield from sorted(rows)
