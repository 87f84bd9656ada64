"""Planned looks, compared with Student's t, plain simulations and laws that every decision must obey."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reslab.ablation import sequential
from reslab.ablation.sequential import boundaries, check_looks, decide, p_values
from reslab.ablation.statistics import Reason, Why, compare, compare_by_seed

LOOKS = [(3, 5, 8, 12, 20), (3, 4, 5, 6, 7, 8, 9, 10), (5, 10)]
FINAL = ("better", "worse", "equivalent")


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def t_statistics(d: np.ndarray, looks: tuple[int, ...]) -> np.ndarray:
    """Return the t statistic of the first n values of each row at each look (K, rows)."""
    return np.array([stats.ttest_1samp(d[:, :n], 0, axis=1).statistic for n in looks])


# Critical values


@pytest.mark.parametrize("n", [3, 4, 5, 10, 30, 50])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("sides", [1, 2])
def test_one_look_is_students_t_test(n, alpha, sides):
    assert boundaries((n,), alpha, sides) == pytest.approx([stats.t.isf(alpha / sides, n - 1)], rel=1e-6)


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("sides", [1, 2])
def test_alpha_is_spent_in_proportion_to_the_seeds(looks, sides):
    t = t_statistics(rng(1).normal(size=(100_000, looks[-1])), looks)
    for alpha in (0.05, 0.01):
        crossed = (abs(t) if sides == 2 else t) >= np.array(boundaries(looks, alpha, sides))[:, None]
        shares = np.logical_or.accumulate(crossed).mean(axis=1)
        expected = alpha * np.array(looks) / looks[-1]
        assert abs(shares - expected).max() < 4 * math.sqrt(alpha / 100_000)


def test_other_spending_functions():
    def early(fraction, alpha):
        return alpha * fraction**0.5

    looks = LOOKS[0]
    crossed = abs(t_statistics(rng(2).normal(size=(100_000, 20)), looks)) >= np.array(
        boundaries(looks, 0.05, 2, early)
    ).reshape(-1, 1)
    shares = np.logical_or.accumulate(crossed).mean(axis=1)
    assert shares == pytest.approx(0.05 * np.sqrt(np.array(looks) / 20), abs=0.003)


@given(st.sets(st.integers(3, 14), min_size=1, max_size=6), st.sampled_from([1, 2]))
@settings(max_examples=15, deadline=None)
def test_boundaries_are_nested(numbers, sides):
    looks, levels = tuple(sorted(numbers)), np.array([1e-4, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.6, 0.9])
    critical = sequential._critical_values(looks, levels, sides, sequential.spend)
    assert (np.diff(critical, axis=1) < 0).all()  # in alpha: what is rejected at alpha is rejected at every larger one


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("sides", [1, 2])
def test_p_values_invert_the_boundaries(looks, sides):
    for alpha in (0.9, 0.3, 0.05, 0.05 / 7, 1e-5):
        for k, critical in enumerate(boundaries(looks, alpha, sides)):
            assert p_values([critical], k, looks, sides) == pytest.approx([alpha], rel=2e-3)


def test_p_values_far_out_and_without_spread():
    looks = LOOKS[0]
    far = p_values([1e3, 1e5, np.inf, np.nan, -np.inf], 2, looks)
    assert 0 < far[1] < far[0] < 1e-12
    assert (far[2], far[3], far[4]) == (0, 1, 0)
    assert p_values([-5.0, 0.0, 5.0], 2, looks, sides=1)[0] == 1


@pytest.mark.parametrize("looks", [(), (2, 5), (3, 3), (5, 3), (3, 5.5), (0, 4)])
def test_invalid_looks_raise(looks):
    with pytest.raises(ValueError, match="looks must be increasing numbers of seeds, at least 3"):
        check_looks(looks)
    with pytest.raises(ValueError, match="looks must be"):
        compare([1.0, 2, 3], {"arm": [1.0, 2, 3]}, looks=looks)


@pytest.mark.parametrize(("alpha", "sides"), [(0, 2), (1, 2), (0.05, 3)])
def test_invalid_level_or_sides_raise(alpha, sides):
    with pytest.raises(ValueError, match="alpha"):
        boundaries((3, 5), alpha, sides)


# Errors, by simulation of the product's procedure


def null_study(kind: str, arms: int, seeds: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a baseline (n, seeds), which all arms share, and arms (n, arms, seeds), of the same mean."""
    draw, shape = rng(3, arms, seeds), (n, arms + 1, seeds)
    x = {
        "exponential": lambda: draw.exponential(size=shape) - 1,
        "heavy tails": lambda: draw.standard_t(3, size=shape),
    }.get(kind, lambda: draw.normal(size=shape))()
    if kind == "spread 3":
        x[:, 1::2] *= 3
    return x[:, 0], x[:, 1:]


