"""Compare finished runs with other runs, or with a published number. No torch at import."""

import difflib
import glob
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from scipy import special

from reslab.ablation.resolve import read_mapping
from reslab.ablation.statistics import ALPHA, MIN_SEEDS, ROUNDING, Mode, paired_bootstrap, summarise
from reslab.ablation.study import change_text
from reslab.ablation.wording import Unit, count, interval, named, probability
from reslab.diff import differences
from reslab.errors import UserError
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

RESAMPLES = 10_000
MOST_PAIRS = 25  # of runs without a common seed, compared image by image
MOST_ROWS = 10  # of a list on the terminal
FINGERPRINT = ("files", "split", "classes")  # of the manifest's `data`
PAIRED, WELCH, PREDICTION = "paired t test", "Welch's t test", "prediction interval"
STOPPING = (
    "Comparing again after every added run until p falls below 0.05 gives false verdicts far more often than in 5 % of "
    "cases: fix the number of runs beforehand."
)
SINGLE_NUMBER = (
    "A plausible number may still come from a better or worse recipe: the interval is as wide as the spread between "
    "runs. An implausible one shows that something differs, not what: the recipe, the code, the data, or that the best "
    "of several runs was published."
)
PUBLISHED = "Nothing shows that a published number was measured as these runs were: check the data, split and protocol."
MCNEMAR = "A McNemar test compares two trained networks on these images, not the recipes; its p is not adjusted."
BOOTSTRAP = "With few seeds this interval covers less than 95 %; the verdict does not use it."
Report = dict[str, Any]


class Run(NamedTuple):
    """A finished run."""

    path: Path
    seed: int
    value: float  # of the metric
    config: dict[str, Any]
    data: dict[str, Any]  # hashes that identify the data
    commit: str | None


class Omitted(NamedTuple):
    """A run that is left out, and why; leaving out a diverged one favors its group."""

    path: Path
    reason: str
    diverged: bool = False


@dataclass
class Group:
    """Runs of one recipe, ordered by seed."""

    name: str
    runs: list[Run] = field(default_factory=list)
    omitted: list[Omitted] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        return [run.value for run in self.runs]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


class Sample(NamedTuple):
    """Size, mean and standard deviation (n - 1; None with n = 1) of the values of a group."""

    n: int
    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(len(values), float(np.mean(values)), sd)


@dataclass(frozen=True)
class Test:
    """A t test of a difference; None where no test applies."""

    name: str
    delta: float
    low: float | None = None  # 95 % interval of the difference
    high: float | None = None
    p: float | None = None  # two-sided
    p_equivalence: float | None = None  # two one-sided tests against ±margin (Schuirmann 1987)


class Terms(NamedTuple):
    """What is compared, and how."""

    metric: str
    mode: Mode  # whether a large ("max") or a small ("min") metric is good
    margin: float | None  # differences below it do not matter


def compare_runs(
    run: Sequence[str], against: Sequence[str] | None, metric: str, margin: float | None, published: str | None,
    published_error: str | None, published_sd: str | None, published_n: int | None, as_json: bool, out: Path | None,
) -> None:  # fmt: skip
    """Compare runs with `against` or with a published number, and print the result; write a page to `out`."""
    _check_options(margin, published or published_error, published_sd, published_n)
    terms = Terms(metric, "min" if metric.endswith("loss") else "max", margin)
    a, b = read_group("RUN", run, metric), Group("published")
    if against:
        b = read_group("--against", against, metric)
        report = of_groups(a, b, terms)
    else:
        option, text = ("--published", published) if published else ("--published-error", published_error)
        number = read_published(option, str(text), published_sd, published_n, a.values, terms.mode)
        report = of_published(a, *number, terms)
    report = json.loads(json.dumps(report, default=str), parse_constant=lambda constant: None)  # finite or None
    if out:
        from reslab.ablation.compare_page import write_page  # imports matplotlib

        write_page(report, [(group.name, [run.path for run in group.runs]) for group in (a, b)], out)
    report["page"] = str(out) if out else None
    print(json.dumps(report, indent=2, ensure_ascii=False) if as_json else as_text(report, sys.stdout.isatty()))


