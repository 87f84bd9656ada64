"""Figures of a run, drawn from its run directory: curves, confusions, mistakes, reliability. No torch at import."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from reslab.metric_text import is_accuracy, wilson
from reslab.runs.folder import RunFolder
from reslab.runs.metrics import Metrics, read_metrics
from reslab.runs.predictions import Predictions, calibrate, confusion_counts, most_confused, read_predictions

# Okabe and Ito's colour-blind safe palette: one meaning per colour, in every figure.
TRAIN, VAL, TEST, INK, MUTED = "#8C8C8C", "#0072B2", "#D55E00", "#222222", "#6B6B6B"
COLORS = {"train": TRAIN, "val": VAL, "test": TEST}
WIDTH = 5.6  # inches: 10 pt text stays readable on a phone 360 px wide
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class name may hold a dollar sign
    "font.size": 10, "text.color": INK, "lines.solid_capstyle": "round", "savefig.dpi": 150, "figure.titlesize": 11,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": MUTED,
    "axes.edgecolor": "#B0B0B0", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#EBEBEB",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip
CAPTIONS = {
    "learning_curves": "Loss and metrics over training; the diamond is the single evaluation on the test set.",
    "learning_rate": "The learning rate at every logged step.",
    "confusion": "Predicted classes of the test images, by true class.",
    "mistakes": "The most confident wrong predictions: unusual images, wrong labels, or blind spots of the network.",
    "reliability": "Are predictions of 80 % confidence right 80 % of the time? Below the dashed line: over-confident.",
}
MOST_PANELS = 6  # of the learning curves

Images = np.ndarray | Callable[[int], np.ndarray]


def shorten(name: str, length: int = 18) -> str:
    """Shorten a name to one line of at most `length` characters."""
    line = " ".join(name.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def draw_figures(run_dir: Path, class_names: Sequence[str], images: Images) -> list[Path]:
    """Draw the figures that metrics.csv and predictions.npz have data for into figures/, and return their paths.

    `class_names` (K,); `images` uint8 (M, H, W, C), or a function from a test index to one image (H, W, C).
    An existing figure without data is removed.
    """
    folder, predictions = RunFolder(run_dir), read_predictions(run_dir)
    metrics = read_metrics(folder.metrics)
    folder.figures.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        figures = {"learning_curves": learning_curves(metrics)}
        if "lr" in metrics:
            figures["learning_rate"] = learning_rate(*metrics["lr"])
        if predictions is not None:
            figures["confusion"] = confusion(predictions, class_names)
            figures["mistakes"] = mistakes(predictions, class_names, images)
            figures["reliability"] = reliability(predictions)
        return [path for name in CAPTIONS for path in _save(figures.get(name), folder.figures / f"{name}.png")]


def draw_lr(steps: Sequence[float], lrs: Sequence[float], path: Path) -> None:
    """Draw a schedule, learning rates (n,) at optimizer steps (n,), n ≥ 1, as a PNG."""
    with mpl.rc_context(STYLE):
        _save(learning_rate(np.asarray(steps, float), np.asarray(lrs, float)), path)


def draw_lr_range(
    rates: Sequence[float], losses: Sequence[float], smooth: np.ndarray, suggested: float | None, path: Path
) -> None:
    """Draw the losses (n,) of a range test, n ≥ 1, over the learning rates (n,), and the suggested rate, as a PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        ax = figure.subplots()
        ax.plot(rates, losses, color=TRAIN, lw=0.7, alpha=0.6)
        ax.plot(rates, smooth, color=VAL, lw=1.8, marker="o" if len(rates) == 1 else "")
        title = "Training loss in the range test"
        if suggested is not None:
            ax.axvline(suggested, color=TEST, lw=1.2, ls="--")
            title += f": suggested rate {suggested:.2g}"
        ax.set_title(title)
        ax.set_xscale("log")
        ax.set_xlabel("learning rate (log scale)")
        ax.xaxis.set_major_formatter("{x:g}")
        low, high = float(np.min(losses)), max(smooth[0], float(np.quantile(losses, 0.9)))
        ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low) or None)
        figure.savefig(path)


def draw_grid(images: np.ndarray, path: Path, titles: Sequence[str] = (), row_titles: Sequence[str] = ()) -> None:
    """Draw uint8 images (R, C, H, W, Ch), Ch 1 or 3, as a PNG with one title per column and row."""
    rows, columns, height, width, _ = images.shape
    cell = max(0.75, WIDTH / columns)  # inches
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(columns * cell, rows * cell * height / width), layout="compressed")
        axes = figure.subplots(rows, columns, squeeze=False)
        for place, ax in np.ndenumerate(axes):
            _show(ax, images[place])
        for ax, title in zip(axes[0], titles, strict=False):
            ax.set_title(shorten(title, 13), fontsize=9, loc="center", weight="normal")
        for ax, title in zip(axes[:, 0], row_titles, strict=False):
            ax.set_ylabel(shorten(title), fontsize=9, rotation=0, ha="right", va="center")
        figure.savefig(path, bbox_inches="tight")