def check_family_wise_error(kind, arms, looks, n, margin=None):
    base, x = null_study(kind, arms, looks[-1], n)
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    verdict = decide(base, x, looks, margin, hopeless=0).verdict  # an arm dropped in error could only lower it
    wrong = (verdict == sequential.LARGER) | (verdict == sequential.SMALLER)
    assert wrong.any(axis=1).mean() <= limit
    if arms == 1 and kind == "normal" and margin is None:
        assert wrong.any(axis=1).mean() >= 0.1 - limit


def check_error_of_equivalence(arms, looks, n):
    base, x = null_study("normal", arms, looks[-1], n)
    margin = 1.5 * math.sqrt(2)
    verdict = decide(base, x + margin, looks, margin, hopeless=0).verdict
    assert (verdict == sequential.EQUIVALENT).any(axis=1).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("arms", [1, 3, 10])
def test_family_wise_error(arms, looks):
    check_family_wise_error("normal", arms, looks, 3000)


@pytest.mark.parametrize("kind", ["spread 3", "exponential", "heavy tails"])
def test_family_wise_error_of_other_distributions(kind):
    check_family_wise_error(kind, 3, LOOKS[0], 3000)


def test_family_wise_error_with_a_margin_and_of_equivalence():
    check_family_wise_error("normal", 3, LOOKS[0], 3000, margin=1.0)
    check_error_of_equivalence(1, LOOKS[2], 3000)


@pytest.mark.slow
@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("arms", [1, 3, 10])
def test_family_wise_error_of_the_whole_grid(arms, looks):
    for kind in ("normal", "spread 3", "exponential", "heavy tails"):
        check_family_wise_error(kind, arms, looks, 40_000)
    check_family_wise_error("normal", arms, looks, 40_000, margin=1.0)
    check_error_of_equivalence(arms, looks, 40_000)


def test_error_stays_if_other_arms_differ():
    looks, n = LOOKS[0], 4000
    base, x = null_study("normal", 4, looks[-1], n)
    x[:, :2] += 4  # found early, and their alpha passes on to the other two
    verdict = decide(base, x, looks, hopeless=0).verdict
    assert (verdict[:, :2] == sequential.LARGER).mean() > 0.99
    assert (verdict[:, 2:] != sequential.NO_VERDICT).any(axis=1).mean() == pytest.approx(0.047, abs=0.012)


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("effect", [0, 0.5, 2])
def test_interval_covers_the_difference_at_any_stop(looks, effect):
    d, n = effect + rng(4).normal(size=(6000, 1, looks[-1])), 6000
    decisions = decide(np.zeros((n, looks[-1])), d, looks)
    critical = np.array(boundaries(looks, 0.05))[np.searchsorted(looks, decisions.look)]
    covered = abs(decisions.mean - effect) <= critical * decisions.se
    assert covered.mean() >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / n)