def _check_options(margin: float | None, number: str | None, sd: str | None, n: int | None) -> None:
    if margin is not None and not 0 < margin < math.inf:
        raise UserError(f"--margin must be positive, in the metric's own unit (0.002 is 0.2 points); got {margin}")
    if number is None and (sd, n) != (None, None):
        raise UserError("--published-sd and --published-n require --published or --published-error")
    if (sd is None) != (n is None):
        raise UserError("--published-sd and --published-n require each other: the sd over runs, and how many runs")
    if n is not None and n < 2:
        raise UserError(f"--published-n must be at least 2, got {n}: without an sd, leave out both options")
    if number is not None and n is None and margin is not None:
        raise UserError("--margin requires --published-sd and --published-n: one number cannot show equivalence")


# Runs


def read_group(option: str, patterns: Sequence[str], metric: str) -> Group:
    """Read the finished runs in directories or globs; raise UserError if there are none."""
    group, paths = Group(option), dict[Path, Path]()
    for path in (path for pattern in patterns for path in _expand(option, pattern)):
        found = _runs_in(path)
        paths |= {run.resolve(): run for run in found} if isinstance(found, list) else {}
        group.omitted += [] if isinstance(found, list) else [Omitted(path, found)]
    for path in paths.values():
        read = read_run(path, metric)
        if isinstance(read, Run):
            group.runs.append(read)
        else:
            group.omitted.append(read)
    group.runs.sort(key=lambda run: run.seed)
    _omit_repeats(group)
    if not group.runs:
        raise UserError("\n  ".join([f"{option}: no finished run", *_omissions(group)]))
    return group


