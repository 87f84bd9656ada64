"""Figures of a study: arms, differences, learning curves, cost. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from reslab.ablation.wording import Unit
from reslab.runs.figures import INK, MUTED, STYLE, TEST, VAL, WIDTH, _end_labels, _save, _spread, shorten

COLORS = {"better": "#009E73", "worse": TEST, "equivalent": VAL, "inconclusive": MUTED, None: MUTED}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # with more arms, each gets its own panel
ROW = 0.4  # inches
CAPTIONS = {
    "arms": "Every arm: mean (diamond) with its 95 % t interval (bar), and every seed (dots).",
    "differences": "Every arm minus the baseline, seed by seed (dots): mean difference with its 95 % t interval. The "
    "grey band is the margin within which differences do not matter.",
    "learning_curves": "Metric during training: mean over the seeds, with a band from the lowest to the highest seed. "
    "Finished cells only.",
    "cost": "Metric with its 95 % t interval against the mean wall time of a cell.",
    "effects": "Main effects (blue) and interactions (grey) of the factors, with their 95 % t intervals.",
}
Report = Mapping[str, Any]


def draw_figures(report: Report, values: pd.DataFrame, curves: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Draw all figures of report.json that have data into `folder`, and return the paths of the PNGs.

    `values` is the metric with one row per arm and one column per seed, NaN where there is none; `curves` the logged
    metric by arm, with one row per step and one column per seed. An existing figure without data is removed.
    """
    unit = Unit.of(report)
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figures = {
            "arms": arms(report, values, unit),
            "differences": differences(report, values, unit),
            "learning_curves": learning_curves(report, curves, unit),
            "cost": cost(report, unit),
            "effects": effects(report, unit),
        }
        return [path for name in CAPTIONS for path in _save(figures[name], folder / f"{name}.png")]


class Row(NamedTuple):
    """One row of a dot plot: the seeds (n,), then center and ends of an interval (3,); NaN where there is none."""

    name: str
    seeds: np.ndarray
    interval: np.ndarray
    text: str
    color: str


def label(name: str, width: int = 22) -> str:
    """Wrap a name onto at most two lines, at a separator if possible."""
    if len(name) <= width:
        return name
    cut = max((match.end() for match in re.finditer(r"[+_.,= -]", name[:width])), default=width)
    return f"{name[:cut]}\n{shorten(name[cut:], width)}"


def arms(report: Report, values: pd.DataFrame, unit: Unit) -> Figure | None:
    """Draw one row per arm; None if no cell has finished."""
    if values.isna().all(axis=None):
        return None
    rows, planned = [], len(report["seeds"])
    for name, arm in report["arms"].items():
        text = unit.number(arm["mean"]) + (f" ± {unit.number(arm['sd'])}" if arm["sd"] is not None else "")
        if arm["n"] < planned:
            text = f"{text}\n{arm['n']} of {planned} seeds" if arm["n"] else "nothing finished"
        color = TEST if not arm["n"] else INK if name == report["baseline"] else VAL
        seeds = values.loc[name].to_numpy() * unit.factor
        rows.append(Row(name, seeds, _interval(arm, "mean", "ci", unit), text, color))
    return _dot_plot(rows, unit.axis(report["metric"]), strong=report["baseline"])


def differences(report: Report, values: pd.DataFrame, unit: Unit) -> Figure | None:
    """Draw one row per arm except the baseline; None if no seed can be compared."""
    paired = (values - values.loc[report["baseline"]]) * unit.factor
    rows = []
    for name, arm in report["arms"].items():
        if name != report["baseline"]:
            compared = arm["delta"] is not None  # else trained on other data
            seeds = paired.loc[name].to_numpy() if compared else np.full(len(paired.columns), np.nan)
            text = f"{unit.signed(arm['delta'])} " * compared + (arm["verdict"] or "no verdict")
            rows.append(Row(name, seeds, _interval(arm, "delta", "delta_ci", unit), text, COLORS[arm["verdict"]]))
    if np.isnan([row.seeds for row in rows]).all():
        return None
    xlabel = f"{report['metric']}: difference from {shorten(report['baseline'], 24)}{unit.difference_unit}"
    return _dot_plot(rows, xlabel, margin=(report["margin"] or 0) * unit.factor)


def effects(report: Report, unit: Unit) -> Figure | None:
    """Draw one row per main effect, then one per interaction; None unless the study has a complete grid."""
    rows = []
    for effect in (*report.get("effects", []), *report.get("interactions", [])):
        name = " × ".join(f"{factor.rpartition('.')[2]}: {a} → {b}" for factor, a, b in effect["levels"])
        color = VAL if len(effect["levels"]) == 1 else MUTED
        text = unit.signed(effect["delta"])
        rows.append(Row(name, np.empty(0), _interval(effect, "delta", "ci", unit), text, color))
    return _dot_plot(rows, f"{report['metric']}: effect{unit.difference_unit}", margin=0) if rows else None


