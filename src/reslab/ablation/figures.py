"""The pictures of a study: its arms, their differences, their learning curves, their cost. No torch here."""

import re
from collections.abc import Mapping, Sequence
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

GREEN = "#009E73"
COLORS = {"better": GREEN, "worse": TEST, "equivalent": VAL, "inconclusive": MUTED, None: MUTED}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # more arms than these get a panel each
ROW = 0.4  # inches
CAPTIONS = {
    "arms": "Every arm: its mean (diamond), the 95 % t interval of the mean (bar), and every seed (dot).",
    "differences": "Every arm minus the baseline, seed by seed (dots): the mean difference with its 95 % t interval; "
    "the grey band is the margin within which differences do not matter.",
    "learning_curves": "Training as validation sees it: the mean over the seeds, the band from the lowest to the "
    "highest seed. Finished cells only.",
    "cost": "The metric with its 95 % t interval against what a cell took, on average, by the clock.",
    "effects": "Main effects (blue) and interactions (grey) of the factors, with their 95 % t intervals.",
}
Report = Mapping[str, Any]


def draw_figures(report: Report, values: pd.DataFrame, curves: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Draws what there is into `folder` and returns the PNGs; a figure with nothing to show any more is removed.

    Args:
        report: As in report.json.
        values: The metric, a row an arm and a column a seed; NaN where there is none.
        curves: By arm, what was logged: a row a step and a column a seed.
        folder: It is made if need be.
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
    """A name on at most two lines, parted where its parts meet."""
    if len(name) <= width:
        return name
    cuts = [match.end() for match in re.finditer(r"[+_.,= -]", name[:width])]
    cut = cuts[-1] if cuts else width
    return f"{name[:cut]}\n{shorten(name[cut:], width)}"


def arms(report: Report, values: pd.DataFrame, unit: Unit) -> Figure | None:
    """A row an arm; None where no cell has finished."""
    if values.isna().all(axis=None):
        return None
    figure, ax = _rows(list(report["arms"]), report["baseline"])
    rows = [(arm["mean"], arm["ci_low"], arm["ci_high"]) for arm in report["arms"].values()]
    _window(ax, values.to_numpy() * unit.factor, np.array(rows, float) * unit.factor)
    for row, (name, arm) in enumerate(report["arms"].items()):
        color = INK if name == report["baseline"] else VAL
        _row(ax, row, values.loc[name].to_numpy() * unit.factor, _interval(arm, "mean", "ci", unit), color)
        _beside(ax, row, _mean_and_sd(arm, unit, len(report["seeds"])), color if arm["n"] else TEST)
    ax.set_xlabel(unit.axis(report["metric"]))
    return figure


def _mean_and_sd(arm: Mapping[str, Any], unit: Unit, planned: int) -> str:
    if not arm["n"]:
        return "nothing finished"
    text = unit.number(arm["mean"]) + (f" ± {unit.number(arm['sd'])}" if arm["sd"] is not None else "")
    return text if arm["n"] == planned else f"{text}\n{arm['n']} of {planned} seeds"


def differences(report: Report, values: pd.DataFrame, unit: Unit) -> Figure | None:
    """A row an arm but for the baseline; None where no seed can be compared."""
    others = {name: arm for name, arm in report["arms"].items() if name != report["baseline"]}
    paired = (values - values.loc[report["baseline"]]).loc[list(others)]
    paired.loc[[name for name, arm in others.items() if arm["delta"] is None]] = np.nan  # seen on other data
    if paired.isna().all(axis=None):
        return None
    figure, ax = _rows(list(others), None)
    rows = [(arm["delta"], arm["delta_ci_low"], arm["delta_ci_high"]) for arm in others.values()]
    margin = (report["margin"] or 0) * unit.factor
    _window(ax, np.append(paired.to_numpy() * unit.factor, [-margin, 0, margin]), np.array(rows, float) * unit.factor)
    if margin:
        ax.axvspan(-margin, margin, color="#DDDDDD", alpha=0.6, lw=0, zorder=0)
    ax.axvline(0, color=INK, lw=1, zorder=1)
    for row, (name, arm) in enumerate(others.items()):
        color = COLORS[arm["verdict"]]
        _row(ax, row, paired.loc[name].to_numpy() * unit.factor, _interval(arm, "delta", "delta_ci", unit), color)
        said = arm["verdict"] or "no verdict"
        _beside(ax, row, said if arm["delta"] is None else f"{unit.signed(arm['delta'])} {said}", color)
    ax.set_xlabel(f"{report['metric']}: difference to {shorten(report['baseline'], 24)}{unit.difference_unit}")
    return figure


def _interval(arm: Mapping[str, Any], centre: str, ends: str, unit: Unit) -> np.ndarray:
    """Centre, low and high end (3,), NaN where there is none."""
    return np.array([arm[centre], arm[f"{ends}_low"], arm[f"{ends}_high"]], float) * unit.factor


def _rows(names: Sequence[str], strong: str | None) -> tuple[Figure, Axes]:
    """An empty row for each name, the first on top."""
    figure = Figure(figsize=(WIDTH, ROW * len(names) + 0.75), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(names)), [label(name) for name in names], fontsize=9, linespacing=0.95)
    for tick, name in zip(ax.get_yticklabels(), names, strict=True):
        tick.set(color=INK, weight="bold" if name == strong else "normal")
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return figure, ax


