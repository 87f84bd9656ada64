"""The statistics of an ablation, held against scipy and statsmodels, against laws, and against simulated studies."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from reslab.ablation.statistics import (
    MOST_SEEDS,
    compare,
    compare_by_seed,
    factor_effects,
    hedges_g,
    interactions,
    main_effects,
    min_detectable_delta,
    paired_bootstrap,
    seeds_needed,
    seeds_needed_for_equivalence,
    summarise,
)

# Accuracies of five seeds. The plain arm is clearly worse, the wide one a little better, the cosine one the same.
BASE = np.array([0.9120, 0.9135, 0.9101, 0.9142, 0.9118])
ARMS = {
    "plain": np.array([0.9011, 0.9040, 0.9003, 0.9029, 0.9021]),
    "wide": np.array([0.9131, 0.9139, 0.9133, 0.9150, 0.9112]),
    "cosine": np.array([0.9121, 0.9133, 0.9103, 0.9139, 0.9120]),
}


@pytest.fixture(autouse=True, scope="module")
def no_garbage_collection() -> Iterator[None]:
    """statsmodels collects garbage in every adjustment of p values: 50 ms, 10,000 times over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda: 0)
        yield


# Against scipy and statsmodels


def test_a_summary_is_scipys_t_interval():
    found = summarise(BASE)
    low, high = stats.t.interval(0.95, 4, BASE.mean(), stats.sem(BASE))
    assert found.n == 5
    assert (found.mean, found.sd) == pytest.approx((BASE.mean(), BASE.std(ddof=1)))
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high))


def test_a_summary_says_only_what_n_allows():
    nothing, one = summarise([]), summarise([0.9])
    assert (nothing.n, nothing.mean) == (0, None)
    assert (one.n, one.mean, one.sd, one.ci_low) == (1, 0.9, None, None)
    with pytest.raises(ValueError, match="finite"):
        summarise([0.9, np.nan, 0.8])


def test_a_comparison_is_scipys_paired_t_test_with_statsmodels_adjustments():
    found = compare(BASE, ARMS, margin=0.002)
    tests = {arm: stats.ttest_rel(values, BASE) for arm, values in ARMS.items()}
    holm = multipletests([test.pvalue for test in tests.values()], method="holm")[1]
    tost = [ttost_paired(values, BASE, -0.002, 0.002)[0] for values in ARMS.values()]
    equivalent = multipletests(tost, method="holm")[1]
    for (arm, test), p_holm, p_equivalence in zip(tests.items(), holm, equivalent, strict=True):
        one, difference = found[arm], ARMS[arm] - BASE
        assert (one.n, one.delta, one.sd) == pytest.approx((5, difference.mean(), difference.std(ddof=1)))
        assert (one.delta_ci_low, one.delta_ci_high) == pytest.approx(tuple(test.confidence_interval()))
        assert (one.p, one.p_holm, one.p_equivalence) == pytest.approx((test.pvalue, p_holm, p_equivalence))
        assert one.hedges_g == pytest.approx(difference.mean() / difference.std(ddof=1) * 0.7978845608)
        assert TTestPower().power(one.min_detectable_delta / one.sd, 5, 0.05) == pytest.approx(0.8, abs=1e-5)
    assert {arm: one.verdict for arm, one in found.items()} == {
        "plain": "worse",
        "wide": "inconclusive",
        "cosine": "equivalent",
    }


@pytest.mark.parametrize("alpha", [0.05, 0.005])
@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0, 1.5])
def test_seeds_needed_is_the_least_n_with_that_power(effect, alpha):
    n = seeds_needed(2.0, -2.0 * effect, alpha=alpha)
    assert n is not None
    assert TTestPower().power(effect, n, alpha) >= 0.8 > TTestPower().power(effect, n - 1, alpha)


def test_more_seeds_than_anyone_runs_are_not_counted():
    assert seeds_needed(1.0, 0.01) is None
    assert seeds_needed(1.0, 0.0) is None
    assert seeds_needed_for_equivalence(1.0, 0.0, margin=0.01) is None
    assert seeds_needed_for_equivalence(0.001, 0.02, margin=0.01) is None


