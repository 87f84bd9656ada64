"""Statistics of an ablation, compared with scipy and reference implementations, properties and simulated studies."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reslab.ablation import dunnett
from reslab.ablation.statistics import (
    MAX_SEEDS,
    Comparison,
    Reason,
    Why,
    compare,
    compare_by_seed,
    design,
    factor_effects,
    hedges_g,
    interactions,
    main_effects,
    min_detectable_delta,
    paired_bootstrap,
    seeds_needed,
    seeds_needed_for_equivalence,
    simulated_error,
    summarise,
)

# Accuracies of five seeds. The plain arm is clearly worse, the wide one a little better, the cosine one the same.
BASE = np.array([0.9120, 0.9135, 0.9101, 0.9142, 0.9118])
ARMS = {
    "plain": np.array([0.9011, 0.9040, 0.9003, 0.9029, 0.9021]),
    "wide": np.array([0.9131, 0.9139, 0.9133, 0.9150, 0.9112]),
    "cosine": np.array([0.9121, 0.9133, 0.9103, 0.9139, 0.9120]),
}


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def only(reasons: tuple[Reason, ...], *whys: Why) -> Reason:
    """Return the last reason, after checking their kinds."""
    assert tuple(reason.why for reason in reasons) == whys
    return reasons[-1]


# Reference implementations


def holm(p_values: list[float]) -> list[float]:
    """Adjust p values as Holm (1979) states it: step down, and never below an earlier one."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def tost(differences: np.ndarray, margin: float) -> float:
    """Return the p of two one-sided t tests (Schuirmann 1987): the larger one counts."""
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return max(above, below)


def power(effect: float, n: int, alpha: float = 0.05) -> float:
    """Return the power of a two-sided paired t test for an effect in units of the sd."""
    critical = stats.t.isf(alpha / 2, n - 1)
    return stats.nct.sf(critical, n - 1, abs(effect) * np.sqrt(n))


def test_holm_matches_the_published_example():
    # The example of Wikipedia's "Holm–Bonferroni method".
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_summary_matches_scipy():
    summary = summarise(BASE)
    low, high = stats.t.interval(0.95, 4, BASE.mean(), stats.sem(BASE))
    assert summary.n == 5
    assert (summary.mean, summary.sd) == pytest.approx((BASE.mean(), BASE.std(ddof=1)), rel=1e-12)
    assert (summary.ci_low, summary.ci_high) == pytest.approx((low, high), rel=1e-12)


def test_summary_omits_what_n_does_not_support():
    nothing, one = summarise([]), summarise([0.9])
    assert (nothing.n, nothing.mean) == (0, None)
    assert (one.n, one.mean, one.sd, one.ci_low) == (1, 0.9, None, None)
    with pytest.raises(ValueError, match="finite"):
        summarise([0.9, np.nan, 0.8])


def check_comparisons(base: np.ndarray, arms: dict[str, np.ndarray], margin: float) -> dict[str, Comparison]:
    """Compare arms whose differences have spread, and check every number against scipy and the references."""
    comparisons = compare(base, arms, margin)
    tests = {arm: stats.ttest_rel(values, base) for arm, values in arms.items()}
    p_holm = holm([test.pvalue for test in tests.values()])
    p_equivalence = holm([tost(values - base, margin) for values in arms.values()])
    for (arm, test), adjusted, equivalent in zip(tests.items(), p_holm, p_equivalence, strict=True):
        c, difference, n = comparisons[arm], arms[arm] - base, len(base)
        sd = difference.std(ddof=1)
        assert (c.n, c.delta, c.sd) == pytest.approx((n, difference.mean(), sd), rel=1e-12, abs=1e-15)
        interval = tuple(test.confidence_interval())
        assert (c.delta_ci_low, c.delta_ci_high) == pytest.approx(interval, rel=1e-12, abs=1e-15)
        assert (c.p, c.p_holm, c.p_equivalence) == pytest.approx((test.pvalue, adjusted, equivalent), rel=1e-12)
        assert power(c.min_detectable_delta / c.sd, n) == pytest.approx(0.8, abs=1e-5)
    return comparisons


def test_comparison_matches_scipy_and_the_references():
    comparisons = check_comparisons(BASE, ARMS, margin=0.002)
    assert {arm: c.verdict for arm, c in comparisons.items()} == {
        "plain": "worse",
        "wide": "inconclusive",
        "cosine": "equivalent",
    }
    for c in comparisons.values():
        assert c.hedges_g == pytest.approx(c.delta / c.sd * 0.7978845608)


