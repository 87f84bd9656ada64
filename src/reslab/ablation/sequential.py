"""Group-sequential t tests: a study is judged at planned looks, and the error over all looks together is at most alpha.

Let d_1, d_2, ... be independent N(0, σ²), S_n the sum of the first n of them and Q_n the sum of their squares. The
t statistic is a function of R_n = S_n / sqrt(Q_n): T_n² = (n - 1) R_n² / (n - R_n²). The direction of the vector
(d_1, ..., d_n) is uniform on the sphere and independent of its length, so R_n is a Markov chain:

    R_{n+1} = R_n cos φ + sin φ, with an independent angle φ of density proportional to cos^{n-1} φ on (-π/2, π/2).

The chance of crossing a boundary first at look k follows from a recursion in one dimension (as in Armitage, McPherson &
Rowe 1969 for a known variance), for any looks and exactly: no normal approximation, no random numbers.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.polynomial import chebyshev, legendre
from scipy import special

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int_]
Bools = npt.NDArray[np.bool_]
Looks = tuple[int, ...]
Spending = Callable[[float, Floats], Floats]

MIN_SEEDS = 3  # with 2 seeds, a 95 % interval is 25 standard errors long
ALPHA = 0.05
HOPELESS = 0.1  # an arm whose predictive power is below this is dropped
ROUNDING = 1e-6  # metrics are float32: smaller relative differences are rounding, not spread

RUNNING, DECIDED, HOPELESS_STOP, LAST_LOOK = range(4)  # Decisions.stopped
NO_VERDICT, LARGER, SMALLER, EQUIVALENT = range(4)  # Decisions.verdict

WIDEST = 6.5  # R_n is about standard normal: larger values have no noticeable probability
NODES, ANGLES = 56, 44  # of a density, and of the integral over φ: relative error of alpha < 1e-6 up to 50 seeds
LEVELS, LOWEST, HIGHEST = 22, -14.0, 3.0  # of alpha, as log odds: p values between 1e-6 and 0.95
GRID = np.linspace(LOWEST, HIGHEST, 2001)


def spend(fraction: float, alpha: Floats) -> Floats:
    """Return the part of alpha that may be spent once this fraction of the seeds has run: alpha · fraction.

    This is the alpha-spending function (Lan & DeMets 1983) of the power family alpha · fraction^ρ (Kim & DeMets 1987)
    with ρ = 1, chosen by the expected number of seeds: see docs/statistics.md.
    """
    return alpha * fraction


def check_looks(looks: Sequence[int]) -> Looks:
    """Return the looks as a tuple of int.

    Raises:
        ValueError: they are not increasing numbers of seeds, or the first is below 3.
    """
    whole = tuple(int(n) for n in looks)
    if whole != tuple(looks) or not whole or whole[0] < MIN_SEEDS or any(a >= b for a, b in pairwise(whole)):
        raise ValueError(f"looks must be increasing numbers of seeds, at least {MIN_SEEDS}; got {list(looks)}")
    return whole


def boundaries(looks: Looks, alpha: float, sides: Literal[1, 2] = 2, spending: Spending = spend) -> tuple[float, ...]:
    """Return the critical value of |T| (sides=2) or of T (sides=1) at each look.

    Under the null hypothesis, the chance of reaching one of the first k values is `spending(looks[k - 1] / looks[-1],
    alpha)`, so the error over all looks is alpha. With one look, this is the quantile of Student's t.

    Args:
        looks: Numbers of seeds, increasing, at least 3. Seeds between looks are not tested.
        alpha: Error over all looks.
        sides: 2 tests for a difference; 1 is half of a test of equivalence.
        spending: The part of alpha spent at a fraction of the seeds; alpha at 1.
    """
    if not 0 < alpha < 1 or sides not in (1, 2):
        raise ValueError(f"alpha must be between 0 and 1, and sides 1 or 2; got {alpha} and {sides}")
    return _boundaries(check_looks(looks), float(alpha), sides, spending)


@lru_cache(maxsize=1024)
def _boundaries(looks: Looks, alpha: float, sides: int, spending: Spending) -> tuple[float, ...]:
    return tuple(_critical_values(looks, np.array([alpha]), sides, spending)[:, 0].tolist())


class _Density(NamedTuple):
    """Density of R_n of the paths that have not crossed a boundary, for L levels of alpha.

    With R = centre + radius · sin θ, the values at Chebyshev nodes of θ in [-π/2, π/2] give a series in 2 θ / π: the
    density may end like a square root, which is smooth in θ.
    """

    low: Floats  # ends of the support (L,)
    high: Floats
    values: Floats  # (L, NODES)


Z = np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
SERIES = np.cos(np.outer(np.arange(NODES), np.arccos(Z))) * np.where(np.arange(NODES), 2, 1)[:, None] / NODES
_x, _w = legendre.leggauss(ANGLES)
PSI, WEIGHTS = np.sin(np.pi / 2 * _x), _w * np.pi / 2 * np.cos(np.pi / 2 * _x)  # integrates f over [-1, 1]


def _critical_values(looks: Looks, levels: Floats, sides: int, spending: Spending) -> Floats:
    """Return the critical values (K, L) by recursion over the seeds."""
    n, used, rows = looks[0], np.zeros(len(levels)), []
    density = _initial_density(n, len(levels))
    while True:
        low, high = density.low, density.high  # of the paths that continue
        if n in looks:
            total = spending(n / looks[-1], levels)
            high = _upper_quantile(density, (total - used) / sides)
            low, used = -high if sides == 2 else low, total
            rows.append(high * np.sqrt((n - 1) / np.maximum(n - high * high, 1e-300)))
        if n == looks[-1]:
            return np.array(rows)
        density, n = _next_density(density, low, high, n), n + 1


def _points(low: Floats, high: Floats) -> Floats:
    return ((low + high) / 2)[:, None] + ((high - low) / 2)[:, None] * np.sin(np.pi / 2 * Z)


def _initial_density(n: int, levels: int) -> _Density:
    """Return the density of R_n, proportional to (1 - r² / n)^((n - 3) / 2) on [-√n, √n]."""
    high = np.full(levels, min(math.sqrt(n), WIDEST))
    low = -high
    scale = math.exp(special.gammaln(n / 2) - special.gammaln((n - 1) / 2)) / math.sqrt(math.pi * n)
    return _Density(low, high, scale * (1 - _points(low, high) ** 2 / n) ** ((n - 3) / 2))


def _next_density(density: _Density, a: Floats, b: Floats, n: int) -> _Density:
    """Return the density of R_{n+1} of the paths with R_n in [a, b].

    Given φ, R_{n+1} = y comes from R_n = (y - sin φ) / cos φ, with the Jacobian 1 / cos φ. As a cos φ + sin φ =
    sqrt(1 + a²) sin(φ + atan a), the angles that keep R_n within [a, b] are an interval.
    """
    low, high = (np.minimum(np.sqrt(1 + np.maximum(end, 0) ** 2), WIDEST) for end in (-a, b))
    low = -low
    y, turn_a, turn_b = _points(low, high), np.arctan(a)[:, None], np.arctan(b)[:, None]
    up = np.arcsin((y / np.sqrt(1 + b * b)[:, None]).clip(-1, 1))
    down = np.arcsin((y / np.sqrt(1 + a * a)[:, None]).clip(-1, 1))
    widest = min(np.pi / 2, WIDEST / math.sqrt(n))  # cos^n beyond it has no noticeable mass
    first = np.maximum(np.maximum(-widest, up - turn_b), -turn_a - np.pi - down)
    last = np.maximum(np.minimum(np.minimum(widest, np.pi - up - turn_b), down - turn_a), first)
    phi = ((first + last) / 2)[..., None] + ((last - first) / 2)[..., None] * PSI
    before = (y[..., None] - np.sin(phi)) / np.cos(phi)
    integrand = _evaluate(density, before) * np.cos(phi) ** (n - 2)
    scale = math.exp(special.gammaln((n + 1) / 2) - special.gammaln(n / 2)) / math.sqrt(math.pi)
    return _Density(low, high, scale * (integrand @ WEIGHTS) * (last - first) / 2)


def _evaluate(density: _Density, r: Floats) -> Floats:
    """Return the density at r (L, ...)."""
    low, high = density.low[:, None, None], density.high[:, None, None]
    theta = np.arcsin(((2 * r - low - high) / (high - low)).clip(-1, 1))
    return chebyshev.chebval(theta * 2 / np.pi, (SERIES @ density.values.T)[..., None, None], tensor=False)


def _upper_quantile(density: _Density, tail: Floats) -> Floats:
    """Return the point above which the density has the mass `tail`, by bisection of its integral."""
    centre, radius = (density.low + density.high) / 2, (density.high - density.low) / 2
    slopes = density.values * radius[:, None] * np.pi / 2 * np.cos(np.pi / 2 * Z)
    mass = chebyshev.chebint(SERIES @ slopes.T)
    below = chebyshev.chebval(np.ones_like(tail), mass, tensor=False) - tail
    left, right = -np.ones_like(tail), np.ones_like(tail)
    for _ in range(48):
        middle = (left + right) / 2
        above = chebyshev.chebval(middle, mass, tensor=False) >= below
        left, right = np.where(above, left, middle), np.where(above, middle, right)
    return centre + radius * np.sin(np.pi / 2 * left)


@lru_cache(maxsize=64)
def _table(looks: Looks, sides: int) -> Floats:
    """Return the critical values (K, G) at alpha = expit(GRID), decreasing in alpha.

    The log odds of alpha are smooth in the critical value's one-look p, so few levels give the rest by a polynomial.
    Nested boundaries are what makes a p value, and Holm's procedure, valid (Maurer & Bretz 2013): where the recursion
    gives an increase with alpha, which the tests did not find for any design, the larger value counts.
    """
    nodes = np.cos(np.pi * (np.arange(LEVELS) + 0.5) / LEVELS)
    levels = special.expit((LOWEST + HIGHEST) / 2 + (HIGHEST - LOWEST) / 2 * nodes)
    df = np.array(looks)[:, None] - 1.0
    tails = special.logit(special.stdtr(df, -_critical_values(looks, levels, sides, spend)))
    series = chebyshev.chebfit(nodes, tails.T, LEVELS - 1)
    dense = chebyshev.chebval(np.linspace(-1, 1, len(GRID)), series)
    critical = -special.stdtrit(df, special.expit(dense))
    return np.maximum.accumulate(critical[:, ::-1], axis=1)[:, ::-1]


def p_values(t: npt.ArrayLike, look: int, looks: Looks, sides: int = 2) -> Floats:
    """Return the smallest alpha whose boundary at `look` (an index) is at most |t| (sides=2) or t (sides=1).

    The smallest of these over the looks so far is the sequential p value (Liu & Anderson 2008): under the null
    hypothesis it is at most u with probability at most u, whenever the study stops. Values above 0.95 are returned as
    1; NaN counts as 1.
    """
    table, df = _table(looks, sides)[look], looks[look] - 1
    values = np.asarray(t, float)
    values = np.nan_to_num(abs(values) if sides == 2 else values, nan=-np.inf)
    p = special.expit(np.interp(values, table[::-1], GRID[::-1]))
    beyond = np.maximum(values, table[0])  # so far out, the p value is proportional to that of a single look
    p *= special.stdtr(df, -beyond) / special.stdtr(df, -table[0])
    return np.where(values < table[-1], 1.0, p)


def holm(p: Floats, family: int) -> Floats:
    """Adjust p values (..., A) for a family of tests (Holm 1979); NaN stays NaN and counts as 1, as do tests left out.

    The smallest of m values is multiplied by m, the next by m - 1, and so on; none may fall below the one before it.
    """
    missing = np.ones((*p.shape[:-1], family - p.shape[-1]))
    known = np.concatenate([np.nan_to_num(p, nan=1.0), missing], axis=-1)
    order = known.argsort(axis=-1, kind="stable")
    steps = np.maximum.accumulate(np.take_along_axis(known, order, -1) * np.arange(family, 0, -1), axis=-1).clip(max=1)
    adjusted = np.empty_like(known)
    np.put_along_axis(adjusted, order, steps, -1)
    return np.where(np.isnan(p), np.nan, adjusted[..., : p.shape[-1]])


class Decisions(NamedTuple):
    """What the procedure decided about every arm: arrays (..., A)."""

    look: Ints  # seeds at which the arm stopped, or at the last look so far; 0 before the first
    stopped: Ints  # RUNNING, DECIDED, HOPELESS_STOP, LAST_LOOK
    verdict: Ints  # NO_VERDICT, LARGER, SMALLER (arm minus baseline), EQUIVALENT
    p: Floats  # sequential p value of a difference in the direction of the mean, not adjusted
    p_holm: Floats  # p, adjusted over the arms at `look`: later looks do not change it
    p_equivalence: Floats  # sequential p value of two one-sided tests, adjusted likewise
    power: Floats  # predictive power at `look`
    mean: Floats  # of the differences at `look`; NaN before the first, like the next
    se: Floats
    identical: Bools  # no seed differs
    constant: Bools  # every seed differs by the same amount, so no test applies


class _Look(NamedTuple):
    """Statistics of n seeds, arrays (..., A)."""

    mean: Floats
    se: Floats
    identical: Bools
    constant: Bools


def decide(
    baseline: Floats,
    arms: Floats,
    looks: Looks,
    margin: float | None = None,
    family: int | None = None,
    lengths: npt.ArrayLike | None = None,
    ends: npt.ArrayLike = False,
    hopeless: float = HOPELESS,
) -> Decisions:
    """Run the procedure over all looks that the data reach, for one study or for many simulated ones at once.

    At each look, the sequential p values of the running arms are adjusted by Holm (1979), together with those of the
    stopped arms: the group-sequential Holm procedure (Ye et al. 2013; Maurer & Bretz 2013). An arm found to differ
    passes its alpha on to the arms that still run, a dropped one does not. An arm stops if it is equivalent (which
    comes first) or different at the level ALPHA, or if its predictive power is below `hopeless`, which cannot cause an
    error (non-binding futility). A decision at a look depends on the data up to that look only.

    Args:
        baseline, arms: Values (..., N) and (..., A, N), seeds in order.
        looks, margin: See `statistics.compare`.
        family: Number of arms of the study, if more than A.
        lengths: Seeds that each arm has (A,), for one study without leading axes; default: N for all. A look takes
            place once all arms that still run have its seeds.
        ends: Whether an arm has no more seeds to come (A,), because one has diverged. Looks do not wait for it.
        hopeless: Bound of the predictive power; 0 drops no arm.
    """
    shape, family = arms.shape[:-1], family or arms.shape[-2]
    reach = np.full(shape, arms.shape[-1]) if lengths is None else np.asarray(lengths)
    look, stopped, verdict = (np.zeros(shape, int) for _ in range(3))
    up_p, down_p, equivalence, p_holm, p_equivalence, power = (np.ones(shape) for _ in range(6))
    latest = _Look(*(np.full(shape, empty) for empty in (np.nan, np.nan, False, False)))
    for k, n in enumerate(looks):
        active = (stopped == RUNNING) & ~(np.asarray(ends) & (reach < n))
        if (active & (reach < n)).any() or not active.any():
            break
        now = _statistics(baseline, arms, n, margin)
        s = latest = _Look(*(np.where(active, new, old) for new, old in zip(now, latest, strict=True)))
        p, up = p_values(_ratio(s.mean, s), k, looks), s.mean > 0
        np.minimum(up_p, p, out=up_p, where=active & up)
        np.minimum(down_p, p, out=down_p, where=active & ~up)
        np.minimum(equivalence, _tost(s, margin, k, looks), out=equivalence, where=active)
        of_difference, of_equivalence = (holm(p, family) for p in (np.where(up, up_p, down_p), equivalence))
        different, same = of_difference < ALPHA, of_equivalence < ALPHA
        p_holm, p_equivalence = np.where(active, (of_difference, of_equivalence), (p_holm, p_equivalence))
        equivalent = active & (same | (s.identical & (margin is not None)))
        decided = equivalent | (active & different)
        verdict = np.where(decided, np.where(equivalent, EQUIVALENT, np.where(up, LARGER, SMALLER)), verdict)
        power = np.where(active, _predictive_power(s, k, looks, margin, family, different, same), power)
        undecided = LAST_LOOK if n == looks[-1] else np.where(power < hopeless, HOPELESS_STOP, RUNNING)
        look, stopped = np.where(active, n, look), np.where(active, np.where(decided, DECIDED, undecided), stopped)
    p = np.where(latest.mean > 0, up_p, down_p)
    return Decisions(look, stopped, verdict, p, p_holm, p_equivalence, power, *latest)


def _statistics(baseline: Floats, arms: Floats, n: int, margin: float | None) -> _Look:
    base, values = baseline[..., None, :n], arms[..., :n]
    d = values - base
    rounding = ROUNDING * np.maximum(abs(values).max(axis=-1), abs(base).max(axis=-1))
    identical = abs(d).max(axis=-1) <= np.minimum(rounding, np.inf if margin is None else margin)
    constant = (np.ptp(d, axis=-1) <= rounding) & ~identical
    return _Look(d.mean(axis=-1), d.std(axis=-1, ddof=1) / math.sqrt(n), identical, constant)


def _ratio(mean: Floats, s: _Look) -> Floats:
    """Return the t statistic; NaN without spread."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(s.identical | s.constant, np.nan, mean / s.se)