# Simulated studies


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_what_they_say(n):
    values = rng(1, n).normal(0.9, 0.002, size=(10_000, n))
    baseline = rng(2, n).normal(0.8, 0.005, size=n)
    means = [summarise(row) for row in values]
    deltas = compare(baseline, {str(i): baseline + row for i, row in enumerate(values)}).values()
    assert np.mean([one.ci_low <= 0.9 <= one.ci_high for one in means]) == pytest.approx(0.95, abs=0.01)
    assert np.mean([one.delta_ci_low <= 0.9 <= one.delta_ci_high for one in deltas]) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("n", "unadjusted"), [(3, 0.37), (10, 0.29)])
def test_ten_null_arms_seldom_give_a_false_verdict(n, unadjusted):
    studies, false, careless = 3000, 0, 0
    for values in rng(3, n).normal(0.9, 0.002, size=(studies, 11, n)):
        found = compare(values[0], {str(i): arm for i, arm in enumerate(values[1:])}).values()
        false += any(one.verdict in ("better", "worse") for one in found)
        careless += any(one.p < 0.05 for one in found)
    assert false / studies <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)
    assert careless / studies == pytest.approx(unadjusted, abs=0.03)  # what the adjustment is for


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_smallest_detectable_difference_is_found_four_times_in_five(n):
    differences = rng(4, n).normal(min_detectable_delta(0.002, n), 0.002, size=(10_000, n))
    found = compare(np.zeros(n), {str(i): row for i, row in enumerate(differences)}).values()
    assert np.mean([one.p < 0.05 for one in found]) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("delta", [0.0, 0.4])
def test_the_seeds_said_to_show_equivalence_do_so_four_times_in_five(delta):
    n = seeds_needed_for_equivalence(1.0, delta, margin=1.0)
    differences = rng(5, int(10 * delta)).normal(delta, 1.0, size=(4000, n))
    found = [compare(np.zeros(n), {"arm": row}, margin=1.0)["arm"] for row in differences]
    assert 0.78 <= np.mean([one.verdict == "equivalent" for one in found]) <= 0.86  # n is whole: up to one too many


def test_a_difference_as_large_as_the_margin_is_seldom_called_equivalent():
    studies, n, arms = 1000, 8, 5
    alone, among = 0, 0
    for differences in rng(6).normal(1.0, 0.2, size=(studies, arms, n)):
        found = compare(np.zeros(n), {str(i): row for i, row in enumerate(differences)}, margin=1.0).values()
        alone += compare(np.zeros(n), {"arm": differences[0]}, margin=1.0)["arm"].verdict == "equivalent"
        among += any(one.verdict == "equivalent" for one in found)
    assert 0.02 < alone / studies <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)
    assert among / studies <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_hedges_g_is_unbiased(n):
    differences = rng(7, n).normal(1.0, 1.0, size=(40_000, n))
    found = [hedges_g(mean, sd, n) for mean, sd in zip(differences.mean(1), differences.std(1, ddof=1), strict=True)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.03)


# Laws

# Steps of 1/1024 around .5: sums and differences are exact.
values = st.integers(256, 768).map(lambda k: k / 1024)


