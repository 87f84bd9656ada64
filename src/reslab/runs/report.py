"""The report of a run: one self-contained HTML page, made from its run directory. No torch at import."""

import base64
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from reslab.files import write_text
from reslab.metric_text import formatted, label, main_metric, wilson
from reslab.runs.figures import CAPTIONS
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import duration, read
from reslab.runs.metrics import Metrics, read_metrics
from reslab.runs.predictions import Predictions, calibrate, confusion_counts, read_predictions
from reslab.runs.result import further_rows


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the contents of the run directory, whatever the run's status; return its path.

    The page loads nothing: figures are data URIs, the style is inline. Raises UserError without a manifest.json.
    """
    folder = RunFolder.existing(run_dir)
    manifest, metrics = read(folder.manifest), read_metrics(folder.metrics)
    predictions = read_predictions(run_dir)
    config = folder.config.read_text(encoding="utf-8") if folder.config.exists() else ""
    results = manifest.get("results") or {}
    main = headline(results, metrics)
    values = {name: points[1][-1] for name, points in metrics.items()} | results
    others = [name for name in values if name.startswith(("val/", "test/")) and name != main["metric"]]
    template = templates().get_template("report.html.j2")
    page = template.render(
        name="/".join(run_dir.resolve().parts[-2:]),
        run_dir=str(run_dir),
        files=[path.name for path in run_dir.iterdir()],
        headline=main,
        metrics={label(name): formatted(name, values[name]) for name in others},
        figures=embed(folder.figures),
        manifest=manifest,
        results=results,
        test_sets=further_rows(manifest),
        config=yaml.safe_load(config) or {},
        config_text=config,
        **(describe(predictions, manifest) if predictions else {}),
    )
    write_text(folder.report, page)
    return folder.report


def templates(*folders: Path) -> Environment:
    """Load templates from `folders`, then from this package, which holds the style of all pages."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "quote": shlex.quote}
    return environment


def headline(results: Mapping[str, float], metrics: Metrics) -> dict[str, Any]:
    """Return the main result: that of the test, else the latest of validation or training."""
    if name := main_metric(results, "test"):
        return {"metric": name, "label": label(name), "value": formatted(name, results[name])}
    if name := main_metric(metrics, "val") or main_metric(metrics, "train"):
        steps, values = metrics[name]
        text = f"latest {label(name)} (step {steps[-1]:,.0f})"
        return {"metric": name, "label": text, "value": formatted(name, values[-1])}
    return {"metric": "", "label": "results", "value": "none yet"}


def embed(folder: Path, captions: Mapping[str, str] = CAPTIONS) -> list[dict[str, str]]:
    """Return the figures of a directory as data URIs, in the order of their captions."""
    paths = [path for name in captions if (path := folder / f"{name}.png").exists()]
    uris = ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in paths]
    return [{"name": p.stem, "caption": captions[p.stem], "uri": uri} for p, uri in zip(paths, uris, strict=True)]


def describe(predictions: Predictions, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of tested and correct images, the 95 % interval, the calibration error, and a row per class.

    A row is (name, images, accuracy, most frequent confusion, its images); the least accurate class comes first.
    """
    correct = predictions.label == predictions.prediction
    largest = max(predictions.label.max(), predictions.prediction.max())
    names = (manifest.get("data") or {}).get("class_names") or [f"class {i}" for i in range(largest + 1)]
    counts = confusion_counts(predictions.label, predictions.prediction, len(names))
    right, total = np.diag(counts), counts.sum(1)
    wrong = counts - np.diag(right)
    rows = [
        (names[c], int(total[c]), float(right[c] / total[c]), names[wrong[c].argmax()], int(wrong[c].max()))
        for c in np.flatnonzero(total)
    ]
    return {
        "tested": len(correct),
        "correct": int(correct.sum()),
        "interval": wilson(int(correct.sum()), len(correct)),
        "calibration_error": calibrate(predictions.confidence, correct).ece,
        "classes": sorted(rows, key=lambda row: row[2]),
    }
