"""Statistics of an ablation: from results per seed to intervals, differences and verdicts.

Arms are paired by seed, and all tests are Student's t: with 3 seeds, a 95 % percentile-bootstrap interval covers only
73 %, and with 5 seeds no rank test can reach p < .05. A difference is arm minus baseline, in the metric's own unit.
Values the data cannot support are None; `reasons` explains why (`wording.explain` turns them into sentences).
docs/statistics.md describes the methods and what simulations show about them.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import combinations, product
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from reslab.ablation import dunnett, sequential
from reslab.ablation.sequential import ALPHA, MIN_SEEDS, ROUNDING, Floats, Looks, holm

Mode = Literal["max", "min"]
Test = Literal["paired", "pooled", "folds"]
Stopped = Literal["decided", "hopeless", "last look"]
Verdict = Literal["better", "worse", "equivalent", "inconclusive"]
Levels = tuple[tuple[str, str, str], ...]

MAX_SEEDS = 1000  # the most seeds that a recommendation counts
POWER = 0.8
STOPPED: tuple[Stopped | None, ...] = (None, "decided", "hopeless", "last look")  # sequential.Decisions.stopped
BLOCK = 1000  # bootstrap resamples in memory at once


class Why(StrEnum):
    """Why a verdict is refused, inconclusive or qualified."""

    MISSING = "missing"  # `cells` have no result
    DIVERGED = "diverged"  # `cells` have no finite result
    FEW_SEEDS = "few seeds"  # the study has `number` seeds, fewer than MIN_SEEDS
    IDENTICAL = "identical"  # no seed differs
    NO_MARGIN = "no margin"  # with a margin, the arms would be equivalent
    CONSTANT = "constant"  # every seed differs by the same amount, so no test applies
    NEGLIGIBLE = "negligible"  # significant, but within the margin
    MAYBE_NEGLIGIBLE = "maybe negligible"  # significant, but the interval reaches into the margin
    ADJUSTED = "adjusted"  # significant alone, but not among `number` comparisons
    SEPARATE = "separate"  # `number` more seeds would make the difference significant; None: more than MAX_SEEDS
    EQUIVALENCE = "equivalence"  # `number` more seeds would show equivalence; None: more than MAX_SEEDS
    NEXT_LOOK = "next look"  # not decided so far; the next look is at `number` seeds
    LAST_LOOK = "last look"  # not decided at the last look, at `number` seeds
    HOPELESS = "hopeless"  # the chance of a verdict by the last look was `number` percent
    UNEQUAL_SPREADS = "unequal spreads"  # `cells` (arms) spread differently from the others: no pooled variance
    POOLED_LOOKS = "pooled looks"  # the pooled test has no planned looks
    FOLDS = "folds"  # folds share training images: only a study of independent seeds could tell


class Reason(NamedTuple):
    """One reason, with the number or cells it is about."""

    why: Why
    number: int | None = None
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation (n - 1) and t interval of one arm over its seeds; None where n is too small."""

    n: int
    mean: float | None = None
    sd: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One arm compared with the baseline, paired by seed; differences are arm minus baseline."""

    n: int  # seeds that both have
    delta: float | None = None  # mean of the differences
    sd: float | None = None  # of the differences
    delta_ci_low: float | None = None  # interval of the mean difference, not adjusted for the number of arms
    delta_ci_high: float | None = None
    p: float | None = None  # t test, two-sided
    p_holm: float | None = None  # adjusted over the arms (Holm 1979)
    p_equivalence: float | None = None  # two one-sided t tests against ±margin (Schuirmann 1987), adjusted likewise
    hedges_g: float | None = None
    min_detectable_delta: float | None = None
    verdict: Verdict | None = None  # None if it is refused, or a look is still to come
    reasons: tuple[Reason, ...] = ()
    look: int | None = None  # planned looks: number of seeds of the latest one; None before the first
    stopped: Stopped | None = None  # why the arm runs no further; None: without looks, or a look is still to come


@dataclass(frozen=True)
class Effect:
    """Effect of one level, averaged over all other factors, paired by seed.

    A main effect is level minus reference; an interaction is the first factor's effect at the second's level, minus its
    effect at the second's reference.
    """

    levels: Levels  # (factor, reference, level): one for a main effect, two for an interaction
    n: int  # seeds
    delta: float  # mean over the seeds
    sd: float
    ci_low: float | None  # t interval of delta, not adjusted
    ci_high: float | None
    p: float | None  # t test, two-sided
    p_holm: float | None  # adjusted over all main effects, or over all interactions (Holm 1979)


@dataclass(frozen=True)
class Effects:
    """Main effects and pairwise interactions of a factor study; both empty if `reasons` is not."""

    main: list[Effect]
    interactions: list[Effect]
    reasons: tuple[Reason, ...] = ()


def fold_factor(n: int) -> float:
    """Return how much larger the standard error of a mean over n folds is than that over n independent runs.

    Folds share training images, so sd / sqrt(n) is too small. Nadeau & Bengio (2003, "Inference for the generalization
    error", section 3) replace 1/n in the variance of the mean by 1/n + n_test / n_train, here 1/n + 1/(n - 1). This is
    an approximation: no unbiased estimator of that variance exists (Bengio & Grandvalet 2004).
    """
    return math.sqrt(1 + n / (n - 1))


def summarise(values: npt.ArrayLike, test: Test = "paired") -> Summary:
    """Return mean, sd and t interval of finite values (n,); sd and interval require n >= 2. `test`: see `compare`."""
    x = np.asarray(values, float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError("values must be finite, one per seed: leave diverged runs out, and report them")
    if len(x) < 2:
        return Summary(len(x), *x.tolist())
    mean, sd = x.mean(), x.std(ddof=1)
    half = special.stdtrit(len(x) - 1, 1 - ALPHA / 2) * sd / math.sqrt(len(x))
    half *= fold_factor(len(x)) if test == "folds" else 1
    return Summary(len(x), *map(float, (mean, sd, mean - half, mean + half)))


def compare(
    baseline: npt.ArrayLike,
    arms: Mapping[str, npt.ArrayLike],
    margin: float | None = None,
    mode: Mode = "max",
    family: int | None = None,
    looks: Sequence[int] | None = None,
    test: Test = "paired",
) -> dict[str, Comparison]:
    """Compare every arm with the baseline, paired by position; a verdict requires at least 3 seeds.

    `equivalent` comes first: a difference shown to be within ±margin does not matter, even if it is significant.
    Next come `better` and `worse`, by the adjusted p and the sign; all else is `inconclusive`. An arm equal to the
    baseline in every seed is equivalent; one that differs by the same amount in every seed is inconclusive, because the
    metric is then too coarse to show the spread.

    With `looks`, every arm gets the verdict of the first look that decides it (`sequential.decide`); later seeds are
    ignored. p is then the sequential p value, and the interval a repeated confidence interval: mean ± critical value of
    the look · standard error, which covers the true difference at all looks at once with 95 % probability (Jennison &
    Turnbull 1989). The difference itself is optimistic where an arm stopped early.

    With `test="pooled"`, all arms share one variance, and Dunnett & Tamhane's (1991) step-down procedure adjusts p. If
    spreads differ (`dunnett.unequal`), or with planned looks, no arm gets a verdict.

    With `test="folds"`, position k holds the results of fold k of a cross-validation: standard errors are larger by
    `fold_factor`, and the verdicts are approximate.

    Args:
        baseline, arms: Metric (n,), finite, with the seeds in the same order. With `looks`, an arm requires no seeds
            after its stop; a look takes place once all arms that still run have its seeds.
        margin: Differences below it do not matter. None: equivalence is not tested.
        mode: Whether a large ("max") or a small ("min") metric is good.
        family: Number of arms of the study, if more than are passed here; the others count as p = 1.
        looks: Numbers of seeds at which the study is judged, at least 3; the last is the most that will run.
        test: Whether each arm has a variance for itself ("paired") or all share one ("pooled"), or the values are
            those of folds ("folds").

    Raises:
        ValueError: shapes differ, values are not finite, or margin, mode, looks or test is invalid.
    """
    _check(margin, mode, test, looks)
    base, values = _arrays(baseline, arms)
    family = family or len(arms)
    if looks is not None:
        return _compare_at_looks(base, values, _Rules(margin, mode, family, sequential.check_looks(looks), test), {})
    if any(x.shape != base.shape for x in values.values()):
        raise ValueError("baseline and arms must have the same seeds in the same order, unless looks are planned")
    if len(base) < MIN_SEEDS or not values:
        few = (Reason(Why.FEW_SEEDS, len(base)),)
        return {arm: _refused(x - base, few, test) for arm, x in values.items()}
    if test == "pooled":
        return _compare_pooled(base, values, margin, mode, family)
    x = np.array(list(values.values()))
    scale = np.maximum(abs(x).max(axis=1), abs(base).max())
    judged = _judged(_t_tests(x - base, scale, margin, folds=test == "folds"), margin, mode, family)
    return dict(zip(arms, map(_over_folds, judged) if test == "folds" else judged, strict=True))


def _arrays(baseline: npt.ArrayLike, arms: Mapping[str, npt.ArrayLike]) -> tuple[Floats, dict[str, Floats]]:
    base, values = np.asarray(baseline, float), {arm: np.asarray(of, float) for arm, of in arms.items()}
    if any(x.ndim != 1 or not np.isfinite(x).all() for x in (base, *values.values())):
        raise ValueError("baseline and arms must be finite values (n,) of the same seeds in the same order")
    return base, values


def compare_by_seed(
    results: Mapping[str, Mapping[int, float]],
    baseline: str,
    seeds: Sequence[int],
    margin: float | None = None,
    mode: Mode = "max",
    looks: Sequence[int] | None = None,
    test: Test = "paired",
) -> dict[str, Comparison]:
    """`compare` for an unfinished study: an arm gets its verdict once it and the baseline have every seed.

    Missing cells of other arms neither hold it back nor change it later: Holm's adjustment counts all arms of the study
    from the start. A refused arm still gets the difference over its finished seeds, with an interval but without p:
    which seeds are missing may not be chance.

    With planned looks, a look takes place once all arms that still run have its seeds. `ablate run` continues the arms
    whose `stopped` is None up to the next look. A diverged cell ends an arm at its last look before. The pooled test
    waits for every arm of the study, apart from diverged ones.

    Args:
        results: Metric by arm and seed, for every arm of the study. A diverged cell is NaN; one without a result is
            left out.
        baseline: Name of the baseline arm.
        seeds: All seeds of the study; results of other seeds are ignored.
        margin, mode, looks, test: See `compare`.
    """
    _check(margin, mode, test, looks)
    family = [arm for arm in results if arm != baseline]
    if looks is not None:
        rules = _Rules(margin, mode, len(family), sequential.check_looks(looks), test)
        return _by_seed_at_looks(results, baseline, seeds, rules)
    refusals = {arm: _refusal({name: results[name] for name in (baseline, arm)}, seeds) for arm in family}
    whole = _refusal(results, seeds) if test == "pooled" else ()
    if any(reason.why == Why.MISSING for reason in whole):
        refusals = dict.fromkeys(family, whole)  # the pooled variance, and so every verdict, would change
    values = {arm: np.array([of.get(seed, np.nan) for seed in seeds], float) for arm, of in results.items()}
    complete = {arm: values[arm] for arm in family if not refusals[arm]}
    # Without a complete arm the baseline may have holes, which `compare` rejects.
    judged = compare(values[baseline], complete, margin, mode, len(family), test=test) if complete else {}
    for arm in family:
        if arm not in judged:
            differences = values[arm] - values[baseline]
            judged[arm] = _refused(differences[np.isfinite(differences)], refusals[arm], test)
    return {arm: judged[arm] for arm in family}


def hedges_g(delta: Any, sd: Any, n: int) -> Any:
    """Return the difference in standard deviations of the paired differences, without small-sample bias.

    This is g_z: Cohen's d_z = delta / sd (Lakens 2013), times the exact factor of Hedges (1981) for n - 1 degrees of
    freedom; it requires n >= 3. It measures how clearly one seed shows the difference, and is not comparable with
    effect sizes of unpaired studies.
    """
    df = n - 1
    return delta / sd * math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)


def min_detectable_delta(sd: Any, n: int, alpha: float = ALPHA, df: int | None = None) -> Any:
    """Return the smallest true difference that one two-sided paired t test of n seeds finds at 80 % power.

    `sd` is that of the paired differences. By the inverse of the noncentral t distribution (Cohen 1988, ch. 2), without
    the chance of finding the difference with the wrong sign. The sd of few seeds is uncertain, and so is the result.
    `df` are the degrees of freedom of sd, n - 1 by default.
    """
    df = df or n - 1
    return sd * special.nctdtrinc(df, 1 - POWER, -special.stdtrit(df, alpha / 2)) / math.sqrt(n)


def seeds_needed(sd: float, delta: float, alpha: float = ALPHA) -> int | None:
    """Return the fewest seeds whose `min_detectable_delta` is at most |delta|; None if more than MAX_SEEDS."""
    return _fewest_seeds(lambda n: min_detectable_delta(sd, n, alpha) <= abs(delta))


def seeds_needed_for_equivalence(sd: float, delta: float, margin: float, alpha: float = ALPHA) -> int | None:
    """Return the fewest seeds with which two one-sided tests show a true `delta` to be within ±margin at 80 % power.

    This power is a lower bound, from that of the two separate tests. None if more than MAX_SEEDS, or delta is outside.
    """
    if abs(delta) >= margin:
        return None
    distance = np.array([margin - delta, margin + delta]) / sd

    def enough(n: int) -> bool:
        # scipy's noncentral t returns NaN, or takes seconds, where the chance of a miss is negligible.
        misses = special.nctdtr(n - 1, np.minimum(distance * math.sqrt(n), 1000), -special.stdtrit(n - 1, alpha))
        return bool(np.nan_to_num(misses).sum() <= 1 - POWER)

    return _fewest_seeds(enough)


@dataclass(frozen=True)
class Row:
    """What a design does if one arm differs from the baseline by `difference`."""

    difference: float
    power: float  # chance to find the difference, with its sign
    seeds: float  # expected number of seeds of this arm
    decided: float  # chance of any verdict: better, worse or equivalent


@dataclass(frozen=True)
class Design:
    """What a study can find. Every arm counts as one of `arms` at the level alpha / arms, the least that Holm requires.

    So the figures hold whatever the other arms show.
    """

    n: int  # seeds of an arm that is not decided before
    detectable: float  # smallest difference found at 80 % power
    rows: tuple[Row, ...]  # differences of 0, 1, 2 and 3 sd, then the one to find
    seeds_to_find: int | None = None  # seeds (with looks: the last one) that find it at 80 % power; None: > MAX_SEEDS


def design(
    sd: float,
    n: int | None = None,
    arms: int = 1,
    margin: float | None = None,
    looks: Sequence[int] | None = None,
    find: float | None = None,
    replications: int = 4000,
) -> Design:
    """Return the power of a study before it runs: of n seeds, or of planned looks.

    Power, expected seeds and the detectable difference are simulated with `sequential.decide` from a fixed seed; with
    4,000 replications, the standard error of a power is at most 0.8 points.

    Args:
        sd: Standard deviation of the paired differences. Without correlation between arms, sqrt(2) times that of a run.
        n: Number of seeds, at least 3; not used if there are `looks`.
        arms: Number of arms besides the baseline.
        margin, looks: See `compare`.
        find: Difference to find, for `seeds_to_find` and the last row.
    """
    plan = sequential.check_looks(looks or (n or 0,))
    noise = np.random.default_rng(0).standard_normal((replications, plan[-1]))
    simulate = partial(_simulated_row, noise, sd, plan, arms, margin)
    fixed = float(min_detectable_delta(sd, plan[-1], ALPHA / arms))
    low, high = (0.8 * fixed, 2 * fixed) if len(plan) > 1 else (fixed, fixed)
    while high - low > 1e-3 * fixed:
        middle = (low + high) / 2
        low, high = (low, middle) if simulate(middle).power >= POWER else (middle, high)
    rows = tuple(map(simulate, [0.0, sd, 2 * sd, 3 * sd, *([abs(find)] if find else [])]))
    needed = seeds_needed(sd, find, ALPHA / arms) if find else None
    # Power depends on difference² · seeds: looks that find only a larger difference require more seeds by its square.
    return Design(plan[-1], high, rows, needed and math.ceil(needed * (high / fixed) ** 2))


def _simulated_row(noise: Floats, sd: float, looks: Looks, arms: int, margin: float | None, difference: float) -> Row:
    arm = (difference + sd * noise)[:, None]
    decisions = sequential.decide(np.zeros_like(noise), arm, looks, margin, arms)
    larger, decided = (decisions.verdict == sequential.LARGER), decisions.verdict != sequential.NO_VERDICT
    return Row(difference, float(larger.mean()), float(decisions.look.mean()), float(decided.mean()))


def simulated_error(
    looks: Sequence[int], arms: int = 1, margin: float | None = None, replications: int = 20_000
) -> float:
    """Return the chance of a false "better" or "worse" in a study that was judged without a plan after `looks` seeds.

    At every look all arms are tested as if no other look had been (`compare` without looks), and the first verdict
    counts. No arm differs; all are compared with one baseline, without correlation over seeds. The seed is fixed, and
    the standard error is at most 0.4 points with 20,000 replications.

    Args:
        looks: Numbers of seeds at which the study was judged.
        arms: Number of arms besides the baseline.
        margin: In standard deviations of the paired differences. An arm found to be equivalent counts as judged.
    """
    values = np.random.default_rng(0).standard_normal((replications, arms + 1, max(looks)))
    d = (values[:, 1:] - values[:, :1]) / math.sqrt(2)
    judged, wrong = np.zeros((2, *d.shape[:2]), bool)
    for n in sequential.check_looks(sorted(looks)):
        mean, se = d[..., :n].mean(axis=-1), d[..., :n].std(axis=-1, ddof=1) / math.sqrt(n)
        different = holm(2 * special.stdtr(n - 1, -abs(mean) / se), arms) < ALPHA
        shifted = np.inf if margin is None else (abs(mean) - margin) / se
        same = holm(special.stdtr(n - 1, shifted * np.ones_like(se)), arms) < ALPHA
        wrong |= different & ~same & ~judged
        judged |= different | same
    return float(wrong.any(axis=1).mean())


def _fewest_seeds(enough: Callable[[int], bool]) -> int | None:
    n = 2 + bisect_left(range(2, MAX_SEEDS + 1), True, key=enough)
    return n if n <= MAX_SEEDS else None


def factor_effects(
    factors: Mapping[str, Sequence[str]],
    results: Mapping[tuple[str, ...], Mapping[int, float]],
    seeds: Sequence[int],
    test: Test = "paired",
) -> Effects:
    """Return main effects and pairwise interactions of a factor study; refused unless the full grid has results.

    `factors` holds the labels of each factor, first the reference; `results` the metric by labels (one of each factor,
    in their order) and seed, as for `compare_by_seed`. The test by fold is as in `compare`, any other is paired.
    """
    grid = {labels: results.get(labels, {}) for labels in product(*factors.values())}
    if reasons := _refusal({" × ".join(labels): of for labels, of in grid.items()}, seeds):
        return Effects([], [], reasons)
    values = np.array([[of[seed] for seed in seeds] for of in grid.values()])
    values = values.reshape(*(len(labels) for labels in factors.values()), len(seeds))
    return Effects(main_effects(factors, values, test), interactions(factors, values, test))


def main_effects(factors: Mapping[str, Sequence[str]], values: Floats, test: Test = "paired") -> list[Effect]:
    """Compare each level of each factor with its first; `values` has one axis per factor, then one of seeds."""
    steps: dict[Levels, Floats] = {}
    for axis, (name, labels) in enumerate(factors.items()):
        means = values.mean(axis=tuple(other for other in range(len(factors)) if other != axis))  # (labels, seeds)
        for label, mean in zip(labels[1:], means[1:], strict=True):
            steps[((name, labels[0], label),)] = mean - means[0]
    return _effects(steps, abs(values).max(), test)


def interactions(factors: Mapping[str, Sequence[str]], values: Floats, test: Test = "paired") -> list[Effect]:
    """For every two factors and their levels, test how much one's effect depends on the other; `values` as above."""
    steps: dict[Levels, Floats] = {}
    for (i, (first, a)), (j, (second, b)) in combinations(enumerate(factors.items()), 2):
        # (labels of the first, labels of the second, seeds)
        means = values.mean(axis=tuple(other for other in range(len(factors)) if other not in (i, j)))
        for k, m in product(range(1, len(a)), range(1, len(b))):
            difference = (means[k, m] - means[0, m]) - (means[k, 0] - means[0, 0])
            steps[(first, a[0], a[k]), (second, b[0], b[m])] = difference
    return _effects(steps, abs(values).max(), test)


def paired_bootstrap(
    correct_a: npt.ArrayLike, correct_b: npt.ArrayLike, resamples: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return the accuracy of arm a minus that of arm b, and the ends of its interval over seeds and test images.

    Seeds and images are resampled with replacement, independently of each other and the same for both arms (pigeonhole
    bootstrap, Owen 2007); the interval is made of percentiles. It covers other test images, which `compare` does not.
    Known limits: with few seeds whose spread outweighs that of the images, a 95 % interval covers about 73 / 84 / 90 %
    for 3 / 5 / 10 seeds; if seeds differ no more than by chance, 97 % or more. The t interval takes precedence.

    Args:
        correct_a, correct_b: Whether each seed of an arm classifies each test image correctly (S, M), aligned.
        resamples: 10,000 give two digits of the interval's ends.
        rng: Source of the resampling: the same seed gives the same interval.
    """
    a, b = np.asarray(correct_a, np.int8), np.asarray(correct_b, np.int8)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"both arms require the same seeds and images (S, M), got {a.shape} and {b.shape}")
    difference = a - b
    seeds, images = difference.shape
    # Images with the same differences over the seeds are interchangeable: drawing how often each such pattern occurs
    # is the same as drawing images, and there are at most 3^S patterns.
    patterns, counts = np.unique(difference, axis=1, return_counts=True)  # (S, K), (K,)
    drawn = []
    for start in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - start)
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)  # (size, S)
        of_images = rng.multinomial(images, counts / images, size)  # (size, K)
        drawn.append(((of_seeds @ patterns) * of_images).sum(axis=1) / (seeds * images))
    low, high = np.quantile(np.concatenate(drawn), [ALPHA / 2, 1 - ALPHA / 2])
    return float(difference.mean()), float(low), float(high)


class _Tests(NamedTuple):
    """t tests of A rows of differences of n seeds: columns (A,), NaN where no test applies."""

    n: int
    df: int
    identical: npt.NDArray[np.bool_]  # no seed differs
    delta: Floats
    sd: Floats
    low: Floats
    high: Floats
    p: Floats
    p_equivalence: Floats


def _t_tests(
    d: Floats,
    scale: npt.ArrayLike,
    margin: float | None = None,
    pooled: dunnett.Spreads | None = None,
    folds: bool = False,
) -> _Tests:
    """Test the rows of differences `d` (A, n) between values of magnitude `scale` (A,).

    With se = sd / sqrt(n), a t test compares |mean| / se with Student's t of n - 1 degrees of freedom. The larger p of
    two one-sided tests against ±margin (Schuirmann 1987) is the upper tail of (margin - |mean|) / se. With `pooled`, sd
    and the degrees of freedom are those of all arms; with `folds`, se is larger by `fold_factor`.
    """
    df, rounding = d.shape[1] - 1, ROUNDING * np.asarray(scale)
    identical = abs(d).max(axis=1) <= np.minimum(rounding, np.inf if margin is None else margin)
    constant = (np.ptp(d, axis=1) <= rounding) & ~identical
    mean, sd = d.mean(axis=1), d.std(axis=1, ddof=1)
    if pooled:
        df, sd = pooled.df, np.full(len(d), math.sqrt(2) * float(pooled.sd))
    se = sd / math.sqrt(d.shape[1]) * (fold_factor(d.shape[1]) if folds else 1)
    half = special.stdtrit(df, 1 - ALPHA / 2) * se
    with np.errstate(divide="ignore", invalid="ignore"):  # se is 0 in rows without spread
        p = np.where(identical, 1.0, 2 * special.stdtr(df, -abs(mean) / se))
        shifted = (abs(mean) - (np.nan if margin is None else margin)) / se
    p_equivalence = np.where(identical, np.nan, special.stdtr(df, shifted))
    tested = (np.where(constant, np.nan, column) for column in (mean - half, mean + half, p, p_equivalence))
    return _Tests(d.shape[1], df, identical, mean, sd, *tested)


def _over_folds(c: Comparison) -> Comparison:
    """Return a comparison of folds with the difference that they detect, and without advice to add seeds."""
    size = c.min_detectable_delta and c.min_detectable_delta * fold_factor(c.n)
    reasons = tuple(Reason(Why.FOLDS) if r.why in (Why.SEPARATE, Why.EQUIVALENCE) else r for r in c.reasons)
    return replace(c, min_detectable_delta=size, reasons=reasons)


def _compare_pooled(
    base: Floats, values: Mapping[str, Floats], margin: float | None, mode: Mode, family: int
) -> dict[str, Comparison]:
    x = np.array(list(values.values()))
    d, scale = x - base, np.maximum(abs(x).max(axis=1), abs(base).max())
    paired = _t_tests(d, scale, margin)
    pooled = ~paired.identical & ~np.isnan(paired.p)  # the others repeat the baseline's noise
    if not pooled.any():
        return dict(zip(values, _judged(paired, margin, mode, family), strict=True))
    spread = dunnett.spreads(np.vstack([base, x[pooled]]))
    names = np.array(["the baseline", *values])[np.append(True, pooled)]
    if len(unequal := names[dunnett.unequal(spread, len(base))]):
        refused = (Reason(Why.UNEQUAL_SPREADS, cells=tuple(unequal.tolist())),)
        return {arm: _refused(row, refused) for arm, row in zip(values, d, strict=True)}
    tests = _t_tests(d, scale, margin, spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(tests.identical, 0.0, tests.delta / tests.sd * math.sqrt(len(base)))
    adjusted = dunnett.step_down(np.where(np.isnan(tests.p), np.nan, t), spread.df, family)
    return dict(zip(values, _judged(tests, margin, mode, family, adjusted), strict=True))


def _judged(
    tests: _Tests, margin: float | None, mode: Mode, family: int, adjusted: Floats | None = None
) -> list[Comparison]:
    spread = np.where(tests.identical | np.isnan(tests.p), np.nan, tests.sd)
    p_adjusted = holm(tests.p, family) if adjusted is None else adjusted
    columns = [*tests[3:8], p_adjusted, holm(tests.p_equivalence, family)]
    columns += [hedges_g(tests.delta, spread, tests.df + 1), min_detectable_delta(spread, tests.n, df=tests.df)]
    rows = [Comparison(tests.n, *map(_number, row)) for row in zip(*columns, strict=True)]
    verdicts = [_verdict(c, same, margin, mode, family) for c, same in zip(rows, tests.identical, strict=True)]
    return [replace(row, verdict=v, reasons=why) for row, (v, why) in zip(rows, verdicts, strict=True)]


def _number(value: float) -> Any:
    return None if math.isnan(value) else float(value)


def _verdict(
    c: Any, identical: bool, margin: float | None, mode: Mode, family: int
) -> tuple[Verdict, tuple[Reason, ...]]:
    if identical:
        same = Reason(Why.IDENTICAL)
        return ("inconclusive", (same, Reason(Why.NO_MARGIN))) if margin is None else ("equivalent", (same,))
    if c.p is None:
        return "inconclusive", (Reason(Why.CONSTANT),)
    significant = c.p_holm < ALPHA
    if c.p_equivalence is not None and c.p_equivalence < ALPHA:
        return "equivalent", (Reason(Why.NEGLIGIBLE),) if significant else ()
    if significant:
        return _direction(c, margin, mode)
    adjusted = (Reason(Why.ADJUSTED, family),) if c.p < ALPHA else ()
    return "inconclusive", (*adjusted, _remedy(c, margin, family))


def _direction(c: Any, margin: float | None, mode: Mode) -> tuple[Verdict, tuple[Reason, ...]]:
    small = margin is not None and min(abs(c.delta_ci_low), abs(c.delta_ci_high)) < margin
    better = (c.delta > 0) == (mode == "max")
    return "better" if better else "worse", (Reason(Why.MAYBE_NEGLIGIBLE),) if small else ()


def _remedy(c: Any, margin: float | None, family: int) -> Reason:
    """Return how many more seeds would settle it if the observed difference and sd were the true ones."""
    alpha = ALPHA / family  # what Holm requires of the smallest p: enough whatever the other arms show
    choices = [(Why.SEPARATE, seeds_needed(c.sd, c.delta, alpha))]
    if margin is not None and abs(c.delta) < margin:
        choices.insert(0, (Why.EQUIVALENCE, seeds_needed_for_equivalence(c.sd, c.delta, margin, alpha)))
    why, n = min(choices, key=lambda choice: choice[1] or math.inf)
    return Reason(why, n and n - c.n)


def _check(margin: float | None, mode: str, test: str, looks: Sequence[int] | None) -> None:
    if margin is not None and not margin > 0:
        raise ValueError(f"margin must be positive, or None for no test of equivalence; got {margin}")
    if mode not in ("max", "min"):
        raise ValueError(f'mode must be "max" or "min", got {mode!r}')
    if test not in ("paired", "pooled", "folds"):
        raise ValueError(f'test must be "paired", "pooled" or "folds", got {test!r}')
    if test == "folds" and looks is not None:
        raise ValueError("folds allow no planned looks: they are judged once, when all are complete")


def _by_seed_at_looks(
    results: Mapping[str, Mapping[int, float]], baseline: str, seeds: Sequence[int], rules: "_Rules"
) -> dict[str, Comparison]:
    """Judge each arm on its seeds before the first without a result, in the order of `seeds`."""
    rows = {arm: [of.get(seed) for seed in seeds] for arm, of in results.items()}
    prefixes, cells = {}, {}
    for arm, row in rows.items():
        end = next((i for i, value in enumerate(row) if value is None or not math.isfinite(value)), len(row))
        prefixes[arm] = np.array(row[:end], float)
        cells[arm] = f"{arm}/seed-{seeds[end]}" if end < len(row) and row[end] is not None else None  # diverged
    base = prefixes.pop(baseline)
    shorter = {arm: min((len(base), baseline), (len(x), arm))[1] for arm, x in prefixes.items()}
    return _compare_at_looks(base, prefixes, rules, {arm: cells[name] for arm, name in shorter.items()})


class _Rules(NamedTuple):
    """How arms are judged at planned looks."""

    margin: float | None
    mode: Mode
    family: int
    looks: Looks
    test: Test


def _compare_at_looks(
    base: Floats, values: Mapping[str, Floats], rules: _Rules, diverged: Mapping[str, str | None]
) -> dict[str, Comparison]:
    """Return the comparisons at the looks that the data reach; `diverged` names the cell after which an arm ends."""
    last = rules.looks[-1]
    reach = [min(len(x), len(base), last) for x in values.values()]
    differences = [x[:n] - base[:n] for x, n in zip(values.values(), reach, strict=True)]
    if rules.test == "pooled" or not values:
        refused = (Reason(Why.POOLED_LOOKS),)
        return {arm: _refused(d, refused) for arm, d in zip(values, differences, strict=True)}
    table = np.full((len(values) + 1, last), np.nan)
    for row, x in zip(table, (base, *values.values()), strict=True):
        row[: len(x)] = x[:last]
    ends = [diverged.get(arm) is not None for arm in values]
    decisions = sequential.decide(table[0], table[1:], rules.looks, rules.margin, rules.family, reach, ends)
    comparisons = {}
    for i, arm in enumerate(values):
        one = sequential.Decisions(*(column[i] for column in decisions))
        comparisons[arm] = _at_look(differences[i], one, rules, diverged.get(arm))
    return comparisons


def _at_look(d: Floats, at: Any, rules: _Rules, diverged: str | None) -> Comparison:
    """Return the comparison of one arm from its part of the decisions, at its stop or the latest look."""
    n, coming = int(at.look), next((look for look in rules.looks if look > at.look), None)
    waiting = Reason(Why.DIVERGED, cells=(diverged,)) if diverged else Reason(Why.NEXT_LOOK, coming)
    if not n:
        s = summarise(d)
        return Comparison(s.n, s.mean, s.sd, reasons=(waiting,))
    mean, sd, tested = float(at.mean), float(at.se) * math.sqrt(n), not at.constant
    critical = sequential.boundaries(rules.looks, ALPHA)[rules.looks.index(n)]
    half, spread = critical * float(at.se), sd if tested and not at.identical else math.nan
    c = Comparison(
        n,
        mean,
        sd,
        delta_ci_low=mean - half if tested else None,
        delta_ci_high=mean + half if tested else None,
        p=float(at.p) if tested else None,
        p_holm=float(at.p_holm) if tested else None,
        p_equivalence=float(at.p_equivalence) if rules.margin and not math.isnan(spread) else None,
        hedges_g=_number(hedges_g(mean, spread, n)),
        min_detectable_delta=_number(min_detectable_delta(spread, n)),
        look=n,
        stopped=STOPPED[at.stopped],
    )
    if at.stopped == sequential.RUNNING:
        return replace(c, reasons=(waiting,))
    verdict, reasons = _verdict_at_look(c, at, rules)
    return replace(c, verdict=verdict, reasons=reasons)


def _verdict_at_look(c: Any, at: Any, rules: _Rules) -> tuple[Verdict, tuple[Reason, ...]]:
    if at.verdict == sequential.EQUIVALENT:
        negligible = (Reason(Why.NEGLIGIBLE),) if c.p_holm < ALPHA else ()
        return "equivalent", (Reason(Why.IDENTICAL),) if at.identical else negligible
    if at.verdict != sequential.NO_VERDICT:
        return _direction(c, rules.margin, rules.mode)
    if at.identical or at.constant:
        same = (Reason(Why.IDENTICAL), Reason(Why.NO_MARGIN))
        return "inconclusive", same if at.identical else (Reason(Why.CONSTANT),)
    adjusted = (Reason(Why.ADJUSTED, rules.family),) if c.p < ALPHA else ()
    hopeless = Reason(Why.HOPELESS, round(100 * float(at.power)))
    return "inconclusive", (*adjusted, Reason(Why.LAST_LOOK, c.n) if c.stopped == "last look" else hopeless)


def _refused(differences: Floats, reasons: tuple[Reason, ...], test: Test = "paired") -> Comparison:
    s = summarise(differences, test)
    return Comparison(s.n, s.mean, s.sd, s.ci_low, s.ci_high, reasons=reasons)


def _refusal(results: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> tuple[Reason, ...]:
    """Return why these arms allow no verdict; empty if they do."""
    cells = {f"{arm}/seed-{seed}": of.get(seed) for arm, of in results.items() for seed in seeds}
    missing = tuple(cell for cell, value in cells.items() if value is None)
    diverged = tuple(cell for cell, value in cells.items() if value is not None and not math.isfinite(value))
    both = ((Why.MISSING, missing), (Why.DIVERGED, diverged))
    reasons = [Reason(why, cells=named) for why, named in both if named]
    reasons += [Reason(Why.FEW_SEEDS, len(seeds))] if len(seeds) < MIN_SEEDS else []
    return tuple(reasons)


def _effects(steps: Mapping[Levels, Floats], scale: float, test: Test) -> list[Effect]:
    """Test each step, one value per seed (S,)."""
    if not steps:
        return []
    tests = _t_tests(np.array(list(steps.values())), scale, folds=test == "folds")
    columns = zip(*tests[3:8], holm(tests.p, len(steps)), strict=True)
    return [Effect(levels, tests.n, *map(_number, row)) for levels, row in zip(steps, columns, strict=True)]