@st.composite
def studies(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    n, arms = draw(st.integers(3, 8)), draw(st.integers(1, 4))
    grid = [np.array(draw(st.lists(values, min_size=n, max_size=n))) for _ in range(arms + 1)]
    return grid[0], {f"arm{i}": row for i, row in enumerate(grid[1:])}


IN_UNITS = ["delta", "sd", "delta_ci_low", "delta_ci_high", "min_detectable_delta"]
FREE_OF_UNITS = ["n", "p", "p_holm", "p_equivalence", "hedges_g"]


def assert_same(found, expected, unit=1.0):
    """The same verdicts on the same numbers, up to rounding; None is the same as itself alone."""
    for arm, one in expected.items():
        for name in IN_UNITS + FREE_OF_UNITS:
            there, here = getattr(one, name), getattr(found[arm], name)
            factor = unit if name in IN_UNITS else 1.0
            assert here == (there if there is None else pytest.approx(there * factor, rel=1e-6, abs=1e-9)), (arm, name)
        assert found[arm].verdict == one.verdict


SWAPPED = {"better": "worse", "worse": "better"}


@given(studies())
def test_swapping_arm_and_baseline_negates_the_difference(study):
    base, arms = study
    there, back = compare(base, {"arm": arms["arm0"]}, 0.01)["arm"], compare(arms["arm0"], {"arm": base}, 0.01)["arm"]
    assert back.delta == -there.delta
    assert (back.sd, back.p, back.p_equivalence) == pytest.approx((there.sd, there.p, there.p_equivalence))
    assert back.verdict == SWAPPED.get(there.verdict, there.verdict)


@given(studies(), st.integers(-2, 2))
def test_a_constant_added_to_all_changes_nothing(study, constant):
    base, arms = study
    moved = compare(base + constant, {arm: row + constant for arm, row in arms.items()}, 0.01)
    assert_same(moved, compare(base, arms, 0.01))


@given(studies(), st.randoms(use_true_random=False))
def test_the_order_of_the_seeds_does_not_matter(study, random):
    base, arms = study
    order = random.sample(range(len(base)), len(base))
    assert_same(compare(base[order], {arm: row[order] for arm, row in arms.items()}, 0.01), compare(base, arms, 0.01))


@given(studies(), st.sampled_from([0.125, 8.0]))
def test_the_unit_does_not_matter_where_the_margin_is_in_it(study, unit):
    base, arms = study
    scaled = compare(base * unit, {arm: row * unit for arm, row in arms.items()}, 0.01 * unit)
    assert_same(scaled, compare(base, arms, 0.01), unit)


@given(studies())
def test_the_mode_turns_better_into_worse_and_nothing_else(study):
    base, arms = study
    high, low = compare(base, arms, 0.01, mode="max"), compare(base, arms, 0.01, mode="min")
    turned = {arm: replace(one, verdict=SWAPPED.get(one.verdict, one.verdict)) for arm, one in low.items()}
    assert turned == high


@given(studies(), st.integers(0, 3), st.integers(0, 8))
def test_a_verdict_stays_when_other_arms_come_in(study, held_back, seed):
    base, arms = study
    whole = {arm: dict(enumerate(row)) for arm, row in {"base": base, **arms}.items()}
    seeds, late = range(len(base)), f"arm{held_back}"
    partial = {arm: dict(of) for arm, of in whole.items()}
    partial.get(late, {}).pop(seed, None)
    then, now = (compare_by_seed(results, "base", seeds, 0.01) for results in (partial, whole))
    for arm, one in then.items():
        if one.verdict in ("better", "worse", "equivalent"):
            assert now[arm].verdict in (one.verdict, "equivalent")  # significant, and then shown to be too small


@given(studies(), st.sampled_from([None, 0.01, 0.1]))
def test_an_inconclusive_arm_is_told_what_would_settle_it(study, margin):
    base, arms = study
    for one in compare(base, arms, margin).values():
        if one.verdict == "inconclusive" and one.hedges_g is not None:
            number, unit = one.reason.split("; ")[-1].removeprefix("more than ").split()[:2]
            more = unit == "more"
            assert 1 <= int(number.replace(",", "")) <= MOST_SEEDS - (len(base) if more else 0)
            assert one.reason.endswith("at 80 % power")


# Verdicts


def test_enough_seeds_are_said_to_separate_the_difference():
    found = compare(BASE, {"wide": ARMS["wide"]})["wide"]
    needed = seeds_needed(found.sd, found.delta)
    assert found.reason == f"{needed - 5} more seeds would separate a difference of 0.00098 at 80 % power"


def test_what_is_significant_alone_may_not_be_among_many():
    shifted = BASE + np.array([1, 2, 3, 4, 5]) / 1000
    others = {str(i): BASE + rng(8, i).normal(0, 0.01, 5) for i in range(9)}
    assert compare(BASE, {"arm": shifted})["arm"].verdict == "better"
    among = compare(BASE, {"arm": shifted, **others})["arm"]
    assert among.verdict == "inconclusive"
    more = seeds_needed(among.sd, among.delta, alpha=0.05 / 10) - 5
    assert among.reason.startswith(f"significant alone, but not among 10 arms; {more} more seed")


def test_a_significant_difference_within_the_margin_is_equivalent():
    arm = BASE + np.array([4, 5, 6, 5, 5]) / 10_000
    assert compare(BASE, {"arm": arm})["arm"].verdict == "better"
    found = compare(BASE, {"arm": arm}, margin=0.002)["arm"]
    assert found.verdict == "equivalent"
    assert "smaller than the margin of 0.002" in found.reason


def test_a_better_arm_that_may_not_matter_says_so():
    arm = BASE + np.array([10, 20, 30, 40, 50]) / 10_000
    found = compare(BASE, {"arm": arm}, margin=0.002)["arm"]
    assert found.verdict == "better"
    assert found.reason == "the difference may be smaller than the margin of 0.002"


def test_the_same_results_in_every_seed_are_equivalent():
    found = compare(BASE, {"arm": BASE}, margin=0.002)["arm"]
    assert (found.verdict, found.delta, found.sd, found.p) == ("equivalent", 0, 0, 1)
    assert (found.delta_ci_low, found.delta_ci_high) == (0, 0)
    assert (found.p_equivalence, found.hedges_g, found.min_detectable_delta) == (None, None, None)
    without = compare(BASE, {"arm": BASE})["arm"]
    assert without.verdict == "inconclusive"
    assert "margin" in without.reason


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_same_difference_in_every_seed_is_no_certainty(dtype):
    right = np.array([700, 911, 455, 822, 317])  # of 997 images; one more in every seed. The spread is rounding
    base, arm = (right / 997).astype(dtype), ((right + 1) / 997).astype(dtype)
    found = compare(base, {"arm": arm}, margin=0.002)["arm"]
    assert found.verdict == "inconclusive"
    assert (found.p, found.p_holm, found.p_equivalence, found.delta_ci_low) == (None, None, None, None)
    assert "every seed differs by the same 0.001" in found.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arms": {"arm": BASE[:4]}}, "same seeds"),
        ({"arms": {"arm": BASE * np.nan}}, "finite"),
        ({"margin": 0.0}, "margin"),
        ({"mode": "lowest"}, "mode"),
    ],
)
def test_what_makes_no_sense_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"baseline": BASE, "arms": ARMS, **arguments})


