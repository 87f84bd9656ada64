"""How often a cross-validation of two equally good classifiers says "better" or "worse": paired and corrected t test.

    python benchmarks/fold_verdicts.py [--repetitions 1000]

Two classes of 10-dimensional normal images; each arm sees another half of the dimensions, so neither is better in
expectation. The classifier is the nearest neighbor, whose errors depend strongly on the training images.
"""

import argparse

import numpy as np

from reslab.ablation.statistics import Test, compare


def accuracies(rng: np.random.Generator, images: int, folds: int) -> tuple[list[float], list[float]]:
    """Return the validation accuracy of both arms in every fold."""
    labels = rng.integers(0, 2, images)
    x = rng.standard_normal((images, 10)) + 0.6 * (2 * labels[:, None] - 1)
    fold = rng.integers(0, folds, images)
    arms: tuple[list[float], list[float]] = ([], [])
    for k in range(folds):
        train, held_out = fold != k, fold == k
        for half, values in zip((slice(0, 5), slice(5, 10)), arms, strict=True):
            distance = ((x[held_out][:, None, half] - x[train][None, :, half]) ** 2).sum(2)
            values.append(float((labels[train][distance.argmin(1)] == labels[held_out]).mean()))
    return arms


def false_verdicts(test: Test, images: int, folds: int, repetitions: int, seed: int = 0) -> float:
    """Return the share of cross-validations that find one arm better."""
    rng = np.random.default_rng(seed)
    wrong = 0
    for _ in range(repetitions):
        baseline, arm = accuracies(rng, images, folds)
        wrong += compare(baseline, {"arm": arm}, test=test)["arm"].verdict in ("better", "worse")
    return wrong / repetitions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    repetitions = parser.parse_args().repetitions
    print("| folds | images | paired | corrected |\n|---|---|---|---|")
    for folds in (3, 5, 10):
        for images in (100, 300):
            shares = [false_verdicts(test, images, folds, repetitions) for test in ("paired", "folds")]
            print(f"| {folds} | {images} |", " | ".join(f"{100 * share:.1f} %" for share in shares), "|", flush=True)
