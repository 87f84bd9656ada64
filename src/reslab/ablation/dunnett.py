"""Many-to-one t tests with a variance pooled over all arms, and seeds as blocks (Dunnett 1955).

The model is: value = effect of the arm + effect of the seed + noise of the same spread in every arm. With A arms, the
baseline included, the noise has (A - 1)(n - 1) degrees of freedom, instead of the n - 1 of a paired test.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.polynomial import legendre
from scipy import special

from reslab.ablation.sequential import Bools, Floats

POINTS = 64
X, WEIGHTS = legendre.leggauss(POINTS)
NORMAL, DENSITY = 8 * X, 8 * WEIGHTS * np.exp(-32 * X * X) / math.sqrt(2 * math.pi)  # integrates over N(0, 1)


class Spreads(NamedTuple):
    """How the values of A arms, the baseline first, scatter over n seeds; leading axes are studies."""

    df: int
    sd: Floats  # of the noise, pooled (...)
    correlation: Floats  # between arms over seeds (...); 0: pairing gains nothing. NaN without spread
    ratio: Floats  # spread of each arm's noise relative to the pooled spread of the others (..., A)
    p: Floats  # F test of each ratio, one-sided (..., A)


def spreads(table: Floats) -> Spreads:
    """Return the spreads of values (..., A, n).

    The noise that arm i adds to the residuals has n - 1 degrees of freedom and is independent of the residuals among
    the other arms, with (A - 2)(n - 1), so the ratio of their variances has the F distribution. The correlation is the
    intraclass correlation of a two-way table (Shrout & Fleiss 1979, ICC(3, 1)).
    """
    arms, n = table.shape[-2:]
    of_seed = table.mean(axis=-2, keepdims=True)
    residuals = table - of_seed - table.mean(axis=-1, keepdims=True) + of_seed.mean(axis=-1, keepdims=True)
    sums = (residuals**2).sum(axis=-1)
    df, total = (arms - 1) * (n - 1), sums.sum(axis=-1)
    part, f, p = sums * arms / (arms - 1), np.ones_like(sums), np.ones_like(sums)
    noise, seeds = total / df, arms * of_seed[..., 0, :].var(axis=-1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = (seeds - noise) / (seeds + (arms - 1) * noise)
        if arms > 2:
            f = part * (arms - 2) / (total[..., None] - part)
            p = special.fdtrc(n - 1, (arms - 2) * (n - 1), f)
    return Spreads(df, np.sqrt(noise), correlation, np.sqrt(f.clip(0)), p)


def unequal(spread: Spreads, n: int) -> Bools:
    """Return which arms (..., A) have a spread that forbids pooling the variance; mostly none if spreads are equal.

    A noisy baseline spoils every comparison, and few seeds hardly show it, so the F tests have a high level where there
    are few: 0.25 with 3 seeds, 0.2 with 4, 0.15 with 5 to 7, then 0.1, for the baseline, and the same for all other
    arms together (Bonferroni). With 3 to 21 arms, this limits false verdicts to 6 % whatever the spreads; without it
    they reach 46 %. The price: of studies with equal spreads, a share of about twice the level is refused. Simulated by
    benchmarks/sequential_design.py.
    """
    level = {3: 0.25, 4: 0.2}.get(n, 0.15 if n < 8 else 0.1)
    arms = spread.p.shape[-1]
    return spread.p * np.where(np.arange(arms), arms - 1, 1) < level


@lru_cache(maxsize=256)
def _scales(df: int) -> tuple[Floats, Floats]:
    """Return nodes of S = sqrt(χ²_df / df) and their probabilities."""
    low, high = max(0.0, 1 - 8 / math.sqrt(2 * df)), 1 + 8 / math.sqrt(2 * df)
    s = (low + high) / 2 + (high - low) / 2 * X
    log_density = (df - 1) * np.log(s) - df * s * s / 2
    weights = WEIGHTS * np.exp(log_density - log_density.max())
    return s, weights / weights.sum()


def tail(t: npt.ArrayLike, arms: int, df: int) -> Floats:
    """Return P(max |T_i| >= t) over `arms` comparisons with one baseline, if no arm differs.

    T_i = (X_i - X_0) / (S sqrt(2)) with independent standard normal X and S² = χ²_df / df: a multivariate t
    distribution with correlations 1/2 (Dunnett 1955), integrated over X_0 and S by Gauss's rule.
    """
    s, probabilities = _scales(df)
    reach = math.sqrt(2) * np.asarray(t, float)[..., None, None] * s[:, None]
    inside = special.ndtr(NORMAL + reach) - special.ndtr(NORMAL - reach)
    return np.clip(1 - (inside**arms @ DENSITY) @ probabilities, 0, 1)


def step_down(t: Floats, df: int, family: int) -> Floats:
    """Return adjusted p values of t (A,) (Dunnett & Tamhane 1991); tests left out of the family count as p = 1.

    The largest |t| is compared with the maximum of all m comparisons, the next with that of m - 1, and so on; no p may
    fall below the one before it. NaN stays NaN and counts as 0.
    """
    order = np.argsort(-np.nan_to_num(abs(t)), kind="stable")
    steps = [float(tail(abs(t[i]), family - rank, df)) if t[i] == t[i] else 1.0 for rank, i in enumerate(order)]
    adjusted = np.empty(len(t))
    adjusted[order] = np.maximum.accumulate(steps)
    return np.where(np.isnan(t), np.nan, adjusted)
