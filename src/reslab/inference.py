"""Use a finished run: evaluate its weights, classify image files."""

import csv
import json
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from reslab.config import Experiment
from reslab.data import ImageData
from reslab.data.batches import FolderBatch
from reslab.data.files import Walk, printable
from reslab.errors import UserError
from reslab.files import check_output, replacing
from reslab.metric_text import formatted, interval
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


class Row(NamedTuple):
    """The prediction for one image file; an unreadable file has only an error."""

    file: str
    prediction: str
    probability: str
    error: str
    probabilities: list[str]  # of all classes


class TrueClasses:
    """The true classes of images that lie in one directory per class, and how many predictions agree with them.

    Directories are recognised by name; without any that is named after a class of the run, nothing is known.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes
        names = Walk(folder).directories()
        self.recognised = [name for name in names if name in classes]
        self.others = [name for name in names if name not in classes]
        self.counted = self.correct = self.unlabelled = 0

    def of(self, row: Row) -> str:
        """Return the true class of an image, "" if it is not known, and count the prediction."""
        directory, inside, _ = row.file.partition("/")
        true = directory if inside and directory in self.recognised else ""
        self.unlabelled += not true
        if true and not row.error:
            self.counted += 1
            self.correct += row.prediction == true
        return true

    def summary(self) -> Iterator[str]:
        """Yield lines about the accuracy, and about directories that were not recognised."""
        if self.counted:
            accuracy = self.correct / self.counted
            yield f"accuracy: {formatted('acc', accuracy)}  {interval('acc', accuracy, self.counted)}"
        if self.recognised and self.unlabelled:
            known = f"recognised: {len(self.recognised)} of {len(self.classes)} classes ({_listed(self.recognised)})"
            unknown = f"; not recognised: {_listed(self.others)}" if self.others else ""
            yield f"not counted: {self.unlabelled:,} images outside of the class directories; {known}{unknown}"
        elif self.others and not self.recognised:
            inner = [name for name in self.others if {*Walk(self.folder / name).directories()} & {*self.classes}]
            hint = f"; try --images {self.folder / inner[0]}" if inner else ""
            classes = f"{len(self.classes)} classes ({_listed(self.classes)})"
            yield f"no accuracy: no directory has the name of one of the run's {classes}{hint}"


def _listed(names: Sequence[str]) -> str:
    return printable(textwrap.shorten(", ".join(names), 60, placeholder=" ..."))


def predict(run: str, images: str, out: Path | None, all_classes: bool, overrides: list[str]) -> None:
    """Write a CSV with one row per image (file, prediction, probability, error); an unreadable file has only an error.

    `images` is searched recursively and may hold any number of images. If it has directories named after classes of
    the run, the CSV has a column `true_class`, and the accuracy is printed. `out` (default: RUN/predictions-IMAGES.csv)
    appears when it is complete; with `all_classes`, it has one probability column per class.
    """
    folder = RunFolder.existing(run)
    out = out or folder.path / f"predictions-{Path(images).resolve().name or 'images'}.csv"
    check_output(out)
    data, model, settings = load_run(run, overrides)
    loader = data.folder_dataloader(images, skip_unreadable=True)
    truth = TrueClasses(Path(images), data.class_names)
    device = "cuda" if torch.cuda.is_available() and settings["accelerator"] != "cpu" else "cpu"
    count = failed = 0
    start = time.monotonic()
    # File names are bytes and not always UTF-8: surrogateescape writes them unchanged.
    with replacing(out) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        true_class = ["true_class"] if truth.recognised else []
        names = data.class_names if all_classes else []
        writer.writerow(["file", *true_class, "prediction", "probability", "error", *names])
        for row in _rows(data, model.to(device).eval(), loader):
            true = [truth.of(row)] if truth.recognised else []
            columns = (row.probabilities or [""] * len(names)) if all_classes else []
            writer.writerow([row.file, *true, row.prediction, row.probability, row.error, *columns])
            count += 1
            failed += bool(row.error)
    print(f"{count} images ({count / (time.monotonic() - start):.0f}/s)", *truth.summary(), sep="\n")
    print(f"predictions: {out}")
    if failed:
        print(f"{failed} unreadable files: see the column `error`", file=sys.stderr)


@torch.inference_mode()
def _rows(data: ImageData, model: Classifier, loader: Iterable[FolderBatch]) -> Iterator[Row]:
    """Yield one row per image file, sorted by path."""
    for batch, paths, unreadable in loader:
        rows = [Row(path, "", "", error, []) for path, error in unreadable]
        if paths:
            batch = data.on_after_batch_transfer(batch._replace(images=batch.images.to(model.device)))
            for path, probabilities in zip(paths, model.predict_step(batch, 0).cpu(), strict=True):
                columns = [f"{p:.6f}" for p in probabilities.tolist()]
                best = int(probabilities.argmax())
                rows.append(Row(path, data.class_names[best], columns[best], "", columns))
        yield from sorted(rows)