def _save(figure: Figure | None, path: Path) -> list[Path]:
    if figure is None:
        path.unlink(missing_ok=True)
        return []
    figure.savefig(path)
    return [path]


def learning_curves(metrics: Metrics) -> Figure | None:
    """Draw loss, accuracy and further validation metrics against the optimizer step, one panel each."""
    validated = [name.removeprefix("val/") for name in metrics if name.startswith("val/")]
    names = list(dict.fromkeys(["loss", "acc", *validated]))[:MOST_PANELS]
    panels = [name for name in names if any(f"{split}/{name}" in metrics for split in COLORS)]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 2.8 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, name in zip(axes, panels, strict=True):
        _panel(ax, metrics, name)
    _steps(axes[-1])
    return figure


def _steps(ax: Axes) -> None:
    ax.set_xlabel("optimizer step")
    ax.margins(x=0.015)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _panel(ax: Axes, metrics: Metrics, name: str) -> None:
    """Draw a metric of every split that logged it, with its last value to the right of the axes."""
    percent, title = is_accuracy(name), {"loss": "Loss", "acc": "Accuracy"}.get(name, name)
    ax.set_title(f"{title} (%)" if percent else title)
    scale, unit = (100, ".1f") if percent else (1, "#.3g")
    splits = [split for split in COLORS if f"{split}/{name}" in metrics]
    drawn = [_plot(ax, split, *metrics[f"{split}/{name}"], scale) for split in splits]
    _limits(ax, np.concatenate(drawn), percent)
    ends = zip(splits, (values[-1] for values in drawn), strict=True)
    _end_labels(ax, [(end, f"{split} {end:{unit}}", COLORS[split]) for split, end in ends])