def _interval(group: Mapping[str, Any], center: str, ends: str, unit: Unit) -> np.ndarray:
    return np.array([group[center], group[f"{ends}_low"], group[f"{ends}_high"]], float) * unit.factor


def _dot_plot(rows: Sequence[Row], xlabel: str, strong: str = "", margin: float | None = None) -> Figure:
    """Draw rows, the first on top; the name of row `strong` is bold.

    With a margin, 0 is marked, and the band within ±margin. The x axis fits all seeds, and the intervals only as far as
    the seeds stay readable.
    """
    figure = Figure(figsize=(WIDTH, ROW * len(rows) + 0.75), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(rows)), [label(row.name) for row in rows], fontsize=9, linespacing=0.95)
    for tick, row in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set(color=INK, weight="bold" if row.name == strong else "normal")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    intervals = np.stack([row.interval for row in rows])
    marks = [] if margin is None else [-margin, 0, margin]
    ax.set_xlim(*_limits(np.concatenate([intervals[:, 0], marks, *(row.seeds for row in rows)]), intervals))
    if margin is not None:
        ax.axvspan(-margin, margin, color="#DDDDDD", alpha=0.6, lw=0, zorder=0)
        ax.axvline(0, color=INK, lw=1, zorder=1)
    for i, row in enumerate(rows):
        _draw_row(ax, i, row)
    ax.set_xlabel(xlabel)
    return figure


def _limits(points: np.ndarray, intervals: np.ndarray) -> tuple[float, float]:
    """Return axis limits that hold all points, and intervals (n, 3) up to 1.2 times the points' range beyond them."""
    low, high = np.nanmin(points), np.nanmax(points)
    room = 1.2 * (high - low) or 0.01 * abs(high) or 1.0
    ends = intervals[np.isfinite(intervals).all(1)]
    if len(ends):
        low, high = min(low, max(ends.min(), low - room)), max(high, min(ends.max(), high + room))
    pad = 0.05 * (high - low) or room
    return low - pad, high + pad


def _draw_row(ax: Axes, y: int, row: Row) -> None:
    """Draw seeds as dots, one below the other, and the interval; an arrow marks an end outside the axis."""
    center, low, high = row.interval
    spread = 0.22 if len(row.seeds) > 1 else 0
    heights = y + np.linspace(-spread, spread, len(row.seeds))
    ax.plot(row.seeds, heights, "o", color=row.color, ms=4, alpha=0.45, mew=0, zorder=2)
    left, right = ax.get_xlim()
    ax.plot(np.clip([low, high], left, right), [y, y], color=row.color, lw=2, zorder=3)
    for outside, edge, arrow in ((low < left, left, "<"), (high > right, right, ">")):
        if outside:
            ax.plot(edge, y, arrow, color=row.color, ms=7, clip_on=False, zorder=4)
    ax.plot(center, y, "D", color=row.color, ms=6.5, mec="white", zorder=5)
    style: dict[str, Any] = {"va": "center", "fontsize": 9, "weight": "bold", "linespacing": 0.95}
    ax.text(1.04, y, row.text, transform=ax.get_yaxis_transform(), color=row.color, **style)


def learning_curves(report: Report, curves: Mapping[str, pd.DataFrame], unit: Unit) -> Figure | None:
    """Draw all arms in one picture, or many arms in one panel each with the baseline; None without curves."""
    if not curves:
        return None
    ends = {frame.index.max() for frame in curves.values()}
    if len(ends) > 1:  # batch sizes or training lengths differ
        curves = {name: frame.set_axis(100 * frame.index / frame.index.max()) for name, frame in curves.items()}
    clock = "training progress (%)" if len(ends) > 1 else "optimizer step"
    curves = {name: frame * unit.factor for name, frame in curves.items()}
    return (_together if len(report["arms"]) <= 1 + len(LINES) else _panels)(report, curves, unit, clock)