# Refusals


def by_seed(**changes: dict[int, float]) -> dict[str, dict[int, float]]:
    whole = {arm: dict(enumerate(row.tolist())) for arm, row in {"identity": BASE, **ARMS}.items()}
    return {**whole, **changes}


def without(arm: str, *seeds: int) -> dict[int, float]:
    return {seed: value for seed, value in by_seed()[arm].items() if seed not in seeds}


def test_a_whole_study_by_seed_is_compare():
    assert compare_by_seed(by_seed(), "identity", range(5), 0.002) == compare(BASE, ARMS, 0.002)


def test_results_of_seeds_that_are_not_the_studys_do_not_count():
    more = {arm: {**of, 17: 0.1} for arm, of in by_seed().items()}
    assert compare_by_seed(more, "identity", range(5), 0.002) == compare(BASE, ARMS, 0.002)


def test_a_missing_cell_takes_the_verdict_from_its_arm_alone():
    found = compare_by_seed(by_seed(wide=without("wide", 3)), "identity", range(5), 0.002)
    wide = found["wide"]
    assert (wide.verdict, wide.p, wide.p_holm, wide.n) == (None, None, None, 4)
    assert wide.delta == pytest.approx(np.delete(ARMS["wide"] - BASE, 3).mean())
    assert "wide/seed-3" in wide.reason
    assert "`reslab ablate run`" in wide.reason
    assert (found["plain"].verdict, found["cosine"].verdict) == ("worse", "equivalent")
    assert found["plain"].p_holm == pytest.approx(3 * found["plain"].p)  # three arms are compared, whenever they come


def test_a_missing_cell_of_the_baseline_takes_every_verdict():
    found = compare_by_seed(by_seed(identity=without("identity", 0, 4)), "identity", range(5), 0.002)
    assert {one.verdict for one in found.values()} == {None}
    assert all("identity/seed-0, identity/seed-4" in one.reason for one in found.values())


