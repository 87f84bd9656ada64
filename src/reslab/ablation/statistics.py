"""The statistics of an ablation: from seeds to intervals, differences and verdicts.

Everything is paired by seed and rests on Student's t: a percentile bootstrap over 3 seeds covers 73 % where it
says 95 %, and no rank test on 5 seeds can reach p < .05. A difference is arm minus baseline, in the metric's own
unit. What the data cannot carry is None, and a reason says why.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import special
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

Floats = npt.NDArray[np.float64]
Mode = Literal["max", "min"]
Verdict = Literal["better", "worse", "equivalent", "inconclusive"]
Levels = tuple[tuple[str, str, str], ...]

MIN_SEEDS = 3  # at n = 2 an interval is 25 standard errors long
MOST_SEEDS = 1000  # beyond, the answer is "more than that"
ROUNDING = 1e-6  # metrics are computed in float32: smaller relative differences are no spread
BLOCK = 1000  # bootstrap resamples in memory at a time


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
    """One arm against the baseline, paired by seed; differences are arm minus baseline.

    Attributes:
        n: Seeds that both have.
        delta, sd: Mean and standard deviation of the differences.
        delta_ci_low, delta_ci_high: t interval of the mean difference, not adjusted for the number of arms.
        p: Paired t test, two-sided.
        p_holm: The same, adjusted over the arms (Holm 1979).
        p_equivalence: Two one-sided t tests against ±margin (Schuirmann 1987), adjusted over the arms likewise.
        hedges_g: See `hedges_g`.
        min_detectable_delta: See `min_detectable_delta`; at 80 % power.
        verdict: None where it is refused.
        reason: What to run for a verdict, or for a clearer one; what to bear in mind with the one given.
    """

    n: int
    delta: float | None = None
    sd: float | None = None
    delta_ci_low: float | None = None
    delta_ci_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    p_equivalence: float | None = None
    hedges_g: float | None = None
    min_detectable_delta: float | None = None
    verdict: Verdict | None = None
    reason: str = ""


@dataclass(frozen=True)
class Effect:
    """What a level does, averaged over all other factors, paired by seed.

    Attributes:
        levels: (factor, reference, level): one for a main effect, two for an interaction.
        n: Seeds.
        delta, sd: Mean and standard deviation over the seeds of level minus reference; for an interaction, of the
            first step's effect at the second's level minus its effect at the second's reference.
        ci_low, ci_high: t interval of delta, not adjusted.
        p, p_holm: t test, two-sided; adjusted over all main effects, or over all interactions (Holm 1979).
    """

    levels: Levels
    n: int
    delta: float
    sd: float
    ci_low: float | None
    ci_high: float | None
    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class Effects:
    """Main effects and pairwise interactions of a factor study; none of either where `reason` says why."""

    main: list[Effect]
    interactions: list[Effect]
    reason: str = ""


@dataclass(frozen=True)
class _Rule:
    """How verdicts are reached over a family of arms."""

    margin: float | None
    mode: str
    alpha: float
    family: int

    def __post_init__(self) -> None:
        if self.margin is not None and not self.margin > 0:
            raise ValueError(f"margin is {self.margin}; it is a positive number, or None for no test of equivalence")
        if self.mode not in ("max", "min"):
            raise ValueError(f'mode is {self.mode!r}; it is "max" or "min"')


@dataclass(frozen=True)
class _Test:
    """t tests on the differences of n seeds; None where every seed differs by the same, and no test applies."""

    n: int
    zero: bool  # no seed differs
    delta: float
    sd: float
    low: float | None
    high: float | None
    p: float | None
    p_equivalence: float | None


def summarise(values: npt.ArrayLike, confidence: float = 0.95) -> Summary:
    """Mean, sd and t interval of finite values (n,); sd and interval from n = 2 on."""
    x = np.asarray(values, float)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError("values are finite, one a seed: leave diverged cells out, and say so")
    if len(x) < 2:
        return Summary(len(x), *x.tolist())
    of = DescrStatsW(x, ddof=1)
    low, high = of.tconfint_mean(1 - confidence)
    return Summary(len(x), float(of.mean), float(of.std), float(low), float(high))


def compare(
    baseline: npt.ArrayLike,
    arms: Mapping[str, npt.ArrayLike],
    margin: float | None = None,
    mode: Mode = "max",
    alpha: float = 0.05,
    family: int | None = None,
) -> dict[str, Comparison]:
    """Every arm against the baseline, paired by position, with a verdict from 3 seeds on.

    `equivalent` comes first: a difference shown to be within ±margin does not matter, even where it is significant.
    Then `better` or `worse`, by the adjusted p and the sign. Else `inconclusive`, with the number of seeds that would
    settle it. An arm equal to the baseline in every seed is equivalent; one that differs by the same in every seed is
    inconclusive, as the metric's steps then hide the spread.

    Args:
        baseline: The metric of the baseline (n,), finite.
        arms: The metric of each arm (n,), finite, in the same order of seeds.
        margin: Smaller differences do not matter; None: equivalence is not tested.
        mode: Whether a large ("max") or a small ("min") metric is good.
        alpha: Level of the verdicts; intervals cover 1 - alpha.
        family: How many arms the study compares, where more than are given here. The others count as p = 1, so no
            verdict is withdrawn when their results come in.

    Raises:
        ValueError: shapes differ, values are not finite, or margin or mode make no sense.
    """
    rule = _Rule(margin, mode, alpha, family or len(arms))
    base = np.asarray(baseline, float)
    values = {arm: np.asarray(of, float) for arm, of in arms.items()}
    if any(x.ndim != 1 or x.shape != base.shape or not np.isfinite(x).all() for x in (base, *values.values())):
        raise ValueError("baseline and arms are finite values (n,) of the same seeds in the same order")
    differences = {arm: x - base for arm, x in values.items()}
    if len(base) < MIN_SEEDS:
        return {arm: _refused(d, _too_few(len(base)), alpha) for arm, d in differences.items()}
    scale = {arm: max(abs(x).max(), abs(base).max()) for arm, x in values.items()}
    tests = _test(list(differences.values()), list(scale.values()), alpha, margin)
    p_holm = _holm([test.p for test in tests], rule.family)
    p_equivalence = _holm([test.p_equivalence for test in tests], rule.family)
    judged = (_judged(*found, rule) for found in zip(tests, p_holm, p_equivalence, strict=True))
    return dict(zip(arms, judged, strict=True))


def compare_by_seed(
    results: Mapping[str, Mapping[int, float]],
    baseline: str,
    seeds: Sequence[int],
    margin: float | None = None,
    mode: Mode = "max",
    alpha: float = 0.05,
) -> dict[str, Comparison]:
    """`compare` for a study as far as it has come: an arm gets its verdict when it and the baseline have every seed.

    Another arm's missing cells do not take it away, nor do they when they come in: all arms of the study count in
    Holm's adjustment from the start. Of an arm that is refused the difference over the seeds there are is given with
    its interval, but no p: which seeds are missing need not be chance.

    Args:
        results: The metric by arm and seed, with every arm of the study in it. A finished cell without a finite value
            (it diverged) is NaN, a cell without a result is left out.
        baseline: Its arm.
        seeds: All seeds of the study. Results of others are not used.
        margin, mode, alpha: As for `compare`.
    """
    family = [arm for arm in results if arm != baseline]
    refusals = {arm: _refusal({name: results[name] for name in (baseline, arm)}, seeds) for arm in family}
    values = {arm: np.array([of.get(seed, np.nan) for seed in seeds], float) for arm, of in results.items()}
    whole = {arm: values[arm] for arm in family if not refusals[arm]}
    # Without a whole arm the baseline may have holes, and there is nothing to compare it with.
    judged = compare(values[baseline], whole, margin, mode, alpha, len(family)) if whole else {}
    for arm in family:
        if arm not in judged:
            both = np.isfinite(values[arm]) & np.isfinite(values[baseline])
            judged[arm] = _refused(values[arm][both] - values[baseline][both], refusals[arm], alpha)
    return {arm: judged[arm] for arm in family}


def hedges_g(delta: float, sd: float, n: int) -> float:
    """The difference in standard deviations of the paired differences, without small-sample bias.

    This is g_z: Cohen's d_z = delta / sd (Lakens 2013), times the exact factor of Hedges (1981) for n - 1 degrees of
    freedom, so n is 3 at least. It says how well one seed shows the difference, and cannot be held against effect sizes
    of unpaired studies.
    """
    df = n - 1
    return delta / sd * math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)


def min_detectable_delta(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that a paired t test of n seeds, two-sided and alone, finds with this power.

    `sd` is that of the paired differences. Noncentral t (Cohen 1988, ch. 2), without the chance to find the
    difference with the wrong sign. As the sd of few seeds is itself uncertain, so is this.
    """
    return sd * float(_detectable_effect(n, power, alpha))