def _tost(s: _Look, margin: float | None, k: int, looks: Looks) -> Floats:
    """Return the larger p of two one-sided tests against ±margin (Schuirmann 1987), both at this look.

    Where the true difference is -margin, (mean + margin) / se is the t statistic of the null hypothesis.
    """
    if margin is None:
        return np.ones_like(s.mean)
    return p_values(_ratio(margin - abs(s.mean), s), k, looks, 1)


def _predictive_power(
    s: _Look, k: int, looks: Looks, margin: float | None, family: int, different: Bools, same: Bools
) -> Floats:
    """Return the chance of a verdict at a later look, given the mean and sd so far.

    Conditional power (Lan, Simon & Halperin 1982) takes them as the true ones, which with 3 seeds drops many arms that
    differ. Averaged over what the true mean may be (predictive power, Spiegelhalter, Freedman & Blackburn 1986, with a
    flat prior), the mean over N seeds has Student's t distribution around the present one, with n - 1 degrees of
    freedom and the scale sd sqrt(1/n - 1/N); sd is taken to stay. The result is the chance at the best of the later
    looks, at the critical values of alpha divided by the number of arms not found to differ (or to be equivalent) so
    far. Without spread: 0 if the arm is identical to the baseline, 1 if it differs by a constant.
    """
    n, best = looks[k], np.zeros_like(s.mean)
    of_difference, of_equivalence = (
        _holm_boundaries(looks, sides, family)[(family - rejected.sum(axis=-1, keepdims=True)).clip(min=1) - 1]
        for sides, rejected in ((2, different), (1, same))
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # se is 0 without spread
        for j in range(k + 1, len(looks)):
            root, scale = math.sqrt(looks[j] / n), 1 / math.sqrt(looks[j] / n - 1)
            t, c = s.mean / s.se * root * scale, of_difference[..., j] * scale
            chance = special.stdtr(n - 1, t - c) + special.stdtr(n - 1, -t - c)
            if margin is not None:
                half = (margin / s.se * root - of_equivalence[..., j]) * scale
                chance += np.maximum(special.stdtr(n - 1, t + half) - special.stdtr(n - 1, t - half), 0)
            best = np.maximum(best, chance)
    return np.where(s.identical, 0.0, np.where(s.constant, 1.0, best.clip(max=1)))


@lru_cache(maxsize=64)
def _holm_boundaries(looks: Looks, sides: int, family: int) -> Floats:
    """Return the critical values (family, K) at alpha, alpha / 2, ..., alpha / family."""
    levels = special.logit(ALPHA / np.arange(1, family + 1))
    return np.array([np.interp(levels, GRID, row) for row in _table(looks, sides)]).T
