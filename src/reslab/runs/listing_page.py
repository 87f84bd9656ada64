"""The page of `reslab runs --html`: a sortable table of runs with their learning curves, in one file."""

import csv
import json
import os
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reslab.files import check_output, write_text
from reslab.runs.listing import Listed, is_number
from reslab.runs.listing_text import cell, printable, safe, short_titles, summary
from reslab.runs.metrics import Metrics, read_metrics
from reslab.runs.query import default_columns
from reslab.runs.report import formatted, main_metric, templates

MOST_KEYS = 12  # columns of config keys, unless columns are chosen
MOST_POINTS = 60  # per curve
CURVE_BYTES = 1_500_000  # of all curves together: with more runs, each curve has fewer points
VALUE_BYTES = 7  # per point, about


def write_page(file: Path, runs: Sequence[Listed], columns: Sequence[str] | None) -> None:
    """Write the page, which loads nothing; it links to the report of each run by a relative path."""
    check_output(file)
    columns = list(columns or _page_columns(runs))
    folder = _common_folder(runs)
    page = (
        templates()
        .get_template("listing.html.j2")
        .render(
            title=printable(f"Runs in {folder}"),
            summary=summary(runs),
            columns=[_column(column, title, runs) for column, title in short_titles(columns).items()],
            rows=[_row(run, columns, folder, file) for run in runs],
            curves=_script_json(curves([_metrics(run) for run in runs])),
        )
    )
    write_text(file, safe(page))


def _common_folder(runs: Sequence[Listed]) -> str:
    """Return the directory that holds all runs, relative to the working directory if it is in there."""
    if not runs:
        return "."
    folder = os.path.commonpath([Path(run.path).absolute().parent for run in runs])
    relative = os.path.relpath(folder)
    return folder if relative.startswith("..") else relative


def _page_columns(runs: Sequence[Listed]) -> list[str]:
    columns = default_columns(runs)
    keys = [column for column in columns if "." in column]
    first = ["run", "status", *(column for column in columns if "/" in column)]  # a phone has room for no more
    return [*first, *(column for column in columns if column not in (*first, *keys[MOST_KEYS:]))]


def _column(column: str, title: str, runs: Sequence[Listed]) -> dict[str, Any]:
    values = [run.get(column) for run in runs]
    return {"key": column, "title": title, "number": all(value is None or is_number(value) for value in values)}


def _row(run: Listed, columns: Sequence[str], folder: str, file: Path) -> dict[str, Any]:
    report = Path(run.path, "report.html")
    link = urllib.parse.quote(os.fsencode(os.path.relpath(report, file.parent))) if report.is_file() else None
    cells = [(column, run.get(column), _text(column, run)) for column in columns]
    return {"cells": cells, "link": link, "path": printable(os.path.relpath(run.path, folder)).split("/")}


def _text(column: str, run: Listed) -> str:
    if column in run.results and column not in run.facts:
        return formatted(column, run.results[column])
    return printable(cell(column, run))


def _metrics(run: Listed) -> Metrics:
    try:
        path = Path(run.path, "metrics.csv")
        return read_metrics(path) if path.is_file() else {}
    except (OSError, ValueError, csv.Error):
        return {}


def curves(metrics: Sequence[Metrics]) -> dict[str, Any]:
    """Return the curves of the main metrics: names, lists of steps, and per run and metric [steps' index, values].

    Runs of the same length share a list of steps. Curves are thinned out to at most MOST_POINTS points.
    """
    names = _curve_names(metrics)
    logged = sum(min(len(run[name][0]), MOST_POINTS) for run in metrics for name in names if name in run)
    points = max(8, int(MOST_POINTS * min(1, CURVE_BYTES / (VALUE_BYTES * logged)))) if logged else MOST_POINTS
    steps: dict[tuple[int, ...], int] = {}
    runs = []
    for run in metrics:
        lines: list[Any] = []
        for name in names:
            if name not in run:
                lines.append(0)
                continue
            x, y = thinned(*run[name], points)
            lines.append([steps.setdefault(tuple(map(int, x)), len(steps)), [_short(v) for v in y]])
        runs.append(lines)
    return {"metrics": names, "steps": list(steps), "runs": runs}


def _curve_names(metrics: Sequence[Metrics]) -> list[str]:
    logged = dict.fromkeys(name for run in metrics for name in run)
    mains = (main_metric(run, split) for split in ("val", "train") for run in metrics)
    names = dict.fromkeys([*(name for name in mains if name), "val/loss", "train/loss"])
    return [name for name in names if name in logged][:6]


def thinned(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return about evenly spaced points of a curve, with the first and the last one."""
    if len(x) <= points:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, points).round().astype(int))
    return x[kept], y[kept]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _script_json(value: Iterable[Any]) -> str:
    """Return JSON that cannot end the script element that holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
