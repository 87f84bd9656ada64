"""Evaluate a finished run on further test sets: `reslab test RUN --on NAME`.

The network sees the images as those of its test set: same size, crop and normalization. Where a set has only
some of the run's classes, predictions are restricted to these, as in the papers of ImageNet-A and -R.
"""

import contextlib
import hashlib
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from reslab.config_errors import explain
from reslab.data import DataError, EvaluationSet, ImageData, ImageFolder
from reslab.data.datasets import Arrays, ImageSource, shorten
from reslab.data.files import Files
from reslab.data.order import Ints
from reslab.errors import UserError, last_line
from reslab.files import check_output, replacing
from reslab.host import CONFIGS
from reslab.inference import load_run
from reslab.models.zoo import nearest
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.runs.report import write_report
from reslab.runs.verify import check_weights, finished
from reslab.training import Classifier
from reslab.training.launchers import check_trainer
from reslab.training.lightning_internals import rank

LEAVES = CONFIGS / "data"
KEY = "data.dataset"
SPLITS = ("train", "val", "test")


class FurtherSet(NamedTuple):
    """A further test set, loaded and checked.

    Attributes:
        config: Class and arguments of its source.
        parts: Its images by name of the part, with the set's own labels.
        classes: The run's names of its classes, in the order of its labels.
        labels: int64 (len(classes),): the run's label of each class.
    """

    config: dict[str, Any]
    source: ImageSource
    parts: dict[str, Arrays | Files]
    classes: list[str]
    labels: Ints

    @property
    def images(self) -> int:
        return sum(map(len, self.parts.values()))

    def identity(self) -> dict[str, str]:
        """Return the SHA-256 of the images (for files: names and sizes) with their labels, and of the class names."""
        files = "".join(f"{name} {data.sha256}\n" for name, data in self.parts.items())
        texts = {"files": files, "classes": "\n".join(self.classes)}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


class PartData(ImageData):
    """One part of a further test set as the test set of a run: same preprocessing, same labels."""

    def __init__(self, run: ImageData, part: Arrays | Files, labels: Ints) -> None:
        sizes = run.batch_size, run.eval_batch_size
        super().__init__(run.dataset, str(run.root), *sizes, num_workers=run.num_workers, resize=run.resize,
                         classes=run.class_names, on_device=run.on_device)  # fmt: skip
        mapped = labels[part.labels]  # a table of files must not be read from its cache again, which has other labels
        self.test_data = (
            replace(part, labels=mapped, cache=None) if isinstance(part, Files) else replace(part, labels=mapped)
        )

    def prepare_data(self) -> None:
        """Do nothing: the part is loaded."""

    def setup(self, stage: str | None = None) -> None:
        """Do nothing: the run's training and test data are not needed."""


def test_on(run: str, names: Sequence[str], overrides: list[str]) -> None:
    """Evaluate a run on further test sets, and add their results to its manifest and predictions to its directory.

    Args:
        run: Directory of a finished run.
        names: Config files of data sets, or their names in configs/data. All are checked before the first evaluation.
        overrides: Change the run's config: --data.root DIR, for example.
    """
    folder, manifest = finished(run)
    check_weights(folder, manifest)
    leaves = _leaves(names)
    for name in leaves:
        check_output(_predictions(folder, name))
    data, model, settings = load_run(run, overrides)
    sets = {name: load_set(name, *leaf, data) for name, leaf in leaves.items()}
    # Results that are recorded are always those of all images.
    trainer = Trainer(**{**settings, "limit_test_batches": 1.0, "fast_dev_run": False})
    check_trainer(trainer)
    for name, test_set in sets.items():
        entry, predictions = evaluate_set(trainer, model, data, test_set)
        if trainer.is_global_zero:
            _report(name, test_set, entry)
            _record(folder, name, {**entry, "overrides": overrides}, predictions)


def _leaves(names: Sequence[str]) -> dict[str, tuple[dict[str, Any], ImageSource]]:
    leaves: dict[str, tuple[dict[str, Any], ImageSource]] = {}
    for name in names:
        path = _find(name)
        if path.stem in leaves:
            raise UserError(f"--on {name}: there are two test sets called {path.stem}: rename one of the files")
        if path.stem in SPLITS:
            raise UserError(f"--on {name}: {path.stem} is the name of the results of the run itself: rename the file")
        leaves[path.stem] = read_source(path)
    return leaves