def _expand(option: str, pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    matches = glob.glob(os.path.join(path, ""), recursive=True)  # noqa: PTH207: the pattern may be absolute; directories only
    if found := [path] if path.exists() else sorted(map(Path, matches)):
        return found
    parent = next(folder for folder in path.parents if folder.is_dir())
    missing, *rest = path.relative_to(parent).parts
    there = sorted(folder.name for folder in parent.iterdir() if folder.is_dir())
    near = [str(parent.joinpath(name, *rest)) for name in difflib.get_close_matches(missing, there, 1)]
    hint = f"did you mean {near[0]}?" if near else f"{parent} holds {named(there) or 'no directory'}"
    raise UserError(f"{option}: {pattern} does not exist: {hint}")


def _runs_in(path: Path) -> list[Path] | str:
    """Return the run directory, or the run directories in a directory; if there are none, the reason."""
    path = path.parent if path.name == "manifest.json" else path
    if not path.is_dir():
        return "not a run directory"
    if RunFolder(path).manifest.exists():
        return [path]
    runs = sorted({*(manifest.parent for manifest in path.glob("*/manifest.json")), *path.glob("seed-*/")})
    groups = sorted({str(manifest.parent.parent) for manifest in path.glob("*/*/manifest.json")})
    if not runs and groups:
        return f"it holds several groups of runs: name one of them ({named(groups)})"
    return runs or "it holds no run"


def read_run(path: Path, metric: str) -> Run | Omitted:
    """Read a finished run that logged the metric; anything else is omitted with the reason."""
    folder = RunFolder(path)
    if not folder.manifest.exists():
        return Omitted(path, "not started: it has no manifest.json")
    try:
        manifest = manifests.read(folder.manifest)
        status, seed, results = manifest["status"], int(manifest["seed"]), manifest.get("results") or {}
        if status != "complete":
            return Omitted(path, f"unfinished: its status is {status}", diverged=status == "diverged")
        data, commit = manifest.get("data") or {}, (manifest.get("git") or {}).get("sha")
        identity, logged = {name: data.get(name) for name in FINGERPRINT}, sorted(results)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        return Omitted(path, f"its manifest.json is damaged ({type(error).__name__})")
    if metric not in results:
        near = difflib.get_close_matches(metric, logged, len(logged) or 1, 0) or ["nothing"]
        return Omitted(path, f"it does not log {metric}; it logs {', '.join(near)}")
    value = results[metric]
    if not isinstance(value, int | float) or not math.isfinite(value):
        return Omitted(path, f"its {metric} is not finite", diverged=True)
    try:
        return Run(path, seed, float(value), read_mapping(folder.config), identity, commit)
    except UserError as error:
        return Omitted(path, str(error))


def _omit_repeats(group: Group) -> None:
    """Leave out runs with the seed and config of an earlier one: an exact repeat is not a further sample."""
    kept: list[Run] = []
    for run in group.runs:
        same = [other for other in kept if other.seed == run.seed and not config_differences(other, run)]
        if same:
            group.omitted.append(Omitted(run.path, f"it repeats {same[0].path}: same seed and config"))
        else:
            kept.append(run)
    group.runs = kept


def config_differences(there: Run, here: Run) -> list[tuple[str, Any, Any]]:
    """Return the config keys in which two runs differ, apart from the seed and from where they were executed."""
    ignored = (*manifests.NOT_IDENTITY, "seed_everything", "run.name")
    return [row for row in differences(there.config, here.config) if not row[0].startswith(ignored)]


def _omissions(group: Group) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for run in group.omitted:
        by_reason.setdefault(run.reason, []).append(str(run.path))
    return [f"{named(paths)}: {reason}" for reason, paths in by_reason.items()]


def _name(a: Group, b: Group) -> None:
    """Name the groups by the directory that holds their runs, or the run itself; A and B if these are the same."""
    paths = [os.path.commonpath([str(run.path.resolve()) for run in group.runs] or ["/published"]) for group in (a, b)]
    names = [Path(path).name for path in paths]
    a.name, b.name = names if names[0] != names[1] else paths if paths[0] != paths[1] else ("A", "B")


# Tests


def t_test(name: str, delta: float, se: float, df: float, scale: float, margin: float | None) -> Test:
    """Compare delta / se with Student's t; `scale` is the magnitude of the values, below which all is rounding."""
    if se <= ROUNDING * scale:  # without spread, only equality can be told
        same = abs(delta) <= min(ROUNDING * scale, margin or math.inf)
        return Test(name, delta, delta, delta, 1.0, 0.0 if margin else None) if same else Test(name, delta)
    half = special.stdtrit(df, 1 - ALPHA / 2) * se
    p = 2 * special.stdtr(df, -abs(delta) / se)
    p_equivalence = None if margin is None else float(special.stdtr(df, (abs(delta) - margin) / se))
    return Test(name, delta, float(delta - half), float(delta + half), float(p), p_equivalence)


def paired(a: Sequence[float], b: Sequence[float], margin: float | None = None) -> Test:
    """Test the differences of runs with the same seeds, as `statistics.compare` does."""
    d = np.subtract(a, b)
    se = d.std(ddof=1) / math.sqrt(len(d))
    return t_test(PAIRED, float(d.mean()), se, len(d) - 1, np.abs([*a, *b]).max(), margin)


def welch(a: Sample, b: Sample, margin: float | None = None) -> Test:
    """Test the difference of the means of two independent groups with unequal variances (Welch 1947)."""
    delta = a.mean - b.mean
    if a.sd is None or b.sd is None:
        return Test(WELCH, delta)
    va, vb = a.sd**2 / a.n, b.sd**2 / b.n
    df = (va + vb) ** 2 / ((va**2 / (a.n - 1) + vb**2 / (b.n - 1)) or 1)
    return t_test(WELCH, delta, math.sqrt(va + vb), df, max(abs(a.mean), abs(b.mean)), margin)


def prediction(a: Sample, value: float) -> Test:
    """Test whether `value` may be one more run: it lies within mean ± t·sd·√(1 + 1/n) (Hahn and Meeker 1991, 4.8).

    The interval is that of the difference of the mean and the value, as in the other tests.
    """
    if a.sd is None:
        return Test(PREDICTION, a.mean - value)
    return t_test(PREDICTION, a.mean - value, a.sd * math.sqrt(1 + 1 / a.n), a.n - 1, abs(a.mean), None)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p of McNemar's test: the binomial test of one half among the images they differ in."""
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


# Published numbers


def read_published(
    option: str, text: str, sd_text: str | None, n: int | None, values: Sequence[float], mode: Mode
) -> tuple[Sample, str]:
    """Return a published result in the unit of the runs' `values`, and a sentence that says how it was read.

    Where the values are shares in [0, 1] of which more is better, the number is a percentage or a share.
    """
    number, percent = _number(option, text)
    error, mean = option == "--published-error", float(np.mean(values))
    if not _are_shares(values, mode):
        if error or percent:
            raise UserError(f"{option} {text}: the runs' metric ({mean:.6g} on average) is not a share in [0, 1]")
        note = f"{text} is taken as it is: the runs' metric is {mean:.6g} on average."
        return Sample(n or 1, number, None if sd_text is None else _spread(sd_text, 1)), note
    percent = percent or _is_percent(option, text, number, 1 - mean if error else mean)
    share = number / 100 if percent else number
    if not 0 <= share <= 1:
        raise UserError(f"{option} must be between 0 and 100 %, got {text}")
    share, what = (1 - share, "error rate") if error else (share, "value")
    sd = None if sd_text is None else _share_spread(sd_text, percent)
    note = (
        f"{text} is taken as {'a percentage' if percent else 'a share'}: the published {what} means {100 * share:.6g} %"
    )
    note += "" if sd is None else f" with an sd of {100 * sd:.3g} points"
    return Sample(n or 1, share, sd), f"{note}, and the runs have {100 * mean:.6g} % on average."


def _are_shares(values: Sequence[float], mode: Mode) -> bool:
    return mode == "max" and all(0 <= value <= 1 for value in values)


def _number(option: str, text: str) -> tuple[float, bool]:
    """Return the number, and whether it is marked as a percentage."""
    stripped = text.strip()
    try:
        number = float(stripped.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{option} must be a number such as 91.25, 91.25% or 0.9125; got {text!r}")
    return number, stripped.endswith("%")


def _is_percent(option: str, text: str, number: float, near: float) -> bool:
    """Return whether a number without a sign is a percentage; refuse one that may be either."""
    if number > 1:
        return True
    if number == 1 or (number and abs(number / 100 - near) < abs(number - near)):
        raise UserError(f"{option} {text} is ambiguous: write {number:g}% or {100 * number:g}%")
    return False


def _share_spread(text: str, percent: bool) -> float:
    """Return a published sd as a share; without a sign it is on the scale of the published value."""
    marked = _number("--published-sd", text)[1]
    sd = _spread(text, 100 if percent or marked else 1)
    if not marked and not 5e-5 <= sd <= 0.1:
        number, scale = _spread(text, 1), "in points" if percent else "as a share"
        raise UserError(f"--published-sd {text} is implausible {scale}: write {number:g}% or {100 * number:g}%")
    return sd


def _spread(text: str, divisor: float) -> float:
    sd = _number("--published-sd", text)[0]
    if sd <= 0:
        raise UserError(f"--published-sd must be positive, got {text}")
    return sd / divisor


# Report


def of_groups(a: Group, b: Group, terms: Terms) -> Report:
    """Return the comparison of two groups of runs: see docs/compare.md for the keys."""
    if both := {run.path.resolve() for run in a.runs} & {run.path.resolve() for run in b.runs}:
        raise UserError(f"these runs are in both groups: {named(sorted(map(str, both)))}")
    _name(a, b)
    if unpaired := _unpaired(a.seeds, b.seeds):
        test, why = (
            welch(Sample.of(a.values), Sample.of(b.values), terms.margin),
            f"not paired by seed, because {unpaired}",
        )
    else:
        test, why = paired(a.values, b.values, terms.margin), "paired by seed, because both groups have the same seeds"
    changes, other_data = config_differences(b.runs[0], a.runs[0]), _data_differences([*a.runs, *b.runs])
    parts: Report = {
        "test_reason": f"{test.name}: {why}",
        "config_differences": [{"key": key, "against": there, "runs": here} for key, there, here in changes],
        "not_comparable": other_data,
        "warnings": [*_warnings((a, b), terms.metric), *_same_recipe(a, b, changes)],
        "per_image": per_image(a, b, terms.metric),
    }
    refusal = (
        ["the data differ"]
        if other_data
        else [*_few(a.name, len(a.runs)), *_few(b.name, len(b.runs)), *_diverged(a, b)]
    )
    return _judged((_described(a), _described(b)), test, refusal, terms) | parts


def of_published(a: Group, other: Sample, note: str, terms: Terms) -> Report:
    """Return the comparison of runs with a published number: a Welch test, or the prediction interval of one run."""
    _name(a, Group("published"))
    mine, alone = Sample.of(a.values), other.sd is None
    test = prediction(mine, other.mean) if alone else welch(mine, other, terms.margin)
    known = "a number without its sd and number of runs" if alone else "the mean, sd and number of runs of both"
    parts: Report = {
        "test_reason": f"{test.name}: from {known}",
        "config_differences": [],
        "not_comparable": None,
        "warnings": [note, *([SINGLE_NUMBER] if alone else []), PUBLISHED, *_warnings([a], terms.metric)],
        "per_image": {"reason": "a published number has no predictions"},
    }
    refusal = [*_few(a.name, mine.n), *([] if alone else _few("published", other.n)), *_diverged(a)]
    group = {"name": "published", **other._asdict(), "ci_low": None, "ci_high": None, "runs": [], "omitted": []}
    return _judged((_described(a), group), test, refusal, terms) | parts


def _described(group: Group) -> Report:
    runs = [{"path": str(run.path), "seed": run.seed, "value": run.value} for run in group.runs]
    omitted = [{"path": str(run.path), "reason": run.reason} for run in group.omitted]
    return {"name": group.name, **vars(summarise(group.values)), "runs": runs, "omitted": omitted}


def _unpaired(a: Sequence[int], b: Sequence[int]) -> str:
    """Return why two groups cannot be paired by seed; empty if they can. Both are sorted."""
    if repeated := sorted({seed for seeds in (a, b) for seed in seeds if seeds.count(seed) > 1}):
        return f"seed {repeated[0]} occurs more than once in a group"
    if single := sorted({*a} ^ {*b}):
        return f"only one group has seed {', '.join(map(str, single[:5]))}{' and others' * (len(single) > 5)}"
    return "" if len(a) >= MIN_SEEDS else f"pairs require at least {MIN_SEEDS} common seeds"


def _few(name: str, n: int) -> list[str]:
    return [f"a verdict requires at least {MIN_SEEDS} finished runs, {name} has {n}"] if n < MIN_SEEDS else []


def _diverged(*groups: Group) -> list[str]:
    diverged = [str(run.path) for group in groups for run in group.omitted if run.diverged]
    return [f"leaving out diverged runs favors their group ({named(diverged)})"] if diverged else []


def _data_differences(runs: Sequence[Run]) -> str | None:
    keys = sorted({key for run in runs for key, _, _ in differences(runs[0].data, run.data)})
    return f"Not comparable: the runs used different data ({', '.join(keys)} in manifest.json)." if keys else None


def _warnings(groups: Iterable[Group], metric: str) -> Iterable[str]:
    for group in groups:
        first, *others = group.runs
        if keys := sorted({key for run in others for key, _, _ in config_differences(first, run)}):
            yield f"The runs of {group.name} are not replicates, because their configs differ: {named(keys)}."
        yield from (f"Left out of {group.name}: {line}." for line in _omissions(group))
    if not metric.startswith("test/"):
        yield f"{metric} does not show how the runs perform on the test set."


def _same_recipe(a: Group, b: Group, changes: Sequence[Any]) -> Iterable[str]:
    commits = sorted({str(run.commit)[:12] for run in (*a.runs, *b.runs)})
    if len(commits) > 1:
        yield f"The runs were made by different code: commits {named(commits)}."
    elif not changes:
        yield "The configs of the two groups do not differ."


def _judged(groups: tuple[Report, Report], test: Test, refusal: Sequence[str], terms: Terms) -> Report:
    """Return the test and its verdict; a refused verdict has no p value, and a reason."""
    p, p_equivalence = (None, None) if refusal else (test.p, test.p_equivalence)
    report: Report = {
        "question": _question(groups, test, terms),
        **terms._asdict(),
        "groups": groups,
        "test": test.name,
        "delta": test.delta,
        "delta_ci_low": test.low,
        "delta_ci_high": test.high,
        "p": p,
        "p_equivalence": p_equivalence,
        "verdict": None if refusal else judge(test, terms.mode),
        "reason": "; ".join(refusal) or ("every run gives the same result, so no test applies" if p is None else ""),
    }
    unit = unit_of(report)
    return report | {"unit": "points" if unit.percent else None, "sentences": [*_sentences(report, unit)]}


def judge(test: Test, mode: Mode) -> str:
    """Return the verdict, with the rules of `statistics.compare`; a single number is a plausible run or not."""
    if test.p is None:
        return "inconclusive"
    if test.name == PREDICTION:
        return "plausible" if test.p >= ALPHA else "implausible"
    if test.p_equivalence is not None and test.p_equivalence < ALPHA:
        return "equivalent"
    if test.p >= ALPHA:
        return "inconclusive"
    return "better" if (test.delta > 0) == (mode == "max") else "worse"


def unit_of(report: Report) -> Unit:
    """Return the unit of a report: points only if the accuracies of the runs are logged as shares."""
    groups = report["groups"]
    values = [run["value"] for group in groups for run in group["runs"]]
    metric = report["metric"] if _are_shares(values, report["mode"]) else ""
    return Unit.of({"metric": metric, "arms": dict(enumerate(groups))})


def _question(groups: Sequence[Report], test: Test, terms: Terms) -> str:
    a, b = (group["name"] for group in groups)
    if test.name == PREDICTION:
        return f"{terms.metric}: is the published number a plausible single run of {a}?"
    return f"{terms.metric}: is {a} better than {b}? ({'Higher' if terms.mode == 'max' else 'Lower'} is better.)"


def _sentences(report: Report, unit: Unit) -> Iterable[str]:
    """Yield the verdict in plain words and in one unit, then what qualifies it."""
    a, b = (group["name"] for group in report["groups"])
    delta, margin, verdict = report["delta"], report["margin"], report["verdict"]
    sizes = [group["n"] for group in report["groups"] if group["runs"] or group["n"] > 1]
    n = f"n = {sizes[0]} seeds" if report["test"] == PAIRED else f"n = {' and '.join(map(str, sizes))} runs"
    evidence = (
        [f"95 % interval {interval(report, 'delta_ci', unit, True)}"] if report["delta_ci_low"] is not None else []
    )
    equivalent = verdict == "equivalent" and report["p_equivalence"] is not None
    p = report["p_equivalence" if equivalent else "p"]
    evidence += [f"p {probability(p)}{' of two one-sided tests' * equivalent}"] if p is not None else []
    details = f"({', '.join([*evidence, n, report['test']])})"
    size = unit.number(abs(delta)) + " points" * unit.percent
    difference = f"the difference is {unit.difference(delta)} {details}"
    yield {
        "better": f"{a} is better than {b} by {size} {details}.",
        "worse": f"{a} is worse than {b} by {size} {details}.",
        "equivalent": f"{a} is equivalent to {b} within ±{unit.exact(margin or 0)}: {difference}.",
        "inconclusive": f"{a} vs. {b} is inconclusive: {difference}.",
        "plausible": f"The published number is a plausible single run of {a}: {difference}.",
        "implausible": f"The published number is not a plausible single run of {a}: {difference}.",
    }.get(verdict, f"No verdict on {a} vs. {b}: {report['reason']}. So far {difference}.")
    if verdict == "inconclusive":
        yield f"{report['reason'].capitalize()}." if report["reason"] else STOPPING
    if verdict == "equivalent" and report["p"] < ALPHA:
        yield f"The difference is significant (p {probability(report['p'])}) but smaller than the margin."
    if (
        verdict in ("better", "worse")
        and margin
        and min(abs(report[f"delta_ci_{end}"]) for end in ("low", "high")) < margin
    ):
        yield f"The difference may be smaller than the margin of {unit.exact(margin)}."


# Images


def per_image(a: Group, b: Group, metric: str) -> Report:
    """Compare which test images the runs classify correctly: McNemar per pair, bootstrap over seeds and images."""
    if not metric.startswith("test/"):
        return {"reason": f"the metric is {metric}: test predictions are not used to choose between runs"}
    correct: dict[Path, Any] = {}
    first: Any = None
    for run in (*a.runs, *b.runs):
        images, correct[run.path] = _correct(run.path)
        if images is None:
            return {"reason": f"{run.path} has no readable predictions.npz"}
        first = images if first is None else first
        if not np.array_equal(first, images):
            return {"reason": f"{run.path} was not tested on the same images as {a.runs[0].path}"}
    rows = [_pair(x, y, correct[x.path], correct[y.path]) for x, y in _pairs(a, b)]
    report: Report = {"images": len(first), "pairs": rows, "bootstrap": None}
    if (a.seeds == b.seeds and len({*a.seeds}) == len(a.seeds)) or len(a.runs) == len(b.runs) == 1:
        right_a, right_b = (np.stack([correct[run.path] for run in group.runs]) for group in (a, b))
        delta, low, high = paired_bootstrap(right_a, right_b, RESAMPLES, np.random.default_rng(0))
        report["bootstrap"] = {"seeds": len(a.runs), "delta": delta, "ci_low": low, "ci_high": high}
    return report


def _correct(run: Path) -> tuple[Any, Any]:
    """Return index and label (M, 2) of the test images, and whether each is classified correctly; (None, None)."""
    try:  # runs.figures has a reader, too, but imports matplotlib
        with np.load(RunFolder(run).predictions) as file:
            index, label, prediction = (file[name] for name in ("index", "label", "prediction"))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None, None
    return (np.stack([index, label], axis=1), prediction == label) if len(label) else (None, None)


def _pairs(a: Group, b: Group) -> list[tuple[Run, Run]]:
    """Return the pairs of runs with the same seed; if there are none, all pairs if they are few, else one per run."""
    everything = [(x, y) for x in a.runs for y in b.runs]
    if same := [(x, y) for x, y in everything if x.seed == y.seed]:
        return same
    return everything if len(everything) <= MOST_PAIRS else list(zip(a.runs, b.runs, strict=False))


def _pair(x: Run, y: Run, right_x: Any, right_y: Any) -> Report:
    only_x, only_y = int((right_x & ~right_y).sum()), int((right_y & ~right_x).sum())
    pair = {"runs": str(x.path), "against": str(y.path), "seed": x.seed if x.seed == y.seed else None}
    return pair | {"only_runs": only_x, "only_against": only_y, "p": mcnemar(only_x, only_y)}


# Output


def as_text(report: Report, color: bool = False) -> str:
    """Return the report for a terminal: question, table, sentences, config differences, images, warnings."""
    unit = unit_of(report)
    lines = [report["question"], "", *_table(table_rows(report, unit)), "", *report["sentences"]]
    lines += [f"{report['test_reason']}."]
    if report["config_differences"]:
        lines += ["", "Config differences (against → runs):"]
        lines += _some([f"  {change_text(*row.values())}" for row in report["config_differences"]])
    lines += ["", *images_text(report["per_image"])]
    if report["not_comparable"]:
        lines += ["", f"\033[1m{report['not_comparable']}\033[0m" if color else report["not_comparable"]]
    lines += ["", *(f"Note: {warning}" for warning in report["warnings"])] if report["warnings"] else []
    return "\n".join([*lines, f"page  {report['page']}"] if report["page"] else lines)


def table_rows(report: Report, unit: Unit) -> list[list[str]]:
    """Return the table of the groups, the header first."""
    scale = " (%)" if unit.percent else ""
    rows = [["group", "n", f"mean ± sd{scale}", f"difference{unit.difference_unit}", "95 % interval", "verdict"]]
    test = [unit.signed(report["delta"]), interval(report, "delta_ci", unit, True), report["verdict"] or "no verdict"]
    for i, group in enumerate(report["groups"]):
        mean = unit.number(group["mean"]) + (f" ± {unit.number(group['sd'])}" if group["sd"] is not None else "")
        rows.append([group["name"], str(group["n"]), mean, *(["", "", ""] if i else test)])
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _some(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MOST_ROWS
    return [*lines[:MOST_ROWS], *([f"  and {more} more (--json and --out list all)"] if more > 0 else [])]


def images_text(images: Report) -> list[str]:
    """Return the comparison image by image as lines."""
    if "reason" in images:
        return [f"No comparison image by image: {images['reason']}."]
    pairs = [
        f"  {row['runs']} vs. {row['against']}: {row['only_runs']} to {row['only_against']}, p {probability(row['p'])}"
        for row in images["pairs"]
    ]
    lines = [f"Images that only one of two runs classifies correctly, of {images['images']:,} (exact McNemar test):"]
    lines += [*_some(pairs), MCNEMAR]
    if boot := images["bootstrap"]:
        points, over = Unit(percent=True, decimals=2), count(boot["seeds"], "seed")
        ends = interval(boot, "ci", points, True)
        text = f"Difference in accuracy over {over} × {images['images']:,} images: {points.difference(boot['delta'])}"
        lines.append(f"{text} (95 % bootstrap interval {ends}). {BOOTSTRAP}")
    return lines
