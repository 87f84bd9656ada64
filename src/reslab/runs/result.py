"""The result block of a finished run, for the terminal. No torch at import."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from reslab.metric_text import accuracy_bounds, formatted, interval, label, main_metric
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.runs.metrics import read_metrics
from reslab.runs.predictions import read_predictions


def result_rows(folder: RunFolder) -> dict[str, str | None]:
    """Return the lines of the result block: test metrics, best validation, time, and what to do next."""
    manifest = manifests.read(folder.manifest)
    run = shlex.quote(str(folder.path))
    return {
        **dict(_tested(folder, manifest["results"])),
        **dict(_best_validation(folder)),
        "tested": manifest.get("tested_weights"),
        "ended": manifest.get("ended_early") and f"early, {manifest['ended_early']}",
        "time": _time(manifest),
        "next": f"reslab test {run}",
        "": f"reslab predict {run} --images DIRECTORY",
        "run": str(folder.path),
    }


def _tested(folder: RunFolder, results: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the test metrics, with the 95 % interval of each accuracy."""
    predictions = read_predictions(folder.path)
    images = 0 if predictions is None else len(predictions.label)
    for name, value in results.items():
        if name.startswith("test/"):
            yield name, f"{formatted(name, value)}  {interval(name, value, images)}".rstrip()


def further_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return rows on further test sets (`reslab test --on`): name, images, metric, value, 95 % interval.

    The interval requires independent images: sets in several parts, such as CIFAR-10-C, hold copies of the same ones.
    """
    rows = []
    for name, entry in manifest.get("test_sets", {}).items():
        results, images = entry["results"], entry["images"]
        for metric in (main_metric(results, "test"), "test/mCE"):
            if metric is not None and metric in results:
                bounds = None if "parts" in entry else accuracy_bounds(metric, results[metric], images)
                between = " to ".join(formatted(metric, bound) for bound in bounds or ())
                rows.append((name, f"{images:,}", label(metric), formatted(metric, results[metric]), between))
    return rows


def _best_validation(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """Yield the best value of the metric that run.monitor names, with its step."""
    options = yaml.safe_load(folder.config.read_text(encoding="utf-8"))["run"]
    name, metrics = options["monitor"], read_metrics(folder.metrics)
    if name in metrics:
        steps, values = metrics[name]
        best = int(values.argmax() if options["mode"] == "max" else values.argmin())
        yield f"best {name}", f"{formatted(name, values[best])}  at step {steps[best]:,.0f}"


def _time(manifest: Mapping[str, Any]) -> str:
    speed = manifest.get("samples_per_second")
    total = manifests.duration(manifest["wall_seconds"])
    return f"{total}, training at {speed:,.0f} images/s" if speed else total