def _find(name: str) -> Path:
    for path in (Path(name), Path("configs/data", f"{name}.yaml"), LEAVES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise UserError(
        f"--on {name}: no such file or data set{nearest(name, sorted(p.stem for p in LEAVES.glob('*.yaml')))}"
    )


def read_source(path: Path) -> tuple[dict[str, Any], ImageSource]:
    """Return the content of a data set's config file, with all defaults, and the ImageSource that it describes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageSource, KEY, required=True)
    words = [f"--{KEY}={path}"]
    try:
        config = parser.parse_args(words)
        source = parser.instantiate(config).data.dataset
    except ArgumentError as error:
        raise UserError(explain(str(error), [KEY], words, CONFIGS / "base.yaml")) from error
    except Exception as error:  # of the class's module or constructor, which jsonargparse wraps
        root = error
        while isinstance(root.__context__, Exception):
            root = root.__context__
        raise UserError(f"{path}: {last_line(root)}") from error
    return yaml.safe_load(parser.dump(config))["data"]["dataset"], source


def load_set(name: str, config: dict[str, Any], source: ImageSource, run: ImageData) -> FurtherSet:
    """Load a further test set; raise a DataError if its classes or images do not suit the run's network."""
    if isinstance(source, ImageFolder):  # its training images are not needed
        source = copy(source)
        source.train = source.test
    data = ImageData(source, str(run.root), download=run.download)
    if rank() == 0:
        data.prepare_data()
    special = isinstance(source, EvaluationSet)
    classes = data.call("classes_in", run.class_names) if special else data.class_names
    labels = _positions(classes, run.class_names, name)  # first: the message on other classes explains the most
    parts = data.call("all_parts") if special else {"": data.test_data}
    for part, images in parts.items():
        _check_images(images, len(classes), run, f"{name} {part}".strip())
    return FurtherSet(config, source, parts, classes, labels)


def _positions(classes: Sequence[str], run_classes: Sequence[str], name: str) -> Ints:
    """Return the run's label of each class of a test set."""
    position = {run_class: i for i, run_class in enumerate(run_classes)}
    if unknown := {*classes} - {*run_classes}:
        raise DataError(
            f"the run does not know {len(unknown)} of the {len(classes)} classes of {name}: {shorten(unknown)}. "
            f"Only the run has: {shorten({*run_classes} - {*classes})}. Classes are compared by name"
        )
    return np.array([position[label] for label in classes], np.int64)


def _check_images(data: Arrays | Files, num_classes: int, run: ImageData, name: str) -> None:
    wrong = data.labels[(data.labels < 0) | (data.labels >= num_classes)]
    if len(wrong):
        raise DataError(f"{name}: {len(wrong)} labels are outside 0 to {num_classes - 1}, the first is {wrong[0]}")
    channels, *size = run.image_shape
    if isinstance(data, Arrays) and data.images.shape[1:] != (*size, channels):
        raise DataError(
            f"{name} has images of shape {data.images.shape[1:]}, the run's network has inputs of {(*size, channels)}. "
            "Only image files are resized: resize these images, or save them as files"
        )


def evaluate_set(
    trainer: Trainer, model: Classifier, run: ImageData, test_set: FurtherSet
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the manifest's entry of a test set (results, results by part, data), and the predictions."""
    results: dict[str, dict[str, float]] = {}
    columns: list[dict[str, np.ndarray]] = []
    with restricted_to(model.net, test_set.labels):
        for i, (part, images) in enumerate(test_set.parts.items()):
            data = PartData(run, images, test_set.labels)
            trainer.test(model, datamodule=data, verbose=False, weights_only=True)
            tested = {name: value for name, value in model.latest.items() if name.startswith("test/")}
            if len(test_set.classes) < 6:  # as for runs
                tested.pop("test/acc5", None)
            results[part] = tested
            rows = {name: column.numpy() for name, column in model.predictions.items()}
            columns.append({"part": np.full(len(images), i), **rows})
            if part and trainer.is_global_zero:
                print(f"{part:<24}" + _formatted(results[part]), flush=True)
    predictions = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    return _entry(test_set, results), {**predictions, "parts": np.array([*test_set.parts])}


@contextlib.contextmanager
def restricted_to(net: torch.nn.Module, labels: Ints) -> Iterator[None]:
    """Make the logits of all classes but `labels` minus infinity: they are never predicted, their probability is 0."""
    kept = torch.from_numpy(np.unique(labels))

    def restrict(_: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        rows = kept.to(logits.device)
        return torch.full_like(logits, -torch.inf).index_copy(1, rows, logits.index_select(1, rows))

    handle = net.register_forward_hook(restrict)
    try:
        yield
    finally:
        handle.remove()


def _entry(test_set: FurtherSet, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    means = {name: _mean(test_set, results, name) for name in next(iter(results.values()))}
    accuracies = {part: values["test/acc"] for part, values in results.items() if "test/acc" in values}
    summary = test_set.source.summary(accuracies) if isinstance(test_set.source, EvaluationSet) else {}
    entry = {"dataset": test_set.config, "data": test_set.identity(), "images": test_set.images}
    entry |= {"classes": len(test_set.classes), "results": {**means, **summary}}
    return {**entry, "parts": results} if [*results] != [""] else entry


def _mean(test_set: FurtherSet, results: dict[str, dict[str, float]], name: str) -> float:
    """Return the mean of a metric over images; the parts of published sets all have as many."""
    sizes = [len(test_set.parts[part]) for part in results]
    return float(np.average([values[name] for values in results.values()], weights=sizes))


def _predictions(folder: RunFolder, name: str) -> Path:
    return folder.path / f"predictions-{name}.npz"


def _formatted(results: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.6f}" for name, value in results.items())


def _report(name: str, test_set: FurtherSet, entry: dict[str, Any]) -> None:
    classes, published = entry["classes"], getattr(test_set.source, "published_images", None)
    print(f"{name}: {_formatted(entry['results'])} ({entry['images']:,} images of {classes} classes)", flush=True)
    if published not in (None, entry["images"]):
        print(f"note: the published set has {published:,} images: is {name} complete?")


def _record(folder: RunFolder, name: str, entry: dict[str, Any], predictions: dict[str, np.ndarray]) -> None:
    """Write predictions, the entry below `test_sets` in the manifest, and the report; the test results stay."""
    path = _predictions(folder, name)
    with folder.lock():  # another `reslab test` may add its results now
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **predictions)  # type: ignore[arg-type]
        manifest = manifests.read(folder.manifest)
        weights = {"predictions": path.name, "weights_sha256": manifest["weights_sha256"]}
        manifest.setdefault("test_sets", {})[name] = {**entry, **weights, "evaluated": manifests.now()}
        manifests.write(folder.manifest, manifest)
        write_report(folder.path)
    print(f"results: {folder.manifest}, test_sets.{name}; predictions: {path}; report: {folder.report}")
