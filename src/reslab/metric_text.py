"""Metrics as readers see them: names, values, the most important one, and 95 % intervals. No torch at import."""

from collections.abc import Iterable

SPLIT_LABELS = {"train": "training", "val": "validation"}
METRIC_LABELS = {"acc": "accuracy", "acc5": "top-5 accuracy"}


def is_accuracy(name: str) -> bool:
    """Return whether a metric, with or without its split, is shown in percent: acc, acc5, val/acc."""
    return name.rpartition("/")[2].startswith("acc")


def label(name: str) -> str:
    """Return a metric's name for readers: `validation top-5 accuracy` for val/acc5."""
    split, _, metric = name.partition("/")
    return f"{SPLIT_LABELS.get(split, split)} {METRIC_LABELS.get(metric, metric.replace('_', ' '))}"


def formatted(name: str, value: float) -> str:
    """Format a metric's value: accuracies in percent."""
    return f"{100 * value:.2f} %" if is_accuracy(name) else f"{value:.4f}"


def main_metric(names: Iterable[str], split: str) -> str | None:
    """Return the most important metric of a split: the accuracy, else the first that is not a loss, else the first."""
    of_split = [name for name in names if name.startswith(f"{split}/")]
    if f"{split}/acc" in of_split:
        return f"{split}/acc"
    return next((name for name in of_split if not name.endswith("loss")), next(iter(of_split), None))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a binomial proportion (Wilson 1927); valid at 0 and 1 and for small n too."""
    z, p = 1.959964, successes / n
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return max((centre - half) / (1 + z**2 / n), 0.0), min((centre + half) / (1 + z**2 / n), 1.0)


def interval(name: str, value: float, n: int) -> str:
    """Return the 95 % interval of an accuracy over `n` images as text; "" for any other metric."""
    bounds = accuracy_bounds(name, value, n)
    return f"(95 % interval {100 * bounds[0]:.2f}–{100 * bounds[1]:.2f} %, n = {n:,})" if bounds else ""


def accuracy_bounds(name: str, value: float, n: int) -> tuple[float, float] | None:
    """Return the 95 % interval of an accuracy over `n` images; None for any other metric.

    A metric whose name begins with `acc` may be another kind of mean, such as the mean over classes: only a share of
    the `n` images has this interval. A float32 value is exact to about 1e-7.
    """
    correct = round(value * n) if is_accuracy(name) and 0 <= value <= 1 else -1
    if not n or correct < 0 or abs(value * n - correct) > 0.01 + 1e-7 * n:
        return None
    return wilson(correct, n)
