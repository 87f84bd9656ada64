"""Where the noise of a result comes from: shares of the variance over seeds by source, and that of a finite test set.

A study whose arms fix some of `run.seeds` shows how much the result varies with each source of randomness, as in
Bouthillier et al. 2021 ("Accounting for variance in machine learning benchmarks", arXiv:2103.03098).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from reslab.ablation.study import Study

SOURCES = ("init", "order", "augment", "network")  # of reslab.config.Seeds
ALPHA = 0.05


def sources(
    study: Study, by_seed: Mapping[str, Mapping[int, float]], correct: Callable[[str], Any]
) -> dict[str, dict[str, Any]]:
    """Return the part of the report about noise: by arm, what varies with the seed, and its share of the variance.

    Empty unless the arms differ in `run.seeds` only. `correct` returns which test images each seed of an arm classifies
    correctly, as (images, correct (S, M)), or text.
    """
    varied = _varied(study)
    values = {arm: [v for v in by_seed[arm].values() if np.isfinite(v)] for arm in varied}
    rows = {}
    for arm, names in varied.items():
        rows[arm] = {"varies": names, **variance_share(values[arm], values[study.baseline])}
        outcomes = correct(arm) if study.metric == "test/acc" and len(values[arm]) > 1 else ""
        rows[arm] |= {} if isinstance(outcomes, str) else test_set_noise(outcomes[1])
    return rows


def _varied(study: Study) -> dict[str, list[str]]:
    """Return which sources of randomness vary with the seed in each arm; {} unless all arms differ in that only."""
    changed = [key for arm in study.arms.values() for key, _, _ in arm.changes]
    if not changed or not all(key.startswith("run.seeds.") for key in changed):
        return {}
    fixed = {arm.name: [s for s, seed in _seeds(arm.config).items() if seed is not None] for arm in study.arms.values()}
    return {name: [source for source in SOURCES if source not in fixed[name]] for name in study.arms}


def _seeds(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("run", {}).get("seeds") or {}


def variance_share(values: Sequence[float], all_values: Sequence[float]) -> dict[str, float | None]:
    """Return the variance of an arm's results as a share of the variance with all sources, with a 95 % interval.

    The ratio of two sample variances, divided by the true ratio, has the F distribution of n - 1 and m - 1 degrees of
    freedom (results that are about normal and independent; Snedecor & Cochran 1989, section 6.12).
    """
    x, y = np.asarray(values, float), np.asarray(all_values, float)
    if len(x) < 2 or len(y) < 2 or y.var(ddof=1) == 0:
        return {"share": None, "share_ci_low": None, "share_ci_high": None}
    share = float(x.var(ddof=1) / y.var(ddof=1))
    low, high = special.fdtri(len(x) - 1, len(y) - 1, [ALPHA / 2, 1 - ALPHA / 2])
    return {"share": share, "share_ci_low": share / float(high), "share_ci_high": share / float(low)}


def test_set_noise(correct: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Split the variance of the test accuracy over seeds: noise of the finite test set, and the rest.

    `correct` (S, M) says which of M images each of S seeds classifies correctly. If the images of the test set answer
    independently of each other, the accuracy varies by Σ p(1 - p) / M² although the network's accuracy on the
    distribution of images does not vary at all; p is the share of seeds that are right on an image (Jordan 2023,
    "Calibrated chaos", arXiv:2304.01910). What remains is an estimate of the variance on the distribution, and may be
    negative by chance; its root is taken of at least 0.

    Returns:
        Standard deviations: `sd` over seeds as observed, `finite_test_sd`, and `distribution_sd`.
    """
    seeds, images = correct.shape
    p = correct.mean(axis=0)
    finite = float((p * (1 - p)).sum() * seeds / (seeds - 1) / images**2)  # unbiased
    observed = float(correct.mean(axis=1).var(ddof=1))
    return {"sd": observed**0.5, "finite_test_sd": finite**0.5, "distribution_sd": max(observed - finite, 0) ** 0.5}