def seeds_needed(sd: float, delta: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """The fewest seeds of which `delta` is the `min_detectable_delta`; None: more than MOST_SEEDS."""
    found = np.flatnonzero(sd * _detectable_effects(power, alpha) <= abs(delta))
    return int(found[0]) + 2 if len(found) else None


def seeds_needed_for_equivalence(
    sd: float, delta: float, margin: float, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """The fewest seeds with which two one-sided tests show a true `delta` to be within ±margin with this power.

    The power is bounded from below by that of the two tests apart. None: more than MOST_SEEDS, or delta is outside.
    """
    if abs(delta) >= margin:
        return None
    room = np.array([margin - delta, margin + delta]) / sd

    def enough(n: int) -> bool:
        # scipy's noncentral t gives NaN, or takes seconds, where the chance to miss is nil.
        misses = special.nctdtr(n - 1, np.minimum(room * math.sqrt(n), 1000), -special.stdtrit(n - 1, alpha))
        return bool(np.nan_to_num(misses).sum() <= 1 - power)

    n = 2 + bisect_left(range(2, MOST_SEEDS + 1), True, key=enough)
    return n if n <= MOST_SEEDS else None


def factor_effects(
    factors: Mapping[str, Sequence[str]],
    results: Mapping[tuple[str, ...], Mapping[int, float]],
    seeds: Sequence[int],
    alpha: float = 0.05,
) -> Effects:
    """Main effects and pairwise interactions of a factor study; refused where the full grid is not there.

    Args:
        factors: Labels of each factor; the first is the reference.
        results: The metric by labels (one of each factor, in their order) and seed, as for `compare_by_seed`.
        seeds: All seeds of the study.
        alpha: Intervals cover 1 - alpha.
    """
    grid = {labels: results.get(labels, {}) for labels in product(*factors.values())}
    if reason := _refusal({" × ".join(labels): of for labels, of in grid.items()}, seeds):
        return Effects([], [], f"effects are averages over the full grid; {reason}")
    values = np.array([[of[seed] for seed in seeds] for of in grid.values()])
    values = values.reshape(*(len(labels) for labels in factors.values()), len(seeds))
    return Effects(main_effects(factors, values, alpha), interactions(factors, values, alpha))


def main_effects(factors: Mapping[str, Sequence[str]], values: Floats, alpha: float = 0.05) -> list[Effect]:
    """Each level of each factor against the factor's first; `values` has an axis a factor, then one of seeds."""
    steps: dict[Levels, Floats] = {}
    for axis, (name, labels) in enumerate(factors.items()):
        means = _averaged(values, [axis])  # (labels, seeds)
        for label, mean in zip(labels[1:], means[1:], strict=True):
            steps[((name, labels[0], label),)] = mean - means[0]
    return _effects(steps, abs(values).max(), alpha)


def interactions(factors: Mapping[str, Sequence[str]], values: Floats, alpha: float = 0.05) -> list[Effect]:
    """For each two factors and their levels: by how much one's effect depends on the other. `values`: as above."""
    steps: dict[Levels, Floats] = {}
    for (i, (first, a)), (j, (second, b)) in combinations(enumerate(factors.items()), 2):
        means = _averaged(values, [i, j])  # (labels of the first, labels of the second, seeds)
        for k, m in product(range(1, len(a)), range(1, len(b))):
            difference = (means[k, m] - means[0, m]) - (means[k, 0] - means[0, 0])
            steps[(first, a[0], a[k]), (second, b[0], b[m])] = difference
    return _effects(steps, abs(values).max(), alpha)


def paired_bootstrap(
    correct_a: npt.ArrayLike,
    correct_b: npt.ArrayLike,
    resamples: int,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Accuracy of arm a minus that of arm b, with an interval over seeds and test images.

    Seeds and images are drawn with replacement independently of each other, the same for both arms (the pigeonhole
    bootstrap, Owen 2007); the interval is the percentiles'. It answers for other test images, which `compare` does
    not. Known to be off: where seeds are few and their spread outweighs the images' it covers about 73 / 84 / 90 % in
    place of 95 % for 3 / 5 / 10 seeds; where seeds differ no more than by chance, 97 % and above. Let it not overrule
    the t interval.

    Args:
        correct_a: Whether each seed of arm a has each test image right (S, M).
        correct_b: The same for arm b (S, M), with seeds and images in the same order.
        resamples: 10,000 give two digits of the interval's ends.
        rng: Decides the draws: the same seed, the same interval.
        confidence: What the interval is to cover.

    Returns:
        The difference and the ends of its interval.

    Raises:
        ValueError: the arms differ in shape.
    """
    a, b = np.asarray(correct_a, np.int8), np.asarray(correct_b, np.int8)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"both arms need the same seeds and images: (S, M) is {a.shape} and {b.shape}")
    difference = a - b
    seeds, images = difference.shape
    # Images with the same differences over the seeds are interchangeable: drawing how often each such pattern comes
    # is the same as drawing images, and there are at most 3^S patterns.
    patterns, counts = np.unique(difference, axis=1, return_counts=True)  # (S, K), (K,)
    drawn = []
    for start in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - start)
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)  # (size, S)
        of_images = rng.multinomial(images, counts / images, size)  # (size, K)
        drawn.append(((of_seeds @ patterns) * of_images).sum(axis=1) / (seeds * images))
    low, high = np.quantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(difference.mean()), float(low), float(high)


def _test(differences: Sequence[Floats], scale: Sequence[float], alpha: float, margin: float | None) -> list[_Test]:
    """Tests the rows of differences (A, n) between values of the size `scale` (A,)."""
    if not differences:
        return []
    d, rounding = np.asarray(differences), ROUNDING * np.asarray(scale)
    zero = abs(d).max(axis=1) <= np.minimum(rounding, np.inf if margin is None else margin)
    flat = (np.ptp(d, axis=1) <= rounding) & ~zero
    of = DescrStatsW(d.T, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # where there is no spread
        p = np.where(zero, 1.0, of.ttest_mean(0)[1])
        p_equivalence = np.full(len(d), np.nan) if margin is None else of.ttost_mean(-margin, margin)[0]
    low, high = of.tconfint_mean(alpha)
    columns = [of.mean, of.std]
    columns += [np.where(flat, np.nan, column) for column in (low, high, p, np.where(zero, np.nan, p_equivalence))]
    rows: list[Any] = [[None if np.isnan(x) else float(x) for x in row] for row in zip(*columns, strict=True)]
    return [_Test(d.shape[1], same, *row) for row, same in zip(rows, zero.tolist(), strict=True)]


def _holm(ps: Sequence[float | None], family: int) -> list[float | None]:
    """Adjusts p values for a family of tests; one that is not there counts as 1."""
    if not ps:
        return []
    known = [1.0 if p is None else p for p in ps] + [1.0] * (family - len(ps))
    adjusted = multipletests(known, method="holm")[1].tolist()
    return [None if p is None else q for p, q in zip(ps, adjusted[: len(ps)], strict=True)]


def _judged(test: _Test, p_holm: float | None, p_equivalence: float | None, rule: _Rule) -> Comparison:
    verdict, reason = _verdict(test, p_holm, p_equivalence, rule)
    spread = test.p is not None and not test.zero
    return Comparison(
        test.n,
        test.delta,
        test.sd,
        test.low,
        test.high,
        test.p,
        p_holm,
        p_equivalence,
        hedges_g=hedges_g(test.delta, test.sd, test.n) if spread else None,
        min_detectable_delta=min_detectable_delta(test.sd, test.n, alpha=rule.alpha) if spread else None,
        verdict=verdict,
        reason=reason,
    )


def _verdict(test: _Test, p_holm: float | None, p_equivalence: float | None, rule: _Rule) -> tuple[Verdict, str]:
    margin, alpha = rule.margin, rule.alpha
    if test.zero:
        same = "the same result in every seed"
        return (
            ("inconclusive", f"{same}; a margin would make it equivalent") if margin is None else ("equivalent", same)
        )
    if test.low is None or test.high is None or p_holm is None:
        hidden = (
            "the metric's steps hide the spread, and no test applies; a finer metric (a loss) or more seeds may show it"
        )
        return "inconclusive", f"every seed differs by the same {test.delta:.3g}: {hidden}"
    if margin is not None and p_equivalence is not None and p_equivalence < alpha:
        seen = f"there is a difference (adjusted p = {p_holm:.2g}), but it is smaller than the margin of {margin:g}"
        return "equivalent", seen if p_holm < alpha else ""
    if p_holm < alpha:
        small = margin is not None and min(abs(test.low), abs(test.high)) < margin
        found: Verdict = "better" if (test.delta > 0) == (rule.mode == "max") else "worse"
        return found, f"the difference may be smaller than the margin of {margin:g}" if small else ""
    return "inconclusive", _remedy(test, rule)


def _remedy(test: _Test, rule: _Rule) -> str:
    """How many more seeds would settle it, were the difference and the sd seen the true ones.

    At alpha / family, which is what Holm asks of the smallest p: enough whatever the other arms show.
    """
    alpha, most = rule.alpha / rule.family, f"more than {MOST_SEEDS:,} seeds would be needed to"
    choices = [(seeds_needed(test.sd, test.delta, alpha=alpha), f"separate a difference of {abs(test.delta):.2g}")]
    if rule.margin is not None and abs(test.delta) < rule.margin:
        needed = seeds_needed_for_equivalence(test.sd, test.delta, rule.margin, alpha=alpha)
        choices.insert(0, (needed, f"show that it is within ±{rule.margin:g}"))
    needed, goal = min(choices, key=lambda choice: choice[0] or math.inf)
    more = (needed or 0) - test.n
    what = most if needed is None else f"{more:,} more seed{'s' * (more > 1)} would"
    alone = (
        f"significant alone, but not among {rule.family} arms; " if test.p is not None and test.p < rule.alpha else ""
    )
    return f"{alone}{what} {goal} at 80 % power"


def _refused(differences: Floats, reason: str, alpha: float) -> Comparison:
    seen = summarise(differences, 1 - alpha)
    return Comparison(seen.n, seen.mean, seen.sd, seen.ci_low, seen.ci_high, reason=reason)


def _refusal(results: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> str:
    """Why these arms allow no verdict and what to run; empty where they do."""
    cells = {f"{arm}/seed-{seed}": of.get(seed) for arm, of in results.items() for seed in seeds}
    missing = [cell for cell, value in cells.items() if value is None]
    diverged = [cell for cell, value in cells.items() if value is not None and not math.isfinite(value)]
    reasons = []
    if missing:
        reasons.append(f"no result of {_listed(missing)}: `reslab ablate run` to fill in what is missing")
    if diverged:
        flatter = "to leave out a seed that diverged would flatter the arm; change the arm and run it again"
        reasons.append(f"no finite result of {_listed(diverged)}: {flatter}")
    if len(seeds) < MIN_SEEDS:
        reasons.append(_too_few(len(seeds)))
    return "; ".join(reasons)


def _too_few(n: int) -> str:
    seeds = f"{n} seed{'s' * (n != 1)}"
    return f"{seeds}, and a verdict takes {MIN_SEEDS}: add seeds to the study and `reslab ablate run` them"


def _listed(cells: Sequence[str], most: int = 5) -> str:
    rest = len(cells) - most
    return ", ".join(cells[:most]) + (f" and {rest} more" if rest > 0 else "")


def _detectable_effect(n: Any, power: float, alpha: float) -> Any:
    """`min_detectable_delta` in units of sd, for n of any shape.

    By the inverse of the noncentral t distribution; statsmodels' `TTestPower.solve_power` stops early, without a
    word, where few seeds meet a small alpha.
    """
    return special.nctdtrinc(n - 1, 1 - power, -special.stdtrit(n - 1, alpha / 2)) / np.sqrt(n)


@cache
def _detectable_effects(power: float, alpha: float) -> Floats:
    """For 2 … MOST_SEEDS seeds (MOST_SEEDS - 1,), falling."""
    return np.asarray(_detectable_effect(np.arange(2, MOST_SEEDS + 1), power, alpha))


def _averaged(values: Floats, axes: Sequence[int]) -> Floats:
    """Means over all factors but those of `axes`; the last axis, the seeds, stays."""
    return values.mean(axis=tuple(axis for axis in range(values.ndim - 1) if axis not in axes))


def _effects(steps: Mapping[Levels, Floats], scale: float, alpha: float) -> list[Effect]:
    """Tests each step, given per seed (S,)."""
    tests = _test(list(steps.values()), [scale] * len(steps), alpha, None)
    p_holm = _holm([test.p for test in tests], len(tests))
    return [
        Effect(levels, test.n, test.delta, test.sd, test.low, test.high, test.p, adjusted)
        for levels, test, adjusted in zip(steps, tests, p_holm, strict=True)
    ]