def test_looks_save_seeds():
    looks, n = LOOKS[0], 3000
    noise = rng(5).normal(size=(n, 1, looks[-1]))
    seeds, power = {}, {}
    for effect in (0, 1, 2, 3):
        decisions = decide(np.zeros((n, looks[-1])), effect + noise, looks)
        seeds[effect], power[effect] = decisions.look.mean(), (decisions.verdict == sequential.LARGER).mean()
    # A fixed design of the same power, 0.97, requires 17 seeds.
    assert power[1] > 0.96
    assert seeds[0] < 14 and seeds[1] < 13 and seeds[2] < 7 and seeds[3] < 5.5


def test_dropping_hopeless_arms_costs_little_power():
    looks, n = LOOKS[0], 4000
    noise = rng(6).normal(size=(n, 1, looks[-1]))
    for effect in (0.7, 1):
        study = np.zeros((n, looks[-1])), effect + noise, looks
        verdicts = (decide(*study, hopeless=bound).verdict for bound in (0, sequential.HOPELESS))
        kept, dropped = ((verdict == sequential.LARGER).mean() for verdict in verdicts)
        assert kept - 0.03 < dropped <= kept


def test_predictive_power_matches_a_simulation():
    looks, draw = (5, 8, 12), rng(7)
    for effect, margin, tolerance in ((0.8, None, 0.07), (0.3, None, 0.07), (0.1, 1.2, 0.15)):
        start = draw.normal(size=5)
        start = effect + (start - start.mean()) / start.std(ddof=1)
        power = decide(np.zeros(5), start[None], looks, margin, hopeless=0).power[0]
        n = 20_000
        sd = np.sqrt(4 / draw.chisquare(4, n))
        mean = effect + sd / math.sqrt(5) * draw.normal(size=n)
        later = mean[:, None] + sd[:, None] * draw.normal(size=(n, 7))
        d = np.concatenate([np.broadcast_to(start, (n, 5)), later], axis=1)
        verdict = decide(np.zeros((n, 12)), d[:, None], looks, margin, hopeless=0).verdict
        assert power == pytest.approx((verdict != sequential.NO_VERDICT).mean(), abs=tolerance)


# Laws


SMALL = (3, 5, 8)