def test_arms_of_different_seeds_are_not_compared():
    results = {"identity": {0: 0.9, 1: 0.91, 2: 0.92}, "plain": {3: 0.8, 4: 0.81, 5: 0.82}}
    found = compare_by_seed(results, "identity", range(6))["plain"]
    assert (found.n, found.delta, found.verdict) == (0, None, None)
    assert "identity/seed-3, identity/seed-4, identity/seed-5, plain/seed-0, plain/seed-1 and 1 more" in found.reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_diverged_cell_is_not_left_out(value):
    found = compare_by_seed(by_seed(wide={**by_seed()["wide"], 2: value}), "identity", range(5), 0.002)
    assert (found["wide"].verdict, found["wide"].n, found["wide"].p) == (None, 4, None)
    assert "wide/seed-2" in found["wide"].reason
    assert "diverged" in found["wide"].reason
    assert found["plain"].verdict == "worse"


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_give_no_verdict(n):
    by_position = compare(BASE[:n], {arm: row[:n] for arm, row in ARMS.items()}, 0.002)
    assert by_position == compare_by_seed(by_seed(), "identity", range(n), 0.002)
    one = by_position["plain"]
    assert (one.verdict, one.p, one.n) == (None, None, n)
    assert one.reason == f"{n} seed{'s' * (n > 1)}, and a verdict takes 3: add seeds to the study and " + (
        "`reslab ablate run` them"
    )


# Factors

FACTORS = {"crop": ["off", "on"], "flip": ["off", "on"], "cutout": ["0", "8", "16"]}


def grid_of(seeds: int = 6) -> np.ndarray:
    """Accuracies (crop, flip, cutout, seeds): every factor adds, crop and flip together less than each alone."""
    crop, flip, cutout = np.meshgrid([0, 1], [0, 1], [0, 1, 2], indexing="ij")
    means = 0.8 + 0.02 * crop + 0.01 * flip + 0.004 * cutout - 0.006 * crop * flip
    return means[..., None] + rng(9).normal(0, 0.05, seeds) + rng(10).normal(0, 0.001, (2, 2, 3, seeds))


def results_of(grid: np.ndarray) -> dict[tuple[str, ...], dict[int, float]]:
    cells = zip(product(*FACTORS.values()), grid.reshape(-1, grid.shape[-1]).tolist(), strict=True)
    return {labels: dict(enumerate(row)) for labels, row in cells}


def test_main_effects_are_t_tests_on_the_averages_over_the_other_factors():
    grid = grid_of()
    found = {effect.levels: effect for effect in main_effects(FACTORS, grid)}
    steps = {
        (("crop", "off", "on"),): grid[1].mean((0, 1)) - grid[0].mean((0, 1)),
        (("flip", "off", "on"),): grid[:, 1].mean((0, 1)) - grid[:, 0].mean((0, 1)),
        (("cutout", "0", "8"),): grid[:, :, 1].mean((0, 1)) - grid[:, :, 0].mean((0, 1)),
        (("cutout", "0", "16"),): grid[:, :, 2].mean((0, 1)) - grid[:, :, 0].mean((0, 1)),
    }
    assert list(found) == list(steps)
    check_effects(found, steps)
    # Averaged over flip, crop gives .02 - .006 / 2: the spread between seeds is paired away.
    assert found[(("crop", "off", "on"),)].delta == pytest.approx(0.017, abs=0.001)


def test_interactions_are_t_tests_on_differences_of_differences():
    grid = grid_of()
    found = {effect.levels: effect for effect in interactions(FACTORS, grid)}
    crop, flip = ("crop", "off", "on"), ("flip", "off", "on")
    steps = {(crop, flip): ((grid[1, 1] - grid[0, 1]) - (grid[1, 0] - grid[0, 0])).mean(0)}
    for i, label in ((1, "8"), (2, "16")):
        cutout = ("cutout", "0", label)
        steps[crop, cutout] = ((grid[1, :, i] - grid[0, :, i]) - (grid[1, :, 0] - grid[0, :, 0])).mean(0)
        steps[flip, cutout] = ((grid[:, 1, i] - grid[:, 0, i]) - (grid[:, 1, 0] - grid[:, 0, 0])).mean(0)
    assert set(found) == set(steps)
    check_effects(found, {levels: steps[levels] for levels in found})
    assert found[crop, flip].p_holm < 0.05
    assert found[crop, flip].delta == pytest.approx(-0.006, abs=0.001)
    assert all(effect.p_holm > 0.05 for levels, effect in found.items() if levels != (crop, flip))


