"""Page of `reslab compare`: the report and the curves of all runs. Imports no torch."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reslab.ablation.compare import images_text, table_rows, unit_of
from reslab.ablation.figures import LINES, label
from reslab.ablation.study import change_text
from reslab.ablation.wording import Unit
from reslab.errors import UserError
from reslab.files import write_text
from reslab.runs.figures import INK, STYLE, WIDTH, _end_labels, _limits, _steps
from reslab.runs.folder import RunFolder
from reslab.runs.metrics import Series, read_metrics
from reslab.runs.report import templates

Groups = Sequence[tuple[str, Sequence[Path]]]  # name and run directories
Frames = dict[str, pd.DataFrame]  # a logged metric by group: one row per step, one column per run


def write_page(report: dict[str, Any], groups: Groups, out: Path) -> None:
    """Write a page that loads nothing: the style is inline, the curves are a data URI."""
    unit = unit_of(report)
    page = templates(Path(__file__).parent).get_template("compare.html.j2").render(
        report=report,
        rows=table_rows(report, unit),
        changes=[change_text(*row.values()) for row in report["config_differences"] or []],
        images=images_text(report["per_image"]),
        curves=draw_curves(groups, report["metric"].rpartition("/")[2], unit),
    )  # fmt: skip
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise UserError(f"cannot write --out {out}: {error.strerror}") from error


def draw_curves(groups: Groups, kind: str, unit: Unit) -> dict[str, str]:
    """Draw the metric and the loss in validation and training; return one data URI by name of what was logged."""
    logged = [(name, [read_metrics(RunFolder(path).metrics) for path in paths]) for name, paths in groups]
    curves: dict[str, str] = {}
    for metric in (f"{split}/{name}" for name in dict.fromkeys([kind, "loss"]) for split in ("val", "train")):
        series = {name: [run[metric] for run in runs if metric in run] for name, runs in logged}
        frames = {name: _frame(runs) for name, runs in series.items() if runs}
        if frames:
            curves[metric] = _draw(metric, frames, unit if metric.endswith(f"/{kind}") else Unit(False, 4))
    return curves


def _frame(runs: Sequence[Series]) -> pd.DataFrame:
    """Return one row per step and one column per run, interpolated where only other runs logged."""
    frame = pd.concat([pd.Series(values, steps) for steps, values in runs], axis=1).sort_index()
    return frame.interpolate(method="index", limit_area="inside")


def _draw(metric: str, frames: Frames, unit: Unit) -> str:
    with mpl.rc_context(STYLE), io.BytesIO() as buffer:
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        _panel(figure.subplots(), metric, frames, unit)
        figure.savefig(buffer, format="png")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _panel(ax: Axes, metric: str, frames: Frames, unit: Unit) -> None:
    """Draw every run as a thin line, and over them the mean of each group, as far as all of its runs logged."""
    late = [frame[frame.index >= 0.1 * frame.index.max()].to_numpy().ravel() for frame in frames.values()]
    values = np.concatenate(late) * unit.factor  # the first values are far off
    _limits(ax, values[np.isfinite(values)], unit.percent)
    ends = []
    for (name, frame), color in zip(frames.items(), (LINES[0], INK), strict=False):
        ax.plot(frame.index, frame * unit.factor, color=color, lw=0.7, alpha=0.45)
        mean = frame.mean(axis=1, skipna=False).dropna() * unit.factor
        ax.plot(mean.index, mean, color=color, lw=2, marker="o" if len(mean) <= 15 else "", ms=3)
        last = mean if len(mean) else frame.ffill().mean(axis=1) * unit.factor
        ends.append((float(last.iloc[-1]), label(name, 18), color))
    _end_labels(ax, ends)
    ax.set_title(unit.axis(metric))
    _steps(ax)
