"""Figures of a study: arms, differences, learning curves, cost. Imports no torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from reslab.ablation.wording import Unit
from reslab.runs.figures import INK, MUTED, STYLE, TEST, VAL, WIDTH, _save, _spread, shorten

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
    """Draw all figures that have data into `folder`, remove the others, and return the paths of the PNGs.

    Args:
        report: Content of report.json.
        values: The metric with one row per arm and one column per seed; NaN where there is none.
        curves: The logged metric by arm, with one row per step and one column per seed.
        folder: Output directory, created if missing.
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


def label(name: str, width: int = 22) -> str:
    """Wrap a name onto at most two lines, at a separator if possible."""
    if len(name) <= width:
        return name
    cuts = [match.end() for match in re.finditer(r"[+_.,= -]", name[:width])]
    cut = cuts[-1] if cuts else width
    return f"{name[:cut]}\n{shorten(name[cut:], width)}"


def arms(report: Report, values: pd.DataFrame, unit: Unit) -> Figure | None:
    """Draw one row per arm; None if no cell has finished."""
    if values.isna().all(axis=None):
        return None
    names, points = list(report["arms"]), values.to_numpy() * unit.factor
    intervals = _intervals(report["arms"].values(), "mean", "ci", unit)
    figure, ax = _rows(names, report["baseline"], points, intervals)
    for row, (name, arm) in enumerate(report["arms"].items()):
        color = INK if name == report["baseline"] else VAL
        _row(ax, row, points[row], intervals[row], color)
        _beside(ax, row, _mean_and_sd(arm, unit, len(report["seeds"])), color if arm["n"] else TEST)
    ax.set_xlabel(unit.axis(report["metric"]))
    return figure


def _mean_and_sd(arm: Mapping[str, Any], unit: Unit, planned: int) -> str:
    if not arm["n"]:
        return "nothing finished"
    text = unit.number(arm["mean"]) + (f" ± {unit.number(arm['sd'])}" if arm["sd"] is not None else "")
    return text if arm["n"] == planned else f"{text}\n{arm['n']} of {planned} seeds"


def differences(report: Report, values: pd.DataFrame, unit: Unit) -> Figure | None:
    """Draw one row per arm except the baseline; None if no seed can be compared."""
    others = {name: arm for name, arm in report["arms"].items() if name != report["baseline"]}
    paired = (values - values.loc[report["baseline"]]).loc[list(others)]
    paired.loc[[name for name, arm in others.items() if arm["delta"] is None]] = np.nan  # trained on other data
    if paired.isna().all(axis=None):
        return None
    points, intervals = paired.to_numpy() * unit.factor, _intervals(others.values(), "delta", "delta_ci", unit)
    margin = (report["margin"] or 0) * unit.factor
    figure, ax = _rows(list(others), None, np.append(points, [-margin, 0, margin]), intervals)
    if margin:
        ax.axvspan(-margin, margin, color="#DDDDDD", alpha=0.6, lw=0, zorder=0)
    ax.axvline(0, color=INK, lw=1, zorder=1)
    for row, arm in enumerate(others.values()):
        color, verdict = COLORS[arm["verdict"]], arm["verdict"] or "no verdict"
        _row(ax, row, points[row], intervals[row], color)
        _beside(ax, row, verdict if arm["delta"] is None else f"{unit.signed(arm['delta'])} {verdict}", color)
    ax.set_xlabel(f"{report['metric']}: difference from {shorten(report['baseline'], 24)}{unit.difference_unit}")
    return figure


def effects(report: Report, unit: Unit) -> Figure | None:
    """Draw one row per main effect, then one per interaction; None unless the study has a complete grid."""
    both = [*report.get("effects", []), *report.get("interactions", [])]
    if not both:
        return None
    names = [" × ".join(f"{factor.rpartition('.')[2]}: {a} → {b}" for factor, a, b in e["levels"]) for e in both]
    intervals = _intervals(both, "delta", "ci", unit)
    figure, ax = _rows(names, None, np.append(intervals[:, 0], 0), intervals)
    ax.axvline(0, color=INK, lw=1, zorder=1)
    for row, effect in enumerate(both):
        color = VAL if len(effect["levels"]) == 1 else MUTED
        _row(ax, row, np.empty(0), intervals[row], color)
        _beside(ax, row, unit.signed(effect["delta"]), color)
    ax.set_xlabel(f"{report['metric']}: effect{unit.difference_unit}")
    return figure