def check_effects(found, steps):
    tests = [stats.ttest_1samp(step, 0) for step in steps.values()]
    holm = multipletests([test.pvalue for test in tests], method="holm")[1]
    for effect, step, test, p_holm in zip(found.values(), steps.values(), tests, holm, strict=True):
        interval = test.confidence_interval()
        assert (effect.n, effect.delta, effect.sd) == pytest.approx((len(step), step.mean(), step.std(ddof=1)))
        assert (effect.ci_low, effect.ci_high) == pytest.approx(tuple(interval))
        assert (effect.p, effect.p_holm) == pytest.approx((test.pvalue, p_holm))


def test_a_factor_study_by_seed_is_both():
    grid = grid_of()
    found = factor_effects(FACTORS, results_of(grid), range(6))
    assert (found.main, found.interactions) == (main_effects(FACTORS, grid), interactions(FACTORS, grid))
    assert found.reason == ""


def test_one_factor_has_no_interactions():
    found = factor_effects(
        {"depth": ["20", "56"]}, {("20",): {0: 1.0, 1: 2.0, 2: 4.0}, ("56",): dict.fromkeys(range(3), 1.0)}, range(3)
    )
    assert (len(found.main), found.interactions) == (1, [])


def test_effects_without_any_difference_are_not_significant():
    found = factor_effects(FACTORS, results_of(np.broadcast_to(BASE, (2, 2, 3, 5))), range(5))
    assert {effect.p for effect in found.main + found.interactions} == {1.0}


@pytest.mark.parametrize(
    ("hole", "named"),
    [({}, "on × on × 8/seed-0"), ({0: 0.8, 1: 0.8}, "on × on × 8/seed-2"), ({0: 0.8, 1: np.nan, 2: 0.8}, "diverged")],
)
def test_a_grid_with_holes_has_no_effects(hole, named):
    results = results_of(grid_of(3)) | {("on", "on", "8"): hole}
    found = factor_effects(FACTORS, results, range(3))
    assert (found.main, found.interactions) == ([], [])
    assert found.reason.startswith("effects are averages over the full grid; ")
    assert named in found.reason


def test_two_seeds_give_no_effects():
    found = factor_effects(FACTORS, results_of(grid_of(2)), range(2))
    assert (found.main, found.interactions) == ([], [])
    assert "a verdict takes 3" in found.reason


# The comparison by image


def naive_bootstrap(difference: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Rows and columns drawn one by one."""
    rows, columns = (rng.integers(0, size, (resamples, size)) for size in difference.shape)
    return np.array([difference[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)])


def test_drawing_patterns_is_drawing_images():
    correct = rng(11).random((2, 4, 60)) < [[[0.8]], [[0.7]]]
    delta, *interval = paired_bootstrap(*correct, 20_000, rng(12))
    difference = correct[0].astype(int) - correct[1].astype(int)
    assert delta == pytest.approx(difference.mean())
    expected = np.quantile(naive_bootstrap(difference, 20_000, rng(13)), [0.025, 0.975])
    assert interval == pytest.approx(expected, abs=0.005)


def test_the_bootstrap_is_a_function_of_its_seed_and_is_antisymmetric():
    a, b = rng(14).random((2, 3, 200)) < 0.8
    found = paired_bootstrap(a, b, 1500, rng(15))
    assert found == paired_bootstrap(a, b, 1500, rng(15))
    delta, low, high = paired_bootstrap(b, a, 1500, rng(15))
    assert delta == -found[0]
    assert (low, high) == pytest.approx((-found[2], -found[1]), abs=0.01)
    assert paired_bootstrap(a, a, 1500, rng(15)) == (0, 0, 0)
    with pytest.raises(ValueError, match="same seeds and images"):
        paired_bootstrap(a, b[:1], 1500, rng(15))


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0, 0.94, 1.0), (0.05, 0.68, 0.8)])
def test_the_bootstrap_covers_images_but_not_three_seeds_that_differ(spread, low, high):
    draw, studies, covered = rng(16), 400, 0
    for _ in range(studies):
        accuracies = 0.8 + draw.normal(0, spread, (2, 3, 1))
        ability = draw.random(1000)  # how hard each image is: the same for both arms and all seeds
        correct = 0.9 * ability + 0.1 * draw.random((2, 3, 1000)) < accuracies
        _, least, most = paired_bootstrap(*correct, 400, draw)
        covered += least <= 0 <= most
    assert low <= covered / studies <= high
