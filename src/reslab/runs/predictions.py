"""Predictions of a run's tested weights, and what follows from them. No torch or matplotlib at import."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from reslab.runs.folder import RunFolder


@dataclass(frozen=True)
class Predictions:
    """Predictions of the tested weights for the M test images, ordered by index."""

    index: np.ndarray  # int64 (M,)
    label: np.ndarray  # int64 (M,)
    prediction: np.ndarray  # int64 (M,)
    confidence: np.ndarray  # float (M,), the softmax probability of the predicted class


@dataclass(frozen=True)
class Calibration:
    """Accuracy against confidence in B bins of equal width, and the expected calibration error."""

    count: np.ndarray  # int (B,)
    accuracy: np.ndarray  # (B,), NaN in an empty bin
    confidence: np.ndarray  # mean confidence (B,), NaN in an empty bin
    ece: float


def read_predictions(run_dir: Path) -> Predictions | None:
    """Read predictions.npz; None if there is none, or it holds no classified images."""
    path = RunFolder(run_dir).predictions
    if not path.exists():
        return None
    names = [field.name for field in fields(Predictions)]
    with np.load(path) as arrays:
        if not {*names} <= {*arrays} or not len(arrays["label"]):  # an objective of another kind saves other columns
            return None
        return Predictions(*(arrays[name] for name in names))


def confusion_counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Count predictions in a matrix (num_classes, num_classes): true classes in rows, predicted ones in columns."""
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(counts: np.ndarray, top: int) -> list[tuple[int, int, int]]:
    """Return the `top` most frequent mistakes as (true, predicted, count); ties in class order."""
    wrong = [(int(true), int(guess), int(counts[true, guess])) for true, guess in np.argwhere(counts) if true != guess]
    return sorted(wrong, key=lambda pair: -pair[2])[:top]


def calibrate(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Calibration:
    """Compute the expected calibration error over bins ((b - 1)/B, b/B] (Guo et al. 2017, section 2, equation 3).

    `confidence` (M,) lies in [0, 1], where NaN (from diverged weights) counts as 0; `correct` is bool (M,).
    """
    confidence = np.nan_to_num(confidence.astype(np.float64))
    bin_index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_index, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(bin_index, weights=correct, minlength=bins) / count
        mean = np.bincount(bin_index, weights=confidence, minlength=bins) / count
    ece = float(np.nansum(count * np.abs(accuracy - mean)) / max(len(confidence), 1))
    return Calibration(count, accuracy, mean, ece)