def _window(ax: Axes, points: np.ndarray, intervals: np.ndarray) -> None:
    """Fits the x axis to all points; to the intervals (n, 3) only as far as the points stay readable."""
    low, high = np.nanmin(points), np.nanmax(points)
    room = 1.2 * (high - low) or 0.01 * abs(high) or 1.0
    ends = intervals[np.isfinite(intervals).all(1)]
    if len(ends):
        low, high = min(low, max(ends.min(), low - room)), max(high, min(ends.max(), high + room))
    pad = 0.05 * (high - low) or room
    ax.set_xlim(low - pad, high + pad)


def _row(ax: Axes, row: int, points: np.ndarray, interval: np.ndarray, color: str) -> None:
    """Seeds (n,) as dots, one below the other, and an interval (3,) through them; an arrow where it leaves the axis."""
    centre, low, high = interval
    heights = row + np.linspace(-0.22, 0.22, len(points)) if len(points) > 1 else np.full(len(points), row)
    ax.plot(points, heights, "o", color=color, ms=4, alpha=0.45, mew=0, zorder=2)
    if np.isfinite([low, high]).all():
        left, right = ax.get_xlim()
        ax.plot([max(low, left), min(high, right)], [row, row], color=color, lw=2, zorder=3)
        for outside, edge, arrow in ((low < left, left, "<"), (high > right, right, ">")):
            if outside:
                ax.plot(edge, row, arrow, color=color, ms=7, clip_on=False, zorder=4)
    ax.plot(centre, row, "D", color=color, ms=6.5, mec="white", zorder=5)


def _beside(ax: Axes, row: int, text: str, color: str) -> None:
    place = ax.get_yaxis_transform()
    ax.text(1.04, row, text, transform=place, va="center", fontsize=9, color=color, weight="bold", linespacing=0.95)


def learning_curves(report: Report, curves: Mapping[str, pd.DataFrame], unit: Unit) -> Figure | None:
    """All arms in one picture, or, if they are many, a panel each with the baseline behind; None without curves."""
    if not curves:
        return None
    ends = {frame.index.max() for frame in curves.values()}
    if len(ends) > 1:  # arms of other batch sizes or lengths take other numbers of steps
        curves = {name: frame.set_axis(100 * frame.index / frame.index.max()) for name, frame in curves.items()}
    clock = "share of the training (%)" if len(ends) > 1 else "optimizer step"
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
    # In inches and without shared axes: with 40 panels, matplotlib's layout takes longer than all the rest.
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
    said = f"{unit.axis(report['curve'])} by {clock}; grey: {shorten(report['baseline'], 30)}"
    figure.suptitle(said, x=0.01, y=1 - 0.06 / height, va="top", ha="left", fontsize=9, color=MUTED)
    return figure


