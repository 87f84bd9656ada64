"""The report of a run: one self-contained HTML page, made from its run directory. No torch at import."""

import base64
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reslab.files import write_text
from reslab.runs import figures
from reslab.runs.figures import CAPTIONS, Predictions, is_accuracy
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import duration, read
from reslab.runs.metrics import Metrics, read_metrics

STATES = {
    "running": "This run has not ended: the page shows its state when the page was written.",
    "preempted": "This run was interrupted. Run the same command again to resume it.",
    "failed": "This run failed: see the attempts below for the cause.",
    "diverged": "This run diverged: the loss was no longer a finite number, and training stopped.",
}
UNTESTED = "The test set has not been evaluated."
MISSING = {
    "config.yaml": "There is no config.yaml: the run cannot be repeated from this directory.",
    "metrics.csv": "There is no metrics.csv: nothing was logged.",
    "predictions.npz": "There is no predictions.npz: no confidence interval, no table of classes, no mistakes to show.",
    "weights.safetensors": "There is no weights.safetensors: no final weights were written.",
}
SPLIT_LABELS = {"train": "training", "val": "validation"}
METRIC_LABELS = {"acc": "accuracy", "acc5": "top-5 accuracy"}


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the contents of the run directory, whatever the run's status; return its path.

    The page loads nothing: figures are data URIs and the style is inline. Raises UserError if the directory
    has no readable manifest.json.
    """
    folder = RunFolder.existing(run_dir)
    manifest = read(folder.manifest)
    metrics, predictions = read_metrics(folder.metrics), figures.read_predictions(run_dir)
    config = folder.config.read_text(encoding="utf-8") if folder.config.exists() else ""
    main = headline(manifest, metrics, predictions)
    template = templates().get_template("report.html.j2")
    page = template.render(
        name="/".join(run_dir.resolve().parts[-2:]),
        status=manifest.get("status", "unknown"),
        notices=notices(run_dir, manifest, predictions),
        summary=summarise(yaml.safe_load(config) or {}, manifest),
        headline=main,
        tiles=tiles(manifest, metrics, predictions, skip=main["metric"]),
        figures=embed(folder.figures),
        classes=class_table(predictions, class_names(manifest, predictions)) if predictions else [],
        commands=commands(run_dir, manifest),
        manifest=manifest,
        config=config,
    )
    write_text(folder.report, page)
    return folder.report


def templates(*folders: Path) -> Environment:
    """Load templates from `folders`, then from this package, which holds the style of all pages."""
    return Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def notices(run_dir: Path, manifest: Mapping[str, Any], predictions: Predictions | None) -> list[str]:
    """List what a reader must know before the numbers: status, missing files, contradictions."""
    texts = [STATES[manifest["status"]]] if manifest.get("status") in STATES else []
    results = manifest.get("results") or {}
    if not any(name.startswith("test/") for name in results):
        texts.append(UNTESTED)
    elif predictions is not None and (accuracy := results.get("test/acc")) is not None:
        correct, n = int((predictions.label == predictions.prediction).sum()), len(predictions.label)
        if abs(accuracy * n - correct) > 0.5:  # a float32 mean rounds away less than half an image
            texts.append(
                f"manifest.json and predictions.npz disagree: test/acc is {accuracy:.4f}, but {correct} of {n} "
                "predictions are correct. One of the two files belongs to another run."
            )
    return texts + [text for name, text in MISSING.items() if not (run_dir / name).exists()]


def summarise(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Summarise the resolved config in one line per part; parts that it lacks are left out."""
    model, data, trainer = (config.get(key) or {} for key in ("model", "data", "trainer"))
    parts = {
        "network": model.get("net"), "data": data.get("dataset"),
        "optimizer": model.get("optimizer"), "schedule": model.get("schedule"),
        "epochs": trainer.get("max_epochs"), "batch size": data.get("batch_size"),
        "precision": trainer.get("precision"), "seed": manifest.get("seed"),
    }  # fmt: skip
    return {key: _summary(value) for key, value in parts.items() if value is not None}


def _summary(value: Any) -> str:
    """Format a config value; a class with init_args as Class(key=value, ...)."""
    if not isinstance(value, Mapping) or "class_path" not in value:
        return str(value)
    arguments = ", ".join(f"{key}={argument}" for key, argument in (value.get("init_args") or {}).items())
    return f"{value['class_path'].rpartition('.')[2]}({arguments})"


def label(name: str) -> str:
    """Return a metric's name for readers: `validation top-5 accuracy` for val/acc5."""
    split, _, metric = name.partition("/")
    return f"{SPLIT_LABELS.get(split, split)} {METRIC_LABELS.get(metric, metric.replace('_', ' '))}"


def formatted(name: str, value: float) -> str:
    """Format a metric's value: accuracies in percent."""
    return f"{100 * value:.2f} %" if is_accuracy(name) else f"{value:.4f}"