def _plot(ax: Axes, split: str, steps: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Draw one curve, or the single point of the test, and return the values drawn."""
    color, values = COLORS[split], values * scale
    if split == "test":
        ax.plot(steps[-1:], values[-1:], "D", color=color, ms=7, mec="white", zorder=5, clip_on=False)
        return values[-1:]
    window = len(values) // 40  # single batches are noisy: draw a running mean, and the batches faintly behind it
    if window > 1:
        ax.plot(steps, values, color=color, lw=0.7, alpha=0.35)
        ones = np.ones(window)
        values = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    ax.plot(steps, values, color=color, lw=1.8, marker="o" if len(values) <= 40 else "", ms=3.5)
    return values


def _limits(ax: Axes, values: np.ndarray, percent: bool) -> None:
    """Fit the axis to the curves, not to the noise behind them; logarithmic for values of a wide range."""
    low, high = values.min(), values.max()
    if not percent and low > 0 and high > 30 * low:
        ax.set(yscale="log", ylim=(low / 1.3, high * 1.3))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 1
        ax.set_ylim(low - pad, min(high + pad, 100) if percent else high + pad)


def _end_labels(ax: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write the text of each curve, given as (last value, text, colour), at its height to the right of the axes."""
    heights = ax.transAxes.inverted().transform(ax.transData.transform([(0, y) for y, _, _ in labels]))[:, 1]
    for height, (_, text, color) in zip(_spread(heights, 0.1), labels, strict=True):
        ax.text(1.03, height, text, transform=ax.transAxes, va="center", color=color, weight="bold", fontsize=9)


def _spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Move heights (n,) at least `gap` apart, in their order, and none above 1."""
    order, offsets = np.argsort(heights), gap * np.arange(len(heights))
    placed = np.empty_like(heights)
    placed[order] = np.minimum(np.maximum.accumulate(heights[order] - offsets) + offsets, 1 - offsets[::-1])
    return placed


def learning_rate(steps: np.ndarray, lrs: np.ndarray) -> Figure:
    """Draw the learning rate (n,) against the optimizer step (n,), n ≥ 1, with its peak in the title."""
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    ax = figure.subplots()
    ax.plot(steps, lrs, color=VAL, lw=1.8, marker="o" if len(steps) == 1 else "")
    peak = int(np.argmax(lrs))
    ax.set_title(f"Learning rate: peak {lrs[peak]:.4g} at step {steps[peak]:,.0f}")
    ax.set_ylim(0, 1.1 * max(lrs[peak], 1e-12))
    _steps(ax)
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter("{x:g}")
    return figure


def confusion(predictions: Predictions, class_names: Sequence[str]) -> Figure | None:
    """Draw the confusion matrix; above 30 classes, where it is unreadable, the most confused pairs instead."""
    k, diagonal = len(class_names), np.eye(len(class_names), dtype=bool)
    counts = confusion_counts(predictions.label, predictions.prediction, k)
    if k > 30:
        return _pairs(counts, class_names)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = share * ~diagonal
    # On one colour scale the diagonal would drown the mistakes: it gets a separate colour.
    tint = np.where(diagonal, share * 0.8, wrong / max(wrong.max(), 0.05) * 0.9)
    hue = np.where(diagonal[..., None], mpl.colors.to_rgb(VAL), mpl.colors.to_rgb(TEST))
    side = max(WIDTH, 0.34 * k + 1.4)
    figure = Figure(figsize=(side, side), layout="constrained")
    ax = figure.subplots()
    ax.imshow(1 - tint[..., None] * (1 - hue))
    for row, column in np.ndindex(k, k):
        color = "white" if tint[row, column] > 0.65 else INK if counts[row, column] else "#B0B0B0"
        ax.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color=color)
    ticks = [shorten(name, 14) for name in class_names]
    ax.set_xticks(range(k), ticks, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(k), ticks)
    ax.set(xlabel="predicted", ylabel="true", frame_on=False)
    ax.set_title(f"Confusion matrix: {np.trace(counts):,} of {counts.sum():,} correct")
    ax.grid(False)
    return figure


def _pairs(counts: np.ndarray, names: Sequence[str], top: int = 20) -> Figure | None:
    pairs = most_confused(counts, top)
    if not pairs:
        return None
    figure = Figure(figsize=(WIDTH, 0.26 * len(pairs) + 1), layout="constrained")
    ax = figure.subplots()
    rows = range(len(pairs))
    bars = ax.barh(rows, [count for _, _, count in pairs], color=TEST, alpha=0.85, height=0.7)
    shares = [f"{count} of {counts[true].sum()}" for true, _, count in pairs]
    ax.bar_label(bars, shares, padding=4, fontsize=9, color=MUTED)
    ax.set_yticks(rows, [f"{shorten(names[t])} → {shorten(names[p])}" for t, p, _ in pairs], fontsize=9)
    ax.set(ylim=(len(pairs) - 0.4, -0.6), xticks=[], frame_on=False)
    figure.suptitle("Most confused: true → predicted", x=0.01, ha="left", weight="bold")
    ax.grid(False)
    return figure


def mistakes(predictions: Predictions, class_names: Sequence[str], images: Images, top: int = 20) -> Figure | None:
    """Draw the `top` most confident mistakes with predicted and true class; None if there is no mistake."""
    wrong = np.flatnonzero(predictions.label != predictions.prediction)
    if not len(wrong):
        return None
    shown = wrong[np.argsort(-np.nan_to_num(predictions.confidence[wrong]), kind="stable")][:top]
    rows = -(-len(shown) // 5)
    height = 1.52 * rows + 0.4
    figure = Figure(figsize=(WIDTH, height))
    figure.suptitle(f"Most confident mistakes: {len(shown)} of {len(wrong):,}", x=0.01, ha="left", weight="bold")
    ax = figure.add_axes((0, 0, 1, 1))  # one for all images, in inches from the top left: 20 axes take half a second
    for cell, i in enumerate(shown):
        x, y = 0.06 + 1.11 * (cell % 5), 0.38 + 1.52 * (cell // 5)
        index = int(predictions.index[i])
        image = images(index) if callable(images) else images[index]
        _show(ax, image, (x, y, 1.04))
        guess, true = class_names[predictions.prediction[i]], class_names[predictions.label[i]]
        notes = (guess, TEST), (f"{100 * predictions.confidence[i]:.1f} %", TEST), (f"true: {true}", MUTED)
        for line, (text, color) in enumerate(notes):
            style: Any = {"color": color, "fontsize": 8, "ha": "center", "va": "top"}
            ax.text(x + 0.52, y + 1.07 + 0.14 * line, shorten(text, 14), **style)
    ax.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
    ax.set_axis_off()
    return figure


def _show(ax: Axes, image: np.ndarray, place: tuple[float, float, float] | None = None) -> None:
    """Show one image, uint8 (H, W, C), C 1 (grey) or 3, alone or at the bottom of a square (left, top, side)."""
    extent = None
    if place:
        left, top, side = place
        high, wide = (side * n / max(image.shape[:2]) for n in image.shape[:2])
        extent = (left + (side - wide) / 2, left + (side + wide) / 2, top + side, top + side - high)
    pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent)
    ax.set(xticks=[], yticks=[], frame_on=False)


def reliability(predictions: Predictions) -> Figure:
    """Draw accuracy against confidence with 95 % intervals, and the number of images, in each of 15 bins."""
    bins = calibrate(predictions.confidence, predictions.label == predictions.prediction)
    n, full = len(bins.count), bins.count > 0
    centres = (np.arange(n) + 0.5) / n
    accuracy, confidence = bins.accuracy[full], bins.confidence[full]
    intervals = [wilson(round(a * count), count) for a, count in zip(accuracy, bins.count[full], strict=True)]
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    top.bar(centres[full], accuracy, 0.92 / n, color=VAL, alpha=0.35)
    ends = np.abs(np.transpose(intervals) - accuracy)
    top.errorbar(confidence, accuracy, ends, fmt="o", color=VAL, ms=4, lw=1.2, clip_on=False)
    top.plot([0, 1], [0, 1], "--", color=MUTED, lw=1)
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    top.set_title(f"Reliability: expected calibration error {100 * bins.ece:.1f} %")
    bottom.bar(centres, bins.count, 0.92 / n, color=MUTED, alpha=0.6)
    bottom.set(xlabel="confidence", ylabel="images")
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    bottom.yaxis.set_major_formatter("{x:,.0f}")
    return figure