def _frame(ax: Axes, curves: Mapping[str, pd.DataFrame], unit: Unit, ticks: int) -> None:
    """Axes that hold all curves; of the first tenth of training, when all are bad, only what fits."""
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
    """The metric against the mean time of a cell, each arm named; None where no arm has both."""
    found = {n: a for n, a in report["arms"].items() if a["mean"] is not None and a["wall_seconds"]}
    if not found:
        return None
    seconds = np.array([arm["wall_seconds"] for arm in found.values()])
    units = [(3600, "hours"), (60, "minutes"), (1, "seconds")]
    scale, clock = next((unit for unit in units if seconds.max() >= 2 * unit[0]), units[-1])
    figure = Figure(figsize=(WIDTH, max(3.0, 0.3 * len(found) + 0.8)), layout="constrained")
    ax = figure.subplots()
    rows = np.array([_interval(arm, "mean", "ci", unit) for arm in found.values()])
    ax.set_ylim(*_limits(rows))
    x, log = seconds / scale, seconds.max() > 10 * seconds.min()
    pad = 0.08 * np.ptp(x) or 0.05 * x.max()
    ax.set_xlim(x.min() / 1.3 if log else x.min() - pad, x.max() * 1.3 if log else x.max() + pad)
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    places = ax.transAxes.inverted().transform(ax.transData.transform(np.stack([x, rows[:, 0]], axis=1)))
    spots = _spread(places[:, 1], 1 / max(9.0, len(found) + 0.5))
    for i, name in enumerate(found):
        color = INK if name == report["baseline"] else VAL
        _cross(ax, x[i], rows[i], color)
        leader = [places[i, 0], 1.03], [places[i, 1], spots[i]]
        ax.plot(*leader, color="#C8C8C8", lw=0.7, transform=ax.transAxes, clip_on=False, zorder=1)
        text = label(name, 20) if len(found) < 9 else shorten(name, 40)
        ax.text(1.04, spots[i], text, transform=ax.transAxes, va="center", fontsize=9, color=color, linespacing=0.95)
    ax.set(xlabel=f"{clock} a cell, by the clock", ylabel=unit.axis(report["metric"]))
    return figure


def _limits(rows: np.ndarray) -> tuple[float, float]:
    """Of the y axis: all means, and intervals as far as the means stay apart. Rows (n, 3) of centre, low, high."""
    low, high = rows[:, 0].min(), rows[:, 0].max()
    room = high - low or 0.01 * abs(high) or 1.0
    ends = rows[np.isfinite(rows).all(1)]
    if len(ends):
        low, high = min(low, max(ends.min(), low - room)), max(high, min(ends.max(), high + room))
    return low - 0.08 * room, high + 0.08 * room


def _cross(ax: Axes, x: float, row: np.ndarray, color: str) -> None:
    if np.isfinite(row).all():
        ax.plot([x, x], row[1:], color=color, lw=1.4, alpha=0.7)
    ax.plot(x, row[0], "D", color=color, ms=6.5, mec="white", zorder=5)


def effects(report: Report, unit: Unit) -> Figure | None:
    """A row a step of a factor, above those of two factors together; None where the study has no (whole) grid."""
    found = [*report.get("effects", []), *report.get("interactions", [])]
    if not found:
        return None
    names = [" × ".join(f"{factor.rpartition('.')[2]}: {a} → {b}" for factor, a, b in e["levels"]) for e in found]
    figure, ax = _rows(names, None)
    intervals = np.array([_interval(e, "delta", "ci", unit) for e in found])
    _window(ax, np.append(intervals[:, 0], 0), intervals)
    ax.axvline(0, color=INK, lw=1, zorder=1)
    for row, (e, interval) in enumerate(zip(found, intervals, strict=True)):
        color = VAL if len(e["levels"]) == 1 else MUTED
        _row(ax, row, np.empty(0), interval, color)
        _beside(ax, row, unit.signed(e["delta"]), color)
    ax.set_xlabel(f"{report['metric']}: effect{unit.difference_unit}")
    return figure