@pytest.mark.parametrize("n", [3, 5, 20])
@pytest.mark.parametrize("arms", [1, 4, 11])
def test_random_comparisons_match_scipy_and_the_references(n, arms):
    draw = rng(20, n, arms)
    base = draw.normal(0.9, 0.003, n)
    check_comparisons(base, {str(i): base + draw.normal(0.002, 0.003, n) for i in range(arms)}, margin=0.004)


def test_statistics_import_neither_torch_nor_scipy_stats():
    code = "import sys, reslab.ablation.statistics; sys.exit(bool({'torch', 'scipy.stats', 'pandas'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("alpha", [0.05, 0.005])
@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0, 1.5])
def test_seeds_needed_is_the_smallest_n_with_that_power(effect, alpha):
    n = seeds_needed(2.0, -2.0 * effect, alpha=alpha)
    assert n is not None
    assert power(effect, n, alpha) >= 0.8 > power(effect, n - 1, alpha)


def test_no_recommendation_beyond_the_maximum_number_of_seeds():
    assert seeds_needed(1.0, 0.01) is None
    assert seeds_needed(1.0, 0.0) is None
    assert seeds_needed_for_equivalence(1.0, 0.0, margin=0.01) is None
    assert seeds_needed_for_equivalence(0.001, 0.02, margin=0.01) is None


# Simulated studies


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_have_their_nominal_coverage(n):
    values = rng(1, n).normal(0.9, 0.002, size=(10_000, n))
    baseline = rng(2, n).normal(0.8, 0.005, size=n)
    means = [summarise(row) for row in values]
    deltas = compare(baseline, {str(i): baseline + row for i, row in enumerate(values)}).values()
    assert np.mean([one.ci_low <= 0.9 <= one.ci_high for one in means]) == pytest.approx(0.95, abs=0.01)
    assert np.mean([one.delta_ci_low <= 0.9 <= one.delta_ci_high for one in deltas]) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("n", "unadjusted"), [(3, 0.37), pytest.param(10, 0.29, marks=pytest.mark.slow)])
def test_ten_null_arms_rarely_give_a_false_verdict(n, unadjusted):
    studies, false, careless = 3000, 0, 0
    for values in rng(3, n).normal(0.9, 0.002, size=(studies, 11, n)):
        comparisons = compare(values[0], {str(i): arm for i, arm in enumerate(values[1:])}).values()
        false += any(one.verdict in ("better", "worse") for one in comparisons)
        careless += any(one.p < 0.05 for one in comparisons)
    assert false / studies <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)
    assert careless / studies == pytest.approx(unadjusted, abs=0.03)  # the reason for the adjustment


@pytest.mark.parametrize("n", [3, 5, 10])
def test_smallest_detectable_difference_is_found_at_80_percent_power(n):
    differences = rng(4, n).normal(min_detectable_delta(0.002, n), 0.002, size=(10_000, n))
    comparisons = compare(np.zeros(n), {str(i): row for i, row in enumerate(differences)}).values()
    assert np.mean([one.p < 0.05 for one in comparisons]) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("delta", [0.0, 0.4])
def test_recommended_seeds_show_equivalence_at_80_percent_power(delta):
    n = seeds_needed_for_equivalence(1.0, delta, margin=1.0)
    differences = rng(5, int(10 * delta)).normal(delta, 1.0, size=(4000, n))
    comparisons = [compare(np.zeros(n), {"arm": row}, margin=1.0)["arm"] for row in differences]
    assert (
        0.78 <= np.mean([one.verdict == "equivalent" for one in comparisons]) <= 0.86
    )  # n is rounded up: up to one seed too many


def test_difference_as_large_as_the_margin_is_rarely_equivalent():
    studies, n, arms = 1000, 8, 5
    alone, among = 0, 0
    for differences in rng(6).normal(1.0, 0.2, size=(studies, arms, n)):
        comparisons = compare(np.zeros(n), {str(i): row for i, row in enumerate(differences)}, margin=1.0).values()
        alone += compare(np.zeros(n), {"arm": differences[0]}, margin=1.0)["arm"].verdict == "equivalent"
        among += any(one.verdict == "equivalent" for one in comparisons)
    assert 0.02 < alone / studies <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)
    assert among / studies <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_hedges_g_is_unbiased(n):
    differences = rng(7, n).normal(1.0, 1.0, size=(40_000, n))
    estimates = [
        hedges_g(mean, sd, n) for mean, sd in zip(differences.mean(1), differences.std(1, ddof=1), strict=True)
    ]
    assert np.mean(estimates) == pytest.approx(1.0, abs=0.03)


# Properties

# Steps of 1/1024 around .5, so that sums and differences are exact.
values = st.integers(256, 768).map(lambda k: k / 1024)


