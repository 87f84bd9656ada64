"""Simulate the statistics of ablations and print the tables of docs/statistics.md.

    python benchmarks/sequential_design.py [TABLE ...] [--replications 20000]

Without a name, all tables are printed (about five minutes on one core). The seeds are fixed. The simulated procedures
are those of reslab.ablation: `sequential.decide` and `dunnett` work on many studies at once.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import special, stats

from reslab.ablation import dunnett, sequential
from reslab.ablation.sequential import ALPHA, Floats
from reslab.ablation.statistics import simulated_error

LOOKS = ((3, 5, 8, 12, 20), (3, 4, 5, 6, 7, 8, 9, 10), (5, 10))
ARMS = (1, 3, 10)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def name(looks: Sequence[int]) -> str:
    every = len(looks) > 5 and set(np.diff(looks)) == {1}
    return f"{looks[0]}, {looks[1]}, … {looks[-1]}" if every else ", ".join(map(str, looks))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def error(share: float, n: int) -> str:
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / n):.1f} %"


def null(kind: str, rng: np.random.Generator, arms: int, seeds: int, n: int) -> tuple[Floats, Floats]:
    """Return baseline (n, seeds) and arms (n, arms, seeds) of the same mean."""
    shape = (n, arms + 1, seeds)
    if kind == "exponential":
        x = rng.exponential(size=shape) - 1
    elif kind == "t, 3 df":
        x = rng.standard_t(3, size=shape)
    else:
        x = rng.standard_normal(shape)
    if kind == "spread × 3":
        x[:, 1::2] *= 3
    if kind == "exponential arms":
        x[:, 1:] = rng.exponential(size=(n, arms, seeds)) - 1
        x[:, 0] *= 0.1
    return x[:, 0], x[:, 1:]


# Planned looks


def spending(n: int) -> None:
    """Compare alpha-spending functions: expected seeds and power of one arm, and the fixed n of the same power."""
    families: dict[str, sequential.Spending] = {f"α t^{rho}": power_family(rho) for rho in (0.5, 1, 1.5, 2, 3)}
    families["Pocock-like"] = lambda t, alpha: alpha * np.log(1 + (math.e - 1) * t)
    families["O'Brien-Fleming-like"] = lambda t, alpha: 2 * special.ndtr(special.ndtri(alpha / 2) / math.sqrt(t))
    for looks in LOOKS:
        print(f"\nLooks at {name(looks)}, α = 5 %, one arm, {n:,} replications\n")
        noise = np.random.default_rng(1).standard_normal((n, looks[-1]))
        rows = []
        for family, function in families.items():
            critical = sequential.boundaries(looks, ALPHA, 2, function)
            row = [family, f"{critical[0]:.1f}"]
            for effect in (0, 1, 2, 3):
                seeds, power = stops(noise + effect, looks, critical)
                same = f", fixed {fixed_seeds(effect, power):.1f}" if 0 < effect < 2 else ""
                row.append(f"{seeds:.1f} ({percent(power)}{same})")
            rows.append(row)
        table(["spending", "first critical value", "no effect", "1 sd", "2 sd", "3 sd"], rows)


def power_family(rho: float) -> sequential.Spending:
    return lambda fraction, alpha: alpha * fraction**rho


def stops(d: Floats, looks: Sequence[int], critical: Sequence[float]) -> tuple[float, float]:
    """Return the mean number of seeds until |T| crosses its boundary, and the share of rows that do."""
    seeds, crossed = np.full(len(d), looks[-1]), np.zeros(len(d), bool)
    for look, c in zip(looks, critical, strict=True):
        x = d[:, :look]
        new = ~crossed & (abs(x.mean(axis=1)) * math.sqrt(look) >= c * x.std(axis=1, ddof=1))
        seeds[new], crossed = look, crossed | new
    return float(seeds.mean()), float(crossed.mean())


def fixed_seeds(effect: float, power: float, alpha: float = ALPHA) -> float:
    """Return the number of seeds, interpolated, at which one t test has this power."""
    n = np.arange(2, 60)
    powers = 1 - special.nctdtr(n - 1, effect * np.sqrt(n), special.stdtrit(n - 1, 1 - alpha / 2))
    return float(np.interp(power, powers, n))


def savings(n: int) -> None:
    """Compare expected seeds with those of a fixed design of the same power at 1 sd; hopeless arms are dropped."""
    print(f"\n{n:,} replications, no margin; the first arm has the effect, the others none\n")
    rows = []
    for looks in LOOKS:
        for arms in (1, 4):
            seeds, powers = [], []
            for effect in (0, 1, 2, 3):
                base, x = null("normal", np.random.default_rng(9), arms, looks[-1], n)
                x[:, 0] += effect * math.sqrt(2)
                decisions = sequential.decide(base, x, looks)
                seeds.append(f"{decisions.look[:, 0].mean():.1f}")
                powers.append(float((decisions.verdict[:, 0] == sequential.LARGER).mean()))
            fixed = fixed_seeds(1, powers[1], ALPHA / arms)
            rows.append([name(looks), str(arms), percent(powers[1]), f"{fixed:.1f}", *seeds])
    effects = ("no effect", "1 sd", "2 sd", "3 sd")
    table(["looks", "arms", "power at 1 sd", "seeds of the fixed design", *effects], rows)


def errors(n: int) -> None:
    """Print the family-wise error of better/worse under the null hypothesis, without dropping hopeless arms."""
    kinds = ("normal", "spread × 3", "exponential", "exponential arms", "t, 3 df")
    print(f"\n{n:,} replications, no margin, no arm dropped as hopeless\n")
    rows = []
    for looks in (*LOOKS, (5,)):
        for arms in ARMS:
            row = [name(looks), str(arms)]
            for kind in kinds:
                study = null(kind, np.random.default_rng(2), arms, looks[-1], n)
                wrong = sequential.decide(*study, looks, hopeless=0).verdict != sequential.NO_VERDICT
                row.append(error(wrong.any(axis=1).mean(), n))
            rows.append(row)
    table(["looks", "null arms", *kinds], rows)


def equivalence(n: int) -> None:
    """Print the family-wise error of `equivalent` where every arm differs by exactly the margin of 1.5 sd."""
    print(f"\n{n:,} replications, margin 1.5 sd of the paired difference, no arm dropped as hopeless\n")
    rows = []
    for looks in LOOKS:
        for arms in ARMS:
            base, x = null("normal", np.random.default_rng(3), arms, looks[-1], n)
            margin = 1.5 * math.sqrt(2)
            verdict = sequential.decide(base, x + margin, looks, margin, hopeless=0).verdict
            rows.append([name(looks), str(arms), error((verdict == sequential.EQUIVALENT).any(axis=1).mean(), n)])
    table(["looks", "arms at the margin", "any called equivalent"], rows)


def coverage(n: int) -> None:
    """Print how often the interval at the stop covers the true difference."""
    print(f"\n{n:,} replications, one arm, dropped if hopeless\n")
    rows = []
    for looks in LOOKS:
        row = [name(looks)]
        critical = np.array([np.nan, *sequential.boundaries(looks, ALPHA)])
        for effect in (0, 0.5, 1, 2):
            noise = np.random.default_rng(4).standard_normal((n, 1, looks[-1]))
            d = sequential.decide(np.zeros((n, looks[-1])), effect + noise, looks)
            covered = abs(d.mean - effect) <= critical[np.searchsorted(looks, d.look) + 1] * d.se
            row.append(error(covered.mean(), n))
        rows.append(row)
    table(["looks", "no effect", "0.5 sd", "1 sd", "2 sd"], rows)


def futility(n: int) -> None:
    """Print what dropping hopeless arms costs in power and saves in seeds."""
    looks = LOOKS[0]
    print(f"\nLooks at {name(looks)}, no margin, {n:,} replications: power (expected seeds of the arm)\n")
    rows = []
    for arms in (1, 4):
        for effect in (0, 0.7, 1, 2):
            row = [str(arms), f"{effect} sd"]
            base, x = null("normal", np.random.default_rng(5), arms, looks[-1], n)
            x[:, 0] += effect * math.sqrt(2)
            for bound in (0, 0.05, sequential.HOPELESS, 0.2):
                d = sequential.decide(base, x, looks, hopeless=bound)
                row.append(f"{percent((d.verdict[:, 0] == sequential.LARGER).mean())} ({d.look[:, 0].mean():.1f})")
            rows.append(row)
    table(["arms", "effect of the first", "never dropped", "below 5 %", "below 10 %", "below 20 %"], rows)


def unplanned(n: int) -> None:
    """Print the error of looks that nobody planned: the fixed tests, repeated."""
    print(f"\n{n:,} replications; margin 0.002, sd of a run 0.0017\n")
    margin = 0.002 / (0.0017 * math.sqrt(2))
    designs: dict[str, Sequence[int]] = {
        "5 seeds, fixed": [5],
        "after every seed, 3 to 10": range(3, 11),
        "after every seed, 3 to 20": range(3, 21),
        "at 5, 10, 15, 20": [5, 10, 15, 20],
    }
    rows = []
    for design, looks in designs.items():
        for of in (margin, None):
            shares = (simulated_error(looks, arms, of, n) for arms in ARMS)
            rows.append([design, "yes" if of else "no", *(error(share, n) for share in shares)])
    table(["procedure", "margin", *(f"{arms} null arm{'s' * (arms > 1)}" for arms in ARMS)], rows)


# The pooled test


def critical_dunnett(arms: int, df: int) -> float:
    low, high = 0.0, 200.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if dunnett.tail(middle, arms, df) > ALPHA else (low, middle)
    return low


def pooled_studies(x: Floats) -> tuple[Floats, Floats]:
    """Return |T| of every arm (n, A - 1), and whether the spreads allow pooling (n,), of values (n, A, seeds)."""
    spread = dunnett.spreads(x)
    allowed = ~dunnett.unequal(spread, x.shape[2]).any(axis=1)
    t = abs(x[:, 1:].mean(axis=2) - x[:, :1].mean(axis=2)) / (spread.sd[:, None] * math.sqrt(2 / x.shape[2]))
    return t, allowed


PATTERNS: dict[str, Callable[[int], slice]] = {
    "baseline": lambda arms: slice(0, 1),
    "baseline and one arm": lambda arms: slice(0, 2),
    "one arm": lambda arms: slice(1, 2),
    "half": lambda arms: slice(0, arms // 2),
}


def pooled(n: int) -> None:
    """Print the error of the pooled test where spreads differ: the worst of several patterns and ratios."""
    n //= 2
    print(f"\nWorst of ratios 1.2, 1.4, 1.7, 2, 3, 5 and noisy arms ({', '.join(PATTERNS)}); {n:,} replications each\n")
    rows = []
    for total in (3, 4, 6, 11):
        for seeds in (3, 4, 5, 8, 12, 20):
            without, checked, refused = worst_errors(total, seeds, n)
            cells = [error(without[0], n), without[1], error(checked[0], n), checked[1], percent(refused)]
            rows.append([str(total), str(seeds), *cells])
    table(["arms, with baseline", "seeds", "without check", "at", "with check", "at", "refused, equal spreads"], rows)


def worst_errors(total: int, seeds: int, n: int) -> tuple[tuple[float, str], tuple[float, str], float]:
    """Return the largest error without and with the check of spreads, and the share refused if spreads are equal."""
    c, rng = critical_dunnett(total - 1, (total - 1) * (seeds - 1)), np.random.default_rng(6)
    without, checked = [], []
    for ratio in (1.2, 1.4, 1.7, 2, 3, 5):
        for pattern, which in PATTERNS.items():
            x = rng.standard_normal((n, total, seeds))
            x[:, which(total)] *= ratio
            t, allowed = pooled_studies(x)
            wrong = t.max(axis=1) > c
            without.append((float(wrong.mean()), f"{pattern} × {ratio}"))
            checked.append((float((wrong & allowed).mean()), f"{pattern} × {ratio}"))
    _, allowed = pooled_studies(rng.standard_normal((n, total, seeds)))
    return max(without), max(checked), 1 - float(allowed.mean())


def pooled_power(n: int) -> None:
    """Print the power of paired and pooled tests: one of five arms differs, seeds do not correlate."""
    n //= 4
    print(f"\nFive arms, one differs by `effect` sd of a run; {n:,} replications\n")
    rows = []
    for seeds in (3, 5, 10):
        for effect in (1, 2, 3):
            x = np.random.default_rng(7).standard_normal((n, 6, seeds))
            x[:, 1] += effect
            d = x[:, 1:] - x[:, :1]
            t = d.mean(axis=2) / d.std(axis=2, ddof=1) * math.sqrt(seeds)
            paired = sequential.holm(2 * special.stdtr(seeds - 1, -abs(t)), 5)[:, 0] < ALPHA
            t, allowed = pooled_studies(x)
            significant = t[:, 0] > critical_dunnett(5, 5 * (seeds - 1))
            powers = (paired.mean(), significant.mean(), (significant & allowed).mean())
            rows.append([str(seeds), f"{effect} sd", *map(percent, powers)])
    table(["seeds", "effect", "paired, Holm", "pooled, Dunnett", "pooled, with the check of spreads"], rows)


def pooled_looks(n: int) -> None:
    """Print the error of a pooled test at the nominal levels of planned looks, checking the spreads at every look."""
    n //= 4
    looks = LOOKS[0]
    print(f"\nLooks at {name(looks)}, all arms run to the end, spreads checked at every look; {n:,} replications\n")
    nominal = 2 * stats.t.sf(sequential.boundaries(looks, ALPHA), np.array(looks) - 1)
    rows = []
    for arms in (3, 5, 10):
        for ratio in (1, 1.5, 2, 3):
            x = np.random.default_rng(8).standard_normal((n, arms + 1, looks[-1]))
            x[:, 0] *= ratio
            wrong, unchecked, running = np.zeros((3, n), bool)
            running[:] = True
            for look, level in zip(looks, nominal, strict=True):
                t, allowed = pooled_studies(x[..., :look])
                p = dunnett.tail(np.linspace(0, 12, 400), arms, arms * (look - 1))
                significant = np.interp(t.max(axis=1), np.linspace(0, 12, 400), p) < level
                unchecked |= significant
                wrong |= significant & allowed & running
                running &= allowed
            shares = error(unchecked.mean(), n), error(wrong.mean(), n), percent(1 - running.mean())
            rows.append([str(arms), str(ratio), *shares])
    table(["null arms", "spread of the baseline", "without check", "with check", "refused"], rows)


TABLES = {
    of.__name__: of
    for of in (
        spending,
        savings,
        errors,
        equivalence,
        coverage,
        futility,
        unplanned,
        pooled,
        pooled_power,
        pooled_looks,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--replications", type=int, default=20_000)
    options = parser.parse_args()
    for chosen in options.tables or TABLES:
        print(f"\n## {chosen}")
        TABLES[chosen](options.replications)


if __name__ == "__main__":
    main()