@st.composite
def studies(draw) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return a baseline and 1 to 4 arms of 8 seeds: clearly different, equal, constant or noisy."""
    noise = rng(draw(st.integers(0, 10**6)))
    base = noise.normal(0.9, 0.01, 8)
    arms = {}
    for i in range(draw(st.integers(1, 4))):
        spread, shift = draw(st.sampled_from([0.0, 0.001, 0.01])), draw(st.sampled_from([0.0, 0.002, 0.01, -0.02]))
        arms[f"arm{i}"] = base + shift + noise.normal(0, 1, 8) * spread
    return base, arms


margins = st.sampled_from([None, 0.005, 0.02])


@given(studies(), margins, st.integers(0, 7), st.sampled_from([3, 5]))
@settings(deadline=None)
def test_comparison_follows_from_the_data_up_to_its_look(study, margin, key, n):
    base, arms = study
    whole = compare(base, arms, margin, looks=SMALL)
    early = compare(base[:n], {arm: x[:n] for arm, x in arms.items()}, margin, looks=SMALL)
    noise = rng(key).normal(0, 0.1, (len(arms) + 1, 8 - n))
    changed = {arm: np.append(x[:n], x[n:] + later) for (arm, x), later in zip(arms.items(), noise[1:], strict=True)}
    other = compare(np.append(base[:n], base[n:] + noise[0]), changed, margin, looks=SMALL)
    for arm, c in early.items():
        if c.stopped is not None:
            assert c == whole[arm] == other[arm]
        else:
            assert whole[arm].look > n and other[arm].look > n


@given(studies(), margins)
@settings(deadline=None)
def test_arms_require_no_seeds_after_their_stop(study, margin):
    base, arms = study
    whole = compare(base, arms, margin, looks=SMALL)
    shortest = {arm: x[: whole[arm].look] for arm, x in arms.items()}
    assert compare(base, shortest, margin, looks=SMALL) == whole
    assert compare_by_seed({"base": dict(enumerate(base)), **{a: dict(enumerate(x)) for a, x in shortest.items()}},
                           "base", range(8), margin, looks=SMALL) == whole  # fmt: skip


@given(studies(), margins)
@settings(deadline=None)
def test_verdict_agrees_with_p_interval_and_stop(study, margin):
    base, arms = study
    for c in compare(base, arms, margin, looks=SMALL).values():
        assert c.look == c.n and c.look in SMALL and c.stopped in ("decided", "hopeless", "last look")
        assert (c.stopped == "decided") == (c.verdict in FINAL)
        assert c.stopped != "last look" or c.look == 8
        if c.p is not None:
            assert c.p <= c.p_holm <= 1
            assert c.verdict == "equivalent" or (c.p_holm < 0.05) == (c.verdict in FINAL)
            assert c.p_equivalence is None or (c.p_equivalence < 0.05) == (c.verdict == "equivalent")
        if c.verdict in ("better", "worse"):
            assert (c.delta > 0) == (c.verdict == "better")


@given(studies(), margins)
@settings(deadline=None)
def test_mode_swaps_better_and_worse_only(study, margin):
    base, arms = study
    high, low = (compare(base, arms, margin, mode, looks=SMALL) for mode in ("max", "min"))
    swapped = {"better": "worse", "worse": "better"}
    assert {arm: replace(c, verdict=swapped.get(c.verdict, c.verdict)) for arm, c in low.items()} == high


@given(studies(), margins)
@settings(deadline=None)
def test_sign_and_unit_do_not_matter(study, margin):
    base, arms = study
    c = compare(base, arms, margin, looks=SMALL)
    mirrored = compare(-8 * base, {a: -8 * x for a, x in arms.items()}, margin and 8 * margin, "min", looks=SMALL)
    for arm, one in c.items():
        other = mirrored[arm]
        assert (other.verdict, other.look, other.stopped) == (one.verdict, one.look, one.stopped)
        assert other.delta == pytest.approx(-8 * one.delta)


def test_one_look_gives_the_verdicts_of_the_fixed_test():
    draw = rng(8)
    base = draw.normal(0.9, 0.01, 6)
    arms = {str(i): base + draw.normal(0.004 * i, 0.006, 6) for i in range(8)}
    fixed, planned = compare(base, arms, 0.01), compare(base, arms, 0.01, looks=[6])
    for arm, c in planned.items():
        assert c.verdict == fixed[arm].verdict
        for name in ("p", "p_holm", "p_equivalence"):  # p values above 0.95 count as 1
            assert getattr(c, name) == pytest.approx(getattr(fixed[arm], name), rel=2e-3, abs=0.05)
        assert (c.delta_ci_low, c.delta_ci_high) == pytest.approx((fixed[arm].delta_ci_low, fixed[arm].delta_ci_high))


def test_one_study_is_decided_like_many_at_once():
    draw = rng(9)
    base, x = draw.normal(size=(30, 20)), draw.normal(size=(30, 4, 20)) + np.array([0, 1, 2, 4])[:, None]
    together = decide(base, x, LOOKS[0], 2.5)
    codes = {"better": 1, "worse": 2, "equivalent": 3, "inconclusive": 0}
    for i in range(30):
        alone = compare(base[i], dict(zip("abcd", x[i], strict=True)), 2.5, looks=LOOKS[0]).values()
        assert [c.look for c in alone] == together.look[i].tolist()
        assert [codes[c.verdict] for c in alone] == together.verdict[i].tolist()


def step_by_step(base: np.ndarray, arms: np.ndarray, looks: tuple[int, ...]) -> dict[int, tuple[int, bool]]:
    """Return look and sign of every arm that differs: group-sequential Holm by its definition, one boundary at a time.

    An arm that has crossed the boundary of alpha / m, m arms being left, leaves the others alpha / (m - 1).
    """
    paths: dict[int, list[float]] = {i: [] for i in range(len(arms))}
    stopped: dict[int, tuple[int, bool]] = {}

    def crossed(path: list[float], alpha: float) -> bool:
        pairs = zip(path, boundaries(looks, alpha), strict=False)
        return any(t * path[-1] > 0 and abs(t) >= critical for t, critical in pairs)

    for n in looks:
        for i in set(paths) - set(stopped):
            paths[i].append(stats.ttest_rel(arms[i, :n], base[:n]).statistic)
        left = set(paths)
        while rejected := {i for i in left if crossed(paths[i], 0.05 / len(left))}:
            left.discard(i := min(rejected))
            stopped.setdefault(i, (n, paths[i][-1] > 0))
    return stopped


def test_arms_are_decided_as_by_the_definition_of_the_procedure():
    draw, looks = rng(11), (3, 5, 8, 12)
    for _ in range(60):
        count = draw.integers(1, 5)
        base, x = draw.normal(size=12), draw.normal(size=(count, 12)) + draw.choice([0, 1, -2, 4], size=(count, 1))
        d = decide(base, x, looks, hopeless=0)
        decided = np.flatnonzero(d.stopped == sequential.DECIDED)
        larger = d.verdict == sequential.LARGER
        assert {i: (d.look[i], larger[i]) for i in decided} == step_by_step(base, x, looks)


def test_rejected_arm_passes_its_alpha_on():
    looks, noise = (4, 8), np.array([1, -1, 1, -1, 1, -1, 1, -1.0])
    sd = noise.std(ddof=1)
    alone, shared = boundaries(looks, 0.05)[1], boundaries(looks, 0.025)[1]
    arm = noise + (alone + shared) / 2 * sd / math.sqrt(8)  # between the critical values of alpha and alpha / 2
    verdicts = {}
    for name, other in (("different", 100 + noise), ("null", noise)):
        c = compare(np.zeros(8), {"arm": arm, "other": other}, looks=looks)
        verdicts[name] = c["arm"].verdict
    assert verdicts == {"different": "better", "null": "inconclusive"}


# Cases


BASE = np.array([0.9120, 0.9135, 0.9101, 0.9142, 0.9118, 0.9127, 0.9133, 0.9109])
NOISE = np.array([1, -2, 3, -1, 2, -3, 1, -1]) / 10_000


def test_obvious_arms_stop_early_and_the_others_continue():
    arms = {"plain": BASE - 0.05 + NOISE, "same": BASE + NOISE / 100, "wide": BASE + 0.0004 + 3 * NOISE}
    early = compare(BASE[:3], {arm: x[:3] for arm, x in arms.items()}, 0.01, looks=SMALL)
    assert [(c.verdict, c.look, c.stopped) for c in early.values()] == [
        ("worse", 3, "decided"),
        ("equivalent", 3, "decided"),
        ("equivalent", 3, "decided"),
    ]
    strict = compare(BASE[:3], {arm: x[:3] for arm, x in arms.items()}, 0.001, looks=SMALL)["wide"]
    assert (strict.verdict, strict.look, strict.stopped) == (None, 3, None)
    assert strict.reasons == (Reason(Why.NEXT_LOOK, 5),)
    critical = boundaries(SMALL, 0.05)[0]
    d = arms["wide"][:3] - BASE[:3]
    half = critical * d.std(ddof=1) / math.sqrt(3)
    assert (strict.delta_ci_low, strict.delta_ci_high) == pytest.approx((d.mean() - half, d.mean() + half))


def test_before_the_first_look_there_is_no_verdict():
    c = compare(BASE[:4], {"arm": BASE[:4] + NOISE[:4]}, looks=(5, 8))["arm"]
    assert (c.n, c.look, c.stopped, c.verdict, c.p, c.delta_ci_low) == (4, None, None, None, None, None)
    assert c.reasons == (Reason(Why.NEXT_LOOK, 5),)
    assert compare([], {"arm": []}, looks=(5, 8))["arm"].n == 0
    assert compare(BASE, {}, looks=SMALL) == {}


def test_identical_and_constant_arms():
    arms = {"identical": BASE, "constant": BASE + 0.01}
    c = compare(BASE, arms, looks=SMALL)
    identical, constant = c["identical"], c["constant"]
    assert (identical.verdict, identical.look, identical.stopped, identical.p) == ("inconclusive", 3, "hopeless", 1)
    assert identical.reasons == (Reason(Why.IDENTICAL), Reason(Why.NO_MARGIN))
    assert (constant.verdict, constant.look, constant.stopped, constant.p) == ("inconclusive", 8, "last look", None)
    assert constant.reasons == (Reason(Why.CONSTANT),)
    with_margin = compare(BASE, arms, 0.002, looks=SMALL)["identical"]
    assert (with_margin.verdict, with_margin.look, with_margin.reasons) == ("equivalent", 3, (Reason(Why.IDENTICAL),))


def test_undecided_arms_say_why_they_stopped():
    c = compare(BASE, {"last": BASE + 0.00012 + NOISE, "hopeless": BASE + NOISE - NOISE.mean()}, looks=SMALL)
    assert (c["last"].stopped, c["last"].look, c["last"].reasons[-1]) == ("last look", 8, Reason(Why.LAST_LOOK, 8))
    hopeless = c["hopeless"]
    assert hopeless.stopped == "hopeless" and hopeless.look < 8
    assert hopeless.reasons[-1].why == Why.HOPELESS and 0 <= hopeless.reasons[-1].number <= 10


def by_seed(**arms: np.ndarray) -> dict[str, dict[int, float]]:
    return {name: dict(enumerate(x)) for name, x in {"base": BASE, **arms}.items()}


def test_look_waits_for_the_arms_that_still_run():
    results = by_seed(plain=BASE - 0.05 + NOISE, a=BASE + 3 * NOISE, b=BASE + 0.0002 + NOISE)
    del results["b"][4]
    c = compare_by_seed(results, "base", range(8), looks=SMALL)
    assert (c["plain"].verdict, c["plain"].look) == ("worse", 3)
    assert (c["b"].look, c["b"].stopped, c["b"].reasons) == (3, None, (Reason(Why.NEXT_LOOK, 5),))
    assert c["a"].look == 3
    assert compare_by_seed(by_seed(), "base", range(8), looks=SMALL) == {}


def test_diverged_cell_ends_its_arm_only():
    results = by_seed(a=BASE + 0.0003 + NOISE, b=BASE + 0.0002 + NOISE)
    results["b"][4] = math.nan
    c = compare_by_seed(results, "base", range(8), looks=SMALL)
    assert (c["b"].verdict, c["b"].look, c["b"].stopped) == (None, 3, None)
    assert c["b"].reasons == (Reason(Why.DIVERGED, cells=("b/seed-4",)),)
    assert c["a"].stopped is not None and c["a"].look > 3
    results["base"][3] = math.inf
    for one in compare_by_seed(results, "base", range(8), looks=SMALL).values():
        assert (one.verdict, one.look, one.reasons) == (None, 3, (Reason(Why.DIVERGED, cells=("base/seed-3",)),))


def test_pooled_test_is_refused_with_looks():
    c = compare(BASE, {"arm": BASE + NOISE}, looks=SMALL, test="pooled")["arm"]
    assert (c.verdict, c.p, c.reasons) == (None, None, (Reason(Why.POOLED_LOOKS),))


def test_comparison_at_looks_takes_less_than_10_ms():
    draw = rng(10)
    base, arms = draw.normal(size=20), {str(i): draw.normal(size=20) for i in range(10)}
    times = []
    for _ in range(5):
        start = time.process_time()
        compare(base, arms, 0.5, looks=LOOKS[0])
        times.append(time.process_time() - start)
    assert min(times) < 0.01