@st.composite
def studies(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    n, arms = draw(st.integers(3, 8)), draw(st.integers(1, 4))
    grid = [np.array(draw(st.lists(values, min_size=n, max_size=n))) for _ in range(arms + 1)]
    return grid[0], {f"arm{i}": row for i, row in enumerate(grid[1:])}


IN_UNITS = ["delta", "sd", "delta_ci_low", "delta_ci_high", "min_detectable_delta"]
FREE_OF_UNITS = ["n", "p", "p_holm", "p_equivalence", "hedges_g"]


def assert_same(actual, expected, unit=1.0):
    """Check that verdicts and numbers agree up to rounding; None equals only None."""
    for arm, one in expected.items():
        for name in IN_UNITS + FREE_OF_UNITS:
            there, here = getattr(one, name), getattr(actual[arm], name)
            factor = unit if name in IN_UNITS else 1.0
            assert here == (there if there is None else pytest.approx(there * factor, rel=1e-6, abs=1e-9)), (arm, name)
        assert actual[arm].verdict == one.verdict


SWAPPED = {"better": "worse", "worse": "better"}


@given(studies())
def test_swapping_arm_and_baseline_negates_the_difference(study):
    base, arms = study
    there, back = compare(base, {"arm": arms["arm0"]}, 0.01)["arm"], compare(arms["arm0"], {"arm": base}, 0.01)["arm"]
    assert back.delta == -there.delta
    assert (back.sd, back.p, back.p_equivalence) == pytest.approx((there.sd, there.p, there.p_equivalence))
    assert back.verdict == SWAPPED.get(there.verdict, there.verdict)


@given(studies(), st.integers(-2, 2))
def test_constant_added_to_all_arms_changes_nothing(study, constant):
    base, arms = study
    moved = compare(base + constant, {arm: row + constant for arm, row in arms.items()}, 0.01)
    assert_same(moved, compare(base, arms, 0.01))


@given(studies(), st.randoms(use_true_random=False))
def test_order_of_the_seeds_does_not_matter(study, random):
    base, arms = study
    order = random.sample(range(len(base)), len(base))
    assert_same(compare(base[order], {arm: row[order] for arm, row in arms.items()}, 0.01), compare(base, arms, 0.01))


@given(studies(), st.sampled_from([0.125, 8.0]))
def test_unit_does_not_matter_if_the_margin_has_it(study, unit):
    base, arms = study
    scaled = compare(base * unit, {arm: row * unit for arm, row in arms.items()}, 0.01 * unit)
    assert_same(scaled, compare(base, arms, 0.01), unit)


@given(studies())
def test_mode_swaps_better_and_worse_only(study):
    base, arms = study
    high, low = compare(base, arms, 0.01, mode="max"), compare(base, arms, 0.01, mode="min")
    turned = {arm: replace(one, verdict=SWAPPED.get(one.verdict, one.verdict)) for arm, one in low.items()}
    assert turned == high


@given(studies(), st.integers(0, 3), st.integers(0, 8))
def test_verdict_stays_when_other_arms_finish(study, held_back, seed):
    base, arms = study
    whole = {arm: dict(enumerate(row)) for arm, row in {"base": base, **arms}.items()}
    seeds, late = range(len(base)), f"arm{held_back}"
    partial = {arm: dict(of) for arm, of in whole.items()}
    partial.get(late, {}).pop(seed, None)
    then, now = (compare_by_seed(results, "base", seeds, 0.01) for results in (partial, whole))
    for arm, one in then.items():
        if one.verdict in ("better", "worse", "equivalent"):
            assert now[arm].verdict in (one.verdict, "equivalent")  # significant first, then shown to be negligible


@given(studies(), st.sampled_from([None, 0.01, 0.1]))
def test_inconclusive_arm_reports_how_many_seeds_would_settle_it(study, margin):
    base, arms = study
    for c in compare(base, arms, margin).values():
        if c.verdict == "inconclusive" and c.hedges_g is not None:
            remedy = c.reasons[-1]
            assert remedy.why in ((Why.SEPARATE, Why.EQUIVALENCE) if margin else (Why.SEPARATE,))
            assert remedy.number is None or 1 <= remedy.number <= MAX_SEEDS - len(base)
            assert c.reasons[:-1] in ((), (Reason(Why.ADJUSTED, len(arms)),))


# Verdicts


def test_inconclusive_arm_gets_the_seeds_that_separate_the_difference():
    wide = compare(BASE, {"wide": ARMS["wide"]})["wide"]
    assert only(wide.reasons, Why.SEPARATE).number == seeds_needed(wide.sd, wide.delta) - 5


def test_significance_may_not_survive_the_adjustment():
    shifted = BASE + np.array([1, 2, 3, 4, 5]) / 1000
    others = {str(i): BASE + rng(8, i).normal(0, 0.01, 5) for i in range(9)}
    assert compare(BASE, {"arm": shifted})["arm"].verdict == "better"
    among = compare(BASE, {"arm": shifted, **others})["arm"]
    assert among.verdict == "inconclusive"
    assert among.reasons == (
        Reason(Why.ADJUSTED, 10),
        Reason(Why.SEPARATE, seeds_needed(among.sd, among.delta, alpha=0.05 / 10) - 5),
    )


def test_significant_difference_within_the_margin_is_equivalent():
    arm = BASE + np.array([4, 5, 6, 5, 5]) / 10_000
    assert compare(BASE, {"arm": arm})["arm"].verdict == "better"
    within = compare(BASE, {"arm": arm}, margin=0.002)["arm"]
    assert within.verdict == "equivalent"
    assert within.reasons == (Reason(Why.NEGLIGIBLE),)


def test_better_arm_may_still_be_within_the_margin():
    arm = BASE + np.array([10, 20, 30, 40, 50]) / 10_000
    c = compare(BASE, {"arm": arm}, margin=0.002)["arm"]
    assert c.verdict == "better"
    assert c.reasons == (Reason(Why.MAYBE_NEGLIGIBLE),)


def test_identical_results_are_equivalent():
    c = compare(BASE, {"arm": BASE}, margin=0.002)["arm"]
    assert (c.verdict, c.delta, c.sd, c.p) == ("equivalent", 0, 0, 1)
    assert (c.delta_ci_low, c.delta_ci_high) == (0, 0)
    assert (c.p_equivalence, c.hedges_g, c.min_detectable_delta) == (None, None, None)
    assert c.reasons == (Reason(Why.IDENTICAL),)
    without = compare(BASE, {"arm": BASE})["arm"]
    assert without.verdict == "inconclusive"
    only(without.reasons, Why.IDENTICAL, Why.NO_MARGIN)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_constant_difference_is_inconclusive(dtype):
    right = np.array([700, 911, 455, 822, 317])  # of 997 images; one more in every seed, so all spread is rounding
    base, arm = (right / 997).astype(dtype), ((right + 1) / 997).astype(dtype)
    c = compare(base, {"arm": arm}, margin=0.002)["arm"]
    assert c.verdict == "inconclusive"
    assert (c.p, c.p_holm, c.p_equivalence, c.delta_ci_low) == (None, None, None, None)
    assert c.reasons == (Reason(Why.CONSTANT),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arms": {"arm": BASE[:4]}}, "same seeds"),
        ({"arms": {"arm": BASE * np.nan}}, "finite"),
        ({"margin": 0.0}, "margin"),
        ({"mode": "lowest"}, "mode"),
        ({"test": "welch"}, "test"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"baseline": BASE, "arms": ARMS, **arguments})


# Refusals


def by_seed(**changes: dict[int, float]) -> dict[str, dict[int, float]]:
    whole = {arm: dict(enumerate(row.tolist())) for arm, row in {"identity": BASE, **ARMS}.items()}
    return {**whole, **changes}


def without(arm: str, *seeds: int) -> dict[int, float]:
    return {seed: value for seed, value in by_seed()[arm].items() if seed not in seeds}


def test_complete_study_by_seed_equals_compare():
    assert compare_by_seed(by_seed(), "identity", range(5), 0.002) == compare(BASE, ARMS, 0.002)


def test_results_of_other_seeds_are_ignored():
    more = {arm: {**of, 17: 0.1} for arm, of in by_seed().items()}
    assert compare_by_seed(more, "identity", range(5), 0.002) == compare(BASE, ARMS, 0.002)


def test_missing_cell_affects_the_verdict_of_its_arm_only():
    comparisons = compare_by_seed(by_seed(wide=without("wide", 3)), "identity", range(5), 0.002)
    wide = comparisons["wide"]
    assert (wide.verdict, wide.p, wide.p_holm, wide.n) == (None, None, None, 4)
    assert wide.delta == pytest.approx(np.delete(ARMS["wide"] - BASE, 3).mean())
    assert wide.reasons == (Reason(Why.MISSING, cells=("wide/seed-3",)),)
    assert (comparisons["plain"].verdict, comparisons["cosine"].verdict) == ("worse", "equivalent")
    assert comparisons["plain"].p_holm == pytest.approx(3 * comparisons["plain"].p)  # the family is all three arms


def test_missing_cell_of_the_baseline_affects_every_verdict():
    comparisons = compare_by_seed(by_seed(identity=without("identity", 0, 4)), "identity", range(5), 0.002)
    assert {c.verdict for c in comparisons.values()} == {None}
    cells = ("identity/seed-0", "identity/seed-4")
    assert {c.reasons for c in comparisons.values()} == {(Reason(Why.MISSING, cells=cells),)}


def test_arms_without_common_seeds_are_not_compared():
    results = {"identity": {0: 0.9, 1: 0.91, 2: 0.92}, "plain": {3: 0.8, 4: 0.81, 5: 0.82}}
    plain = compare_by_seed(results, "identity", range(6))["plain"]
    assert (plain.n, plain.delta, plain.verdict) == (0, None, None)
    missing = only(plain.reasons, Why.MISSING).cells
    assert missing == (*(f"identity/seed-{seed}" for seed in (3, 4, 5)), *(f"plain/seed-{seed}" for seed in (0, 1, 2)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_diverged_cell_is_not_ignored(value):
    comparisons = compare_by_seed(by_seed(wide={**by_seed()["wide"], 2: value}), "identity", range(5), 0.002)
    wide = comparisons["wide"]
    assert (wide.verdict, wide.n, wide.p) == (None, 4, None)
    assert wide.reasons == (Reason(Why.DIVERGED, cells=("wide/seed-2",)),)
    assert comparisons["plain"].verdict == "worse"


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_give_no_verdict(n):
    by_position = compare(BASE[:n], {arm: row[:n] for arm, row in ARMS.items()}, 0.002)
    assert by_position == compare_by_seed(by_seed(), "identity", range(n), 0.002)
    plain = by_position["plain"]
    assert (plain.verdict, plain.p, plain.n) == (None, None, n)
    assert plain.reasons == (Reason(Why.FEW_SEEDS, n),)


# The pooled test


@pytest.mark.parametrize(
    ("arms", "df", "critical"),
    [(2, 5, 3.03), (3, 20, 2.54), (9, 20, 2.95), (9, 60, 2.77)],  # Dunnett (1964), two-sided 5 %
)
def test_dunnett_matches_published_tables(arms, df, critical):
    assert dunnett.tail(critical, arms, df) == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize("df", [2, 8, 300])
def test_dunnett_of_one_arm_is_students_t(df):
    t = np.array([0.0, 0.5, 2.0, 5.0])
    assert dunnett.tail(t, 1, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-9)


def test_dunnett_matches_a_simulation():
    draw = rng(30)
    x, s = draw.normal(size=(200_000, 5)), np.sqrt(draw.chisquare(6, 200_000) / 6)
    t = abs(x[:, 1:] - x[:, :1]).max(axis=1) / (math.sqrt(2) * s)
    for critical in (1, 2, 3, 4):
        assert dunnett.tail(critical, 4, 6) == pytest.approx((t >= critical).mean(), abs=0.004)


def noisy_arms(key: int, seeds: int = 6, shift: float = 0.01) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return a baseline and four arms of the same spread, with common effects of the seeds; arm a is larger."""
    draw = rng(31, key)
    x = 0.9 + draw.normal(0, 0.01, seeds) + draw.normal(0, 0.003, (5, seeds))
    x[1] += shift
    return x[0], dict(zip("abcd", x[1:], strict=True))


def test_pooled_test_is_a_step_down_dunnett_test_with_seeds_as_blocks():
    base, arms = noisy_arms(0)
    comparisons = compare(base, arms, 0.002, test="pooled")
    table = np.array([base, *arms.values()])
    noise = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    sd = math.sqrt((noise**2).sum() / 20)
    t = {arm: (x.mean() - base.mean()) / (sd * math.sqrt(2 / 6)) for arm, x in arms.items()}
    largest = 0.0
    for rank, arm in enumerate(sorted(t, key=lambda arm: -abs(t[arm]))):
        c = comparisons[arm]
        largest = max(largest, float(dunnett.tail(abs(t[arm]), 4 - rank, 20)))
        assert (c.p, c.p_holm) == pytest.approx((2 * stats.t.sf(abs(t[arm]), 20), largest))
        half = stats.t.ppf(0.975, 20) * sd * math.sqrt(2 / 6)
        assert (c.delta_ci_low, c.delta_ci_high) == pytest.approx((c.delta - half, c.delta + half))
    assert (comparisons["a"].verdict, comparisons["a"].sd) == ("better", pytest.approx(sd * math.sqrt(2)))


def test_pooled_test_of_one_arm_is_the_paired_test():
    paired, pooled = (compare(BASE, {"wide": ARMS["wide"]}, 0.002, test=test)["wide"] for test in ("paired", "pooled"))
    for name, value in vars(paired).items():
        same = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        assert getattr(pooled, name) == same


def test_pooled_test_finds_more_with_three_seeds():
    hits = {"paired": 0, "pooled": 0}
    for key in range(100):
        base, arms = noisy_arms(key, seeds=3)
        for test in hits:
            hits[test] += compare(base, arms, test=test)["a"].verdict == "better"
    assert hits["pooled"] > 1.5 * hits["paired"] > 0


@pytest.mark.parametrize("noisy", [0, 2])
def test_pooled_test_is_refused_if_spreads_differ(noisy):
    base, arms = noisy_arms(1, seeds=8)
    table = np.array([base, *arms.values()])
    table[noisy] += rng(32).normal(0, 0.05, 8)
    comparisons = compare(table[0], dict(zip("abcd", table[1:], strict=True)), test="pooled")
    for c in comparisons.values():
        assert (c.verdict, c.p) == (None, None)
        assert ("the baseline", "a", "b")[noisy] in only(c.reasons, Why.UNEQUAL_SPREADS).cells


def test_spreads_have_the_f_distribution():
    x = rng(33).normal(size=(4000, 5, 4)) + rng(34).normal(0, 3, (4000, 1, 4))
    spread = dunnett.spreads(x)
    assert stats.kstest(spread.p[:, 0], "uniform").pvalue > 0.001
    assert np.median(spread.correlation) == pytest.approx(0.9, abs=0.05)
    assert np.median(spread.ratio) == pytest.approx(0.9, abs=0.1)


@pytest.mark.parametrize(("seeds", "ratio"), [(3, 2), (5, 1), (5, 2), (10, 1.4)])
def test_check_of_spreads_keeps_the_pooled_error_below_6_percent(seeds, ratio):
    x = rng(35).normal(size=(8000, 6, seeds))
    x[:, 0] *= ratio
    spread = dunnett.spreads(x)
    t = abs(x[:, 1:].mean(-1) - x[:, :1].mean(-1)).max(axis=1) / (spread.sd * math.sqrt(2 / seeds))
    grid = np.linspace(0, 20, 500)
    wrong = np.interp(t, grid, dunnett.tail(grid, 5, spread.df)) < 0.05
    assert (wrong & ~dunnett.unequal(spread, seeds).any(axis=1)).mean() < 0.06 + 3 * math.sqrt(0.06 / 8000)


def test_pooled_test_waits_for_every_arm():
    base, arms = noisy_arms(2)
    results = {name: dict(enumerate(x)) for name, x in {"base": base, **arms}.items()}
    assert compare_by_seed(results, "base", range(6), test="pooled") == compare(base, arms, test="pooled")
    del results["d"][5]
    for c in compare_by_seed(results, "base", range(6), test="pooled").values():
        assert (c.verdict, only(c.reasons, Why.MISSING).cells) == (None, ("d/seed-5",))


def test_arms_that_repeat_the_baselines_noise_are_not_pooled():
    c = compare(BASE, {"a": BASE, "b": BASE + 0.01}, 0.002, test="pooled")
    assert [one.verdict for one in c.values()] == ["equivalent", "inconclusive"]
    base, arms = noisy_arms(0)
    copies = {"identical": base, **arms, "constant": base + 0.01}
    alone, among = (compare(base, of, 0.002, family=6, test="pooled") for of in (arms, copies))
    assert {arm: among[arm] for arm in arms} == alone
    assert (among["identical"].verdict, among["constant"].reasons) == ("equivalent", (Reason(Why.CONSTANT),))


# Power before a study runs, and the price of looking


def test_design_of_fixed_seeds_matches_the_noncentral_t():
    plan = design(0.5, n=6, arms=2, find=1.2)
    assert power(plan.detectable / 0.5, 6, 0.025) == pytest.approx(0.8, abs=1e-5)
    assert [row.difference for row in plan.rows] == [0, 0.5, 1, 1.5, 1.2]
    for row in plan.rows[1:]:
        assert row.power == pytest.approx(power(row.difference / 0.5, 6, 0.025), abs=0.03)
        assert row.seeds == 6
    assert plan.seeds_to_find == seeds_needed(0.5, 1.2, 0.025)


def test_design_with_looks():
    plan = design(0.5, arms=3, looks=(3, 5, 8, 12), find=0.5)
    fixed = min_detectable_delta(0.5, 12, 0.05 / 3)
    assert fixed < plan.detectable < 1.15 * fixed
    null, *effects = plan.rows[:4]
    assert null.power < 0.02 and null.seeds < 10
    assert effects[0].power < effects[1].power <= effects[2].power
    assert effects[0].seeds > effects[1].seeds > effects[2].seeds
    needed = seeds_needed(0.5, 0.5, 0.05 / 3)
    assert needed < plan.seeds_to_find < 1.5 * needed
    assert design(0.5, arms=3, looks=(3, 5, 8, 12), find=0.5) == plan


@pytest.mark.parametrize(("looks", "arms", "margin", "error"), [
    ([5], 1, None, 0.05), ([5], 10, None, 0.046), (range(3, 11), 1, None, 0.167), (range(3, 21), 3, 0.83, 0.194),
])  # fmt: skip
def test_simulated_error_of_looking(looks, arms, margin, error):
    assert simulated_error(looks, arms, margin) == pytest.approx(error, abs=0.012)


def test_simulated_error_is_that_of_compare():
    draw, looks, wrong = rng(36), (3, 5, 8), 0
    for _ in range(400):
        base, arms = draw.normal(size=8), dict(zip("ab", draw.normal(size=(2, 8)), strict=True))
        verdicts = {}
        for n in looks:
            for arm, c in compare(base[:n], {arm: x[:n] for arm, x in arms.items()}, math.sqrt(2)).items():
                if c.verdict != "inconclusive":
                    verdicts.setdefault(arm, c.verdict)
        wrong += any(verdict != "equivalent" for verdict in verdicts.values())
    assert simulated_error(looks, 2, 1.0) == pytest.approx(wrong / 400, abs=0.045)


# Factors

FACTORS = {"crop": ["off", "on"], "flip": ["off", "on"], "cutout": ["0", "8", "16"]}


def grid_of(seeds: int = 6) -> np.ndarray:
    """Return accuracies (crop, flip, cutout, seeds): each factor helps; crop and flip together less than their sum."""
    crop, flip, cutout = np.meshgrid([0, 1], [0, 1], [0, 1, 2], indexing="ij")
    means = 0.8 + 0.02 * crop + 0.01 * flip + 0.004 * cutout - 0.006 * crop * flip
    return means[..., None] + rng(9).normal(0, 0.05, seeds) + rng(10).normal(0, 0.001, (2, 2, 3, seeds))


def results_of(grid: np.ndarray) -> dict[tuple[str, ...], dict[int, float]]:
    cells = zip(product(*FACTORS.values()), grid.reshape(-1, grid.shape[-1]).tolist(), strict=True)
    return {labels: dict(enumerate(row)) for labels, row in cells}


def test_main_effects_are_t_tests_of_averages_over_the_other_factors():
    grid = grid_of()
    effects = {effect.levels: effect for effect in main_effects(FACTORS, grid)}
    steps = {
        (("crop", "off", "on"),): grid[1].mean((0, 1)) - grid[0].mean((0, 1)),
        (("flip", "off", "on"),): grid[:, 1].mean((0, 1)) - grid[:, 0].mean((0, 1)),
        (("cutout", "0", "8"),): grid[:, :, 1].mean((0, 1)) - grid[:, :, 0].mean((0, 1)),
        (("cutout", "0", "16"),): grid[:, :, 2].mean((0, 1)) - grid[:, :, 0].mean((0, 1)),
    }
    assert list(effects) == list(steps)
    check_effects(effects, steps)
    # Averaged over flip, crop adds .02 - .006 / 2; pairing removes the spread between seeds.
    assert effects[(("crop", "off", "on"),)].delta == pytest.approx(0.017, abs=0.001)


def test_interactions_are_t_tests_of_differences_of_differences():
    grid = grid_of()
    effects = {effect.levels: effect for effect in interactions(FACTORS, grid)}
    crop, flip = ("crop", "off", "on"), ("flip", "off", "on")
    steps = {(crop, flip): ((grid[1, 1] - grid[0, 1]) - (grid[1, 0] - grid[0, 0])).mean(0)}
    for i, label in ((1, "8"), (2, "16")):
        cutout = ("cutout", "0", label)
        steps[crop, cutout] = ((grid[1, :, i] - grid[0, :, i]) - (grid[1, :, 0] - grid[0, :, 0])).mean(0)
        steps[flip, cutout] = ((grid[:, 1, i] - grid[:, 0, i]) - (grid[:, 1, 0] - grid[:, 0, 0])).mean(0)
    assert set(effects) == set(steps)
    check_effects(effects, {levels: steps[levels] for levels in effects})
    assert effects[crop, flip].p_holm < 0.05
    assert effects[crop, flip].delta == pytest.approx(-0.006, abs=0.001)
    assert all(effect.p_holm > 0.05 for levels, effect in effects.items() if levels != (crop, flip))


def check_effects(effects, steps):
    tests = [stats.ttest_1samp(step, 0) for step in steps.values()]
    adjusted = holm([test.pvalue for test in tests])
    for effect, step, test, p_holm in zip(effects.values(), steps.values(), tests, adjusted, strict=True):
        interval = test.confidence_interval()
        assert (effect.n, effect.delta, effect.sd) == pytest.approx((len(step), step.mean(), step.std(ddof=1)))
        assert (effect.ci_low, effect.ci_high) == pytest.approx(tuple(interval))
        assert (effect.p, effect.p_holm) == pytest.approx((test.pvalue, p_holm))


def test_factor_study_has_main_effects_and_interactions():
    grid = grid_of()
    effects = factor_effects(FACTORS, results_of(grid), range(6))
    assert (effects.main, effects.interactions) == (main_effects(FACTORS, grid), interactions(FACTORS, grid))
    assert effects.reasons == ()


def test_one_factor_has_no_interactions():
    effects = factor_effects(
        {"depth": ["20", "56"]}, {("20",): {0: 1.0, 1: 2.0, 2: 4.0}, ("56",): dict.fromkeys(range(3), 1.0)}, range(3)
    )
    assert (len(effects.main), effects.interactions) == (1, [])


def test_effects_without_any_difference_are_not_significant():
    effects = factor_effects(FACTORS, results_of(np.broadcast_to(BASE, (2, 2, 3, 5))), range(5))
    assert {effect.p for effect in effects.main + effects.interactions} == {1.0}


@pytest.mark.parametrize(
    ("hole", "reason"),
    [
        ({}, Reason(Why.MISSING, cells=tuple(f"on × on × 8/seed-{seed}" for seed in range(3)))),
        ({0: 0.8, 1: 0.8}, Reason(Why.MISSING, cells=("on × on × 8/seed-2",))),
        ({0: 0.8, 1: np.nan, 2: 0.8}, Reason(Why.DIVERGED, cells=("on × on × 8/seed-1",))),
    ],
)
def test_incomplete_grid_has_no_effects(hole, reason):
    results = results_of(grid_of(3)) | {("on", "on", "8"): hole}
    effects = factor_effects(FACTORS, results, range(3))
    assert (effects.main, effects.interactions, effects.reasons) == ([], [], (reason,))


def test_two_seeds_give_no_effects():
    effects = factor_effects(FACTORS, results_of(grid_of(2)), range(2))
    assert (effects.main, effects.interactions, effects.reasons) == ([], [], (Reason(Why.FEW_SEEDS, 2),))


# The comparison by image


def naive_bootstrap(difference: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Resample rows and columns one by one."""
    rows, columns = (rng.integers(0, size, (resamples, size)) for size in difference.shape)
    return np.array([difference[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)])


def test_resampling_patterns_equals_resampling_images():
    correct = rng(11).random((2, 4, 60)) < [[[0.8]], [[0.7]]]
    delta, *interval = paired_bootstrap(*correct, 20_000, rng(12))
    difference = correct[0].astype(int) - correct[1].astype(int)
    assert delta == pytest.approx(difference.mean())
    expected = np.quantile(naive_bootstrap(difference, 20_000, rng(13)), [0.025, 0.975])
    assert interval == pytest.approx(expected, abs=0.005)


def test_bootstrap_depends_on_its_seed_only_and_is_antisymmetric():
    a, b = rng(14).random((2, 3, 200)) < 0.8
    result = paired_bootstrap(a, b, 1500, rng(15))
    assert result == paired_bootstrap(a, b, 1500, rng(15))
    delta, low, high = paired_bootstrap(b, a, 1500, rng(15))
    assert delta == -result[0]
    assert (low, high) == pytest.approx((-result[2], -result[1]), abs=0.01)
    assert paired_bootstrap(a, a, 1500, rng(15)) == (0, 0, 0)
    with pytest.raises(ValueError, match="same seeds and images"):
        paired_bootstrap(a, b[:1], 1500, rng(15))


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0, 0.94, 1.0), (0.05, 0.68, 0.8)])
def test_bootstrap_covers_images_but_not_three_seeds_that_differ(spread, low, high):
    draw, studies, covered = rng(16), 400, 0
    for _ in range(studies):
        accuracies = 0.8 + draw.normal(0, spread, (2, 3, 1))
        ability = draw.random(1000)  # difficulty of each image, the same for both arms and all seeds
        correct = 0.9 * ability + 0.1 * draw.random((2, 3, 1000)) < accuracies
        _, least, most = paired_bootstrap(*correct, 400, draw)
        covered += least <= 0 <= most
    assert low <= covered / studies <= high
