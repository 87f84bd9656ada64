"""The report of a run: one HTML page with all it shows inside it, made from the folder. No torch here."""

import base64
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reslab.files import write_text
from reslab.runs.figures import (
    CAPTIONS,
    Predictions,
    calibrate,
    confusion_counts,
    read_metrics,
    read_predictions,
    series,
    wilson,
)
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import duration, read

STATES = {
    "running": "This run has not ended: the page shows it as far as it had come when the page was written.",
    "preempted": "This run was interrupted. Run the same command again: it goes on where it stopped.",
    "failed": "This run failed: the attempts below say how.",
    "diverged": "This run diverged: the loss was no longer a finite number, and training stopped.",
}
UNTESTED = "The test set has not been evaluated: there is no test accuracy."
MISSING = {
    "config.yaml": "There is no config.yaml: the run cannot be repeated from its folder.",
    "metrics.csv": "There is no metrics.csv: nothing was logged.",
    "predictions.npz": "There is no predictions.npz: no interval, no table of classes, no mistakes to show.",
    "weights.safetensors": "There is no weights.safetensors: no final weights were written.",
}


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what the folder holds, whatever the run's status, and return its path.

    The page loads nothing: figures are data URIs and the style is inline. Raises UserError where the folder
    has no readable manifest.json.
    """
    folder = RunFolder.existing(run_dir)
    manifest = read(folder.manifest)
    metrics, predictions = read_metrics(run_dir), read_predictions(run_dir)
    config = folder.config.read_text(encoding="utf-8") if folder.config.exists() else ""
    template = templates().get_template("report.html.j2")
    page = template.render(
        name="/".join(run_dir.resolve().parts[-2:]),
        status=manifest.get("status", "unknown"),
        notices=notices(run_dir, manifest, predictions),
        summary=summarise(yaml.safe_load(config) or {}, manifest),
        headline=headline(manifest, metrics, predictions),
        tiles=tiles(manifest, metrics, predictions),
        figures=embed(folder.figures),
        classes=class_table(predictions, class_names(manifest, predictions)) if predictions else [],
        commands=commands(run_dir, manifest),
        manifest=manifest,
        config=config,
    )
    write_text(folder.report, page)
    return folder.report


def templates(*folders: Path) -> Environment:
    """The templates in `folders`, and after them those of runs: the style of all pages is there."""
    return Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def notices(run_dir: Path, manifest: Mapping[str, Any], predictions: Predictions | None) -> list[str]:
    """What a reader must know before the numbers: how the run ended, what is missing, what does not agree."""
    found = [STATES[manifest["status"]]] if manifest.get("status") in STATES else []
    accuracy = (manifest.get("results") or {}).get("test/acc")
    if accuracy is None:
        found.append(UNTESTED)
    elif predictions is not None and len(predictions.label):
        right = int((predictions.label == predictions.prediction).sum())
        # The metric is a float32 mean: half an image is more than it can round away.
        if abs(accuracy * len(predictions.label) - right) > 0.5:
            found.append(
                f"manifest.json and predictions.npz disagree: {accuracy:.4f} is not {right} right of "
                f"{len(predictions.label)}. One of them is not of this run."
            )
    return found + [text for name, text in MISSING.items() if not (run_dir / name).exists()]


def summarise(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """What was run, in a line a thing, from the resolved config: only what it says."""
    model, data, trainer = (config.get(key) or {} for key in ("model", "data", "trainer"))
    found = {
        "network": _leaf(model.get("net")),
        "data": _leaf(data.get("dataset")),
        "optimizer": _leaf(model.get("optimizer")),
        "schedule": _leaf(model.get("schedule")),
        "epochs": trainer.get("max_epochs"),
        "batch size": data.get("batch_size"),
        "precision": trainer.get("precision"),
        "seed": manifest.get("seed"),
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def _leaf(node: Any) -> str | None:
    """`a.b.Class` with init_args as Class(key=value, …)."""
    if not isinstance(node, Mapping) or "class_path" not in node:
        return None if node is None else str(node)
    arguments = ", ".join(f"{key}={value}" for key, value in (node.get("init_args") or {}).items())
    return f"{node['class_path'].rpartition('.')[2]}({arguments})"


def headline(manifest: Mapping[str, Any], metrics: pd.DataFrame, predictions: Predictions | None) -> dict[str, Any]:
    """The one number of the run with its uncertainty: the test accuracy, else the latest there is."""
    accuracy = (manifest.get("results") or {}).get("test/acc")
    if accuracy is not None:
        notes = []
        if predictions is not None and (n := len(predictions.label)):
            low, high = wilson(round(accuracy * n), n)
            notes.append(f"95 % interval {100 * low:.2f}–{100 * high:.2f} % (Wilson) from {n:,} test images")
        if manifest.get("tested_weights"):
            notes.append(f"weights tested: {manifest['tested_weights']}")
        return {"label": "test accuracy", "value": f"{100 * accuracy:.2f} %", "notes": notes}
    for split, label in (("val", "validation"), ("train", "training")):
        steps, values = series(metrics, f"{split}/acc")
        if len(steps):
            notes = [f"at step {steps[-1]:,.0f}; the best so far {100 * values.max():.2f} %"]
            return {"label": f"latest {label} accuracy", "value": f"{100 * values[-1]:.2f} %", "notes": notes}
    return {"label": "accuracy", "value": "none yet", "notes": ["nothing has been logged"]}


def tiles(manifest: Mapping[str, Any], metrics: pd.DataFrame, predictions: Predictions | None) -> dict[str, str]:
    """The other numbers worth a look, by name, those that there are."""
    results = manifest.get("results") or {}
    found = {}
    validation = series(metrics, "val/acc")[1]
    if len(validation):
        found["validation accuracy"] = f"{100 * validation[-1]:.2f} %"
    if results.get("test/loss") is not None:
        found["test loss"] = f"{results['test/loss']:.4f}"
    if results.get("test/acc5") is not None:
        found["test top-5"] = f"{100 * results['test/acc5']:.2f} %"
    if predictions is not None and len(predictions.label):
        error = calibrate(predictions.confidence, predictions.label == predictions.prediction).ece
        found["calibration error"] = f"{100 * error:.1f} %"
    if manifest.get("wall_seconds") is not None:
        found["wall time"] = duration(manifest["wall_seconds"])
    if manifest.get("samples_per_second") is not None:
        found["training images/s"] = f"{manifest['samples_per_second']:,.0f}"
    return found


def embed(folder: Path, captions: Mapping[str, str] = CAPTIONS) -> list[dict[str, str]]:
    """The PNGs of a folder as data URIs, the known ones first and with their captions."""
    order = list(captions)
    paths = sorted(folder.glob("*.png"), key=lambda p: order.index(p.stem) if p.stem in order else len(order))
    return [
        {
            "name": path.stem,
            "caption": captions.get(path.stem, path.stem.replace("_", " ")),
            "uri": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        }
        for path in paths
    ]


def class_names(manifest: Mapping[str, Any], predictions: Predictions | None) -> list[str]:
    """The names the manifest records, else `class 0` … for the classes that occur."""
    names = (manifest.get("data") or {}).get("class_names")
    if names or predictions is None or not len(predictions.label):
        return list(names or [])
    return [f"class {i}" for i in range(1 + max(predictions.label.max(), predictions.prediction.max()))]


def class_table(predictions: Predictions, names: list[str]) -> list[dict[str, Any]]:
    """A row a class that has test images, the least accurate first, with what it was most often taken for."""
    counts = confusion_counts(predictions.label, predictions.prediction, len(names))
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
    """Command lines, each with what it does, that repeat and check the run."""
    run, config, git = shlex.quote(str(run_dir)), run_dir / "config.yaml", manifest.get("git") or {}
    lines = []
    if git.get("sha"):
        lines.append((f"git checkout {git['sha']}", "the code of this run"))
    if git.get("dirty") and git.get("diff"):
        lines.append((f"git apply {shlex.quote(str(run_dir / git['diff']))}", "its uncommitted changes"))
    if config.exists():
        lines.append((f"reslab fit --config {shlex.quote(str(config))}", "the same run again"))
        lines.append((f"reslab reproduce {run}", "the same, in a new folder, and the weights compared bit by bit"))
    return [*lines, (f"reslab verify {run}", "the folder's files against their hashes")]