def _together(report: Report, curves: Mapping[str, pd.DataFrame], unit: Unit, clock: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    ax = figure.subplots()
    colors = dict(zip([name for name in report["arms"] if name != report["baseline"]], LINES, strict=False))
    colors[report["baseline"]] = INK
    _frame(ax, curves, unit, 6)
    for name, frame in curves.items():
        _curve(ax, frame, colors[name])
    _end_labels(ax, [(f.mean(axis=1).iloc[-1], label(name, 18), colors[name]) for name, f in curves.items()])
    if lacking := [name for name in report["arms"] if name not in curves]:
        ax.set_title(f"nothing finished: {shorten(', '.join(lacking), 60)}", fontsize=9, color=TEST, weight="normal")
    ax.set(xlabel=clock, ylabel=unit.axis(report["curve"]))
    return figure


def _panels(report: Report, curves: Mapping[str, pd.DataFrame], unit: Unit, clock: str) -> Figure:
    names = [name for name in report["arms"] if name != report["baseline"]]
    rows = -(-len(names) // 3)
    # Sized in inches and without shared axes: with 40 panels, matplotlib's layout engine takes longer than all else.
    height = 1.5 * rows + 0.9
    figure = Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(0.11, 0.55 / height, 0.99, 1 - 0.65 / height, wspace=0.08, hspace=0.42)
    for i, name in enumerate(names):
        ax = figure.add_subplot(rows, 3, i + 1)
        _frame(ax, curves, unit, 3)
        for arm, color in ((report["baseline"], MUTED), (name, VAL)):
            if arm in curves:
                _curve(ax, curves[arm], color)
        ax.set_title(label(name, 22), fontsize=7.5, linespacing=0.95, color=INK if name in curves else TEST)
        if name not in curves:
            ax.text(0.5, 0.3, "nothing finished", transform=ax.transAxes, ha="center", color=TEST, fontsize=9)
        ax.tick_params(labelsize=8, labelleft=i % 3 == 0, labelbottom=i + 3 >= len(names))
    title = f"{unit.axis(report['curve'])} by {clock}; grey: {shorten(report['baseline'], 30)}"
    figure.suptitle(title, x=0.01, y=1 - 0.06 / height, va="top", ha="left", fontsize=9, color=MUTED)
    return figure


def _frame(ax: Axes, curves: Mapping[str, pd.DataFrame], unit: Unit, ticks: int) -> None:
    """Fit the axes to all curves after the first tenth of training, in which values are far off."""
    late = [frame.loc[frame.index >= 0.1 * frame.index.max()].to_numpy().ravel() for frame in curves.values()]
    low, high = np.nanmin(np.concatenate(late)), np.nanmax(np.concatenate(late))
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1
    ax.set_ylim(low - pad, min(high + pad, 100.5) if unit.percent else high + pad)
    first, last = min(f.index.min() for f in curves.values()), max(f.index.max() for f in curves.values())
    ax.set_xlim(first - 0.015 * (last - first) - 1e-9, last + 0.015 * (last - first) + 1e-9)
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_locator(MaxNLocator(5))


def _curve(ax: Axes, frame: pd.DataFrame, color: str) -> None:
    steps, mean = frame.index.to_numpy(), frame.mean(axis=1).to_numpy()
    ax.fill_between(steps, frame.min(axis=1), frame.max(axis=1), color=color, alpha=0.18, lw=0)
    ax.plot(steps, mean, color=color, lw=1.8, marker="o" if len(steps) <= 15 else "", ms=3)


def cost(report: Report, unit: Unit) -> Figure | None:
    """Draw the metric against the mean wall time of a cell, with every arm labeled; None if no arm has both."""
    timed = {n: a for n, a in report["arms"].items() if a["mean"] is not None and a["wall_seconds"]}
    if not timed:
        return None
    seconds = np.array([arm["wall_seconds"] for arm in timed.values()])
    units = [(3600, "hours"), (60, "minutes"), (1, "seconds")]
    scale, clock = next((unit for unit in units if seconds.max() >= 2 * unit[0]), units[-1])
    figure = Figure(figsize=(WIDTH, max(3.0, 0.3 * len(timed) + 0.8)), layout="constrained")
    ax = figure.subplots()
    rows = np.stack([_interval(arm, "mean", "ci", unit) for arm in timed.values()])
    ax.set_ylim(*_limits(rows[:, 0], rows))
    x = seconds / scale
    ax.set_xlim(x.min() / 1.3, x.max() * 1.3)
    if x.max() > 10 * x.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    places = ax.transAxes.inverted().transform(ax.transData.transform(np.stack([x, rows[:, 0]], axis=1)))
    spots = _spread(places[:, 1], 1 / max(9.0, len(timed) + 0.5))
    for i, name in enumerate(timed):
        color = INK if name == report["baseline"] else VAL
        ax.vlines(x[i], *rows[i, 1:], color=color, lw=1.4, alpha=0.7)  # nothing where there is no interval
        ax.plot(x[i], rows[i, 0], "D", color=color, ms=6.5, mec="white", zorder=5)
        leader = [places[i, 0], 1.03], [places[i, 1], spots[i]]
        ax.plot(*leader, color="#C8C8C8", lw=0.7, transform=ax.transAxes, clip_on=False, zorder=1)
        text = label(name, 20) if len(timed) < 9 else shorten(name, 40)
        ax.text(1.04, spots[i], text, transform=ax.transAxes, va="center", fontsize=9, color=color, linespacing=0.95)
    ax.set(xlabel=f"wall time per cell ({clock})", ylabel=unit.axis(report["metric"]))
    return figure