def main_metric(names: Iterable[str], split: str) -> str | None:
    """Return the most important metric of a split: the accuracy, else the first one; None without any."""
    of_split = [name for name in names if name.startswith(f"{split}/")]
    return f"{split}/acc" if f"{split}/acc" in of_split else next(iter(of_split), None)


def headline(manifest: Mapping[str, Any], metrics: Metrics, predictions: Predictions | None) -> dict[str, Any]:
    """Return the main result with its uncertainty: that of the test, else the latest of validation or training."""
    results = manifest.get("results") or {}
    if name := main_metric(results, "test"):
        notes = []
        if name == "test/acc" and predictions is not None:
            n = len(predictions.label)
            low, high = figures.wilson(round(results[name] * n), n)
            notes.append(f"95 % interval {100 * low:.2f}–{100 * high:.2f} % (Wilson) from {n:,} test images")
        if manifest.get("tested_weights"):
            notes.append(f"weights tested: {manifest['tested_weights']}")
        return {"metric": name, "label": label(name), "value": formatted(name, results[name]), "notes": notes}
    if name := main_metric(metrics, "val") or main_metric(metrics, "train"):
        steps, values = metrics[name]
        best = f"; best so far: {formatted(name, values.max())}" if is_accuracy(name) else ""
        notes = [f"at step {steps[-1]:,.0f}{best}"]
        return {"metric": name, "label": f"latest {label(name)}", "value": formatted(name, values[-1]), "notes": notes}
    return {"metric": None, "label": "results", "value": "none yet", "notes": ["nothing has been logged"]}


def tiles(
    manifest: Mapping[str, Any], metrics: Metrics, predictions: Predictions | None, skip: str | None
) -> dict[str, str]:
    """Return the other numbers by label: all metrics of test and validation but `skip`, calibration, time and speed."""
    values = {name: points[1][-1] for name, points in metrics.items() if name.startswith("val/")}
    results = {name: value for name, value in (manifest.get("results") or {}).items() if value is not None}
    values |= {name: value for name, value in results.items() if name.startswith(("val/", "test/"))}
    shown = {label(name): formatted(name, value) for name, value in values.items() if name != skip}
    if predictions is not None:
        error = figures.calibrate(predictions.confidence, predictions.label == predictions.prediction).ece
        shown["calibration error"] = f"{100 * error:.1f} %"
    if manifest.get("wall_seconds") is not None:
        shown["wall time"] = duration(manifest["wall_seconds"])
    if manifest.get("samples_per_second") is not None:
        shown["training images/s"] = f"{manifest['samples_per_second']:,.0f}"
    return shown


def embed(folder: Path, captions: Mapping[str, str] = CAPTIONS) -> list[dict[str, str]]:
    """Return the PNGs of a directory as data URIs, those with a caption first."""
    order = list(captions)
    paths = sorted(folder.glob("*.png"), key=lambda p: order.index(p.stem) if p.stem in order else len(order))
    names = {path.stem: captions.get(path.stem, path.stem.replace("_", " ")) for path in paths}
    uris = ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in paths]
    return [{"name": name, "caption": text, "uri": uri} for (name, text), uri in zip(names.items(), uris, strict=True)]


def class_names(manifest: Mapping[str, Any], predictions: Predictions) -> list[str]:
    """Return the class names in the manifest, or `class 0`, `class 1`, ... if it has none."""
    names = (manifest.get("data") or {}).get("class_names")
    return names or [f"class {i}" for i in range(1 + max(predictions.label.max(), predictions.prediction.max()))]


def class_table(predictions: Predictions, names: list[str]) -> list[dict[str, Any]]:
    """Return one row per class that has test images, the least accurate first, with its most frequent confusion."""
    counts = figures.confusion_counts(predictions.label, predictions.prediction, len(names))
    right, total = np.diag(counts), counts.sum(1)
    wrong = counts - np.diag(right)
    rows = [
        {
            "name": names[c],
            "n": int(total[c]),
            "accuracy": float(right[c] / total[c]),
            "confusion": names[wrong[c].argmax()] if wrong[c].any() else "",
            "confused": int(wrong[c].max()),
        }
        for c in np.flatnonzero(total)
    ]
    return sorted(rows, key=lambda row: row["accuracy"])


def commands(run_dir: Path, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the commands that repeat and check the run, each with its purpose."""
    run, config, git = shlex.quote(str(run_dir)), run_dir / "config.yaml", manifest.get("git") or {}
    lines = []
    if git.get("sha"):
        lines.append((f"git checkout {git['sha']}", "check out the code of this run"))
    if git.get("dirty") and git.get("diff"):
        lines.append((f"git apply {shlex.quote(str(run_dir / git['diff']))}", "apply its uncommitted changes"))
    if config.exists():
        lines.append((f"reslab fit --config {shlex.quote(str(config))}", "repeat the run"))
        lines.append((f"reslab reproduce {run}", "repeat it in a new directory and compare the weights bit by bit"))
    return [*lines, (f"reslab verify {run}", "check the files of this run against their hashes")]