def _intervals(groups: Iterable[Mapping[str, Any]], center: str, ends: str, unit: Unit) -> np.ndarray:
    """Return center, low and high end of each group (n, 3), NaN where there is none."""
    return np.array([(g[center], g[f"{ends}_low"], g[f"{ends}_high"]) for g in groups], float) * unit.factor


def _rows(names: Sequence[str], strong: str | None, points: np.ndarray, intervals: np.ndarray) -> tuple[Figure, Axes]:
    """Return axes with an empty row for each name, the first on top.

    The x axis fits all points, and the intervals (n, 3) only as far as the points stay readable.
    """
    figure = Figure(figsize=(WIDTH, ROW * len(names) + 0.75), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(names)), [label(name) for name in names], fontsize=9, linespacing=0.95)
    for tick, name in zip(ax.get_yticklabels(), names, strict=True):
        tick.set(color=INK, weight="bold" if name == strong else "normal")
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xlim(*_limits(points, intervals, 1.2))
    return figure, ax


def _limits(points: np.ndarray, intervals: np.ndarray, stretch: float) -> tuple[float, float]:
    """Return axis limits that hold all points, and intervals up to `stretch` times the points' range beyond them."""
    low, high = np.nanmin(points), np.nanmax(points)
    room = stretch * (high - low) or 0.01 * abs(high) or 1.0
    ends = intervals[np.isfinite(intervals).all(1)]
    if len(ends):
        low, high = min(low, max(ends.min(), low - room)), max(high, min(ends.max(), high + room))
    pad = 0.05 * (high - low) or room
    return low - pad, high + pad


def _row(ax: Axes, row: int, points: np.ndarray, interval: np.ndarray, color: str) -> None:
    """Draw seeds (n,) as dots, one below the other, and an interval (3,); an arrow marks an end outside the axis."""
    center, low, high = interval
    heights = row + np.linspace(-0.22, 0.22, len(points)) if len(points) > 1 else np.full(len(points), row)
    ax.plot(points, heights, "o", color=color, ms=4, alpha=0.45, mew=0, zorder=2)
    if np.isfinite([low, high]).all():
        left, right = ax.get_xlim()
        ax.plot([max(low, left), min(high, right)], [row, row], color=color, lw=2, zorder=3)
        for outside, edge, arrow in ((low < left, left, "<"), (high > right, right, ">")):
            if outside:
                ax.plot(edge, row, arrow, color=color, ms=7, clip_on=False, zorder=4)
    ax.plot(center, row, "D", color=color, ms=6.5, mec="white", zorder=5)


def _beside(ax: Axes, row: int, text: str, color: str) -> None:
    place = ax.get_yaxis_transform()
    ax.text(1.04, row, text, transform=place, va="center", fontsize=9, color=color, weight="bold", linespacing=0.95)


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
    ends = {name: frame.mean(axis=1).iloc[-1] for name, frame in curves.items()}
    heights = ax.transAxes.inverted().transform(ax.transData.transform([(0, y) for y in ends.values()]))[:, 1]
    style: dict[str, Any] = {"va": "center", "fontsize": 9, "weight": "bold", "linespacing": 0.95}
    for name, height in zip(ends, _spread(heights, 0.11), strict=True):
        ax.text(1.03, height, label(name, 18), transform=ax.transAxes, color=colors[name], **style)
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
    rows = _intervals(timed.values(), "mean", "ci", unit)
    ax.set_ylim(*_limits(rows[:, 0], rows, 1.0))
    x, log = seconds / scale, seconds.max() > 10 * seconds.min()
    pad = 0.08 * np.ptp(x) or 0.05 * x.max()
    ax.set_xlim(x.min() / 1.3 if log else x.min() - pad, x.max() * 1.3 if log else x.max() + pad)
    if log:
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
