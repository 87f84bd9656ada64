"""Compare finished runs with other runs, or with a published number. No torch at import."""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from scipy import special

from reslab.ablation.compare_inputs import (
    Group,
    Run,
    Sample,
    are_shares,
    config_differences,
    omissions,
    read_group,
    read_published,
)
from reslab.ablation.statistics import ALPHA, MIN_SEEDS, ROUNDING, Mode, paired_bootstrap, summarise
from reslab.ablation.study import change_text
from reslab.ablation.wording import Unit, count, interval, named, probability
from reslab.diff import differences
from reslab.errors import UserError
from reslab.runs.folder import RunFolder

RESAMPLES = 2_000  # the command answers in about a second
MOST_PAIRS = 25  # of runs without a common seed, compared image by image
MOST_ROWS = 10  # of a list on the terminal
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


@dataclass(frozen=True)
class TTest:
    """A t test of a difference; None where no test applies."""

    name: str | None  # None: without an sd there is no test
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
    number = published if published is not None else published_error
    _check_options(margin, number, published_sd, published_n)
    terms = Terms(metric, "min" if metric.endswith("loss") else "max", margin)
    a, b = read_group("RUN", run, metric), Group("published")
    if against:
        b = read_group("--against", against, metric)
        report = of_groups(a, b, terms)
    else:
        option = "--published" if published is not None else "--published-error"
        accuracy = Unit.of({"metric": metric, "arms": {}}).percent
        other = read_published(option, str(number), published_sd, published_n, a.values, accuracy, terms.mode)
        report = of_published(a, *other, terms)
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


def _name(*groups: Group) -> None:
    """Name groups by the directory that holds their runs, or by the run; A and B if these are the same."""
    parts = [Path(os.path.commonpath([run.path.resolve() for run in group.runs])).parts for group in groups]
    lengths = [1 if len(group.runs) > 1 else 2 for group in groups]  # a/seed-0 says more than seed-0
    tails = [["/".join(of[-n - more :]) for of, n in zip(parts, lengths, strict=True)] for more in (0, 1)]
    names = next((names for names in tails if len({*names}) == len(groups)), ["A", "B"])
    for group, name in zip(groups, names, strict=True):
        group.name = name


# Tests


def t_test(name: str, delta: float, se: float, df: float, scale: float, margin: float | None) -> TTest:
    """Compare delta / se with Student's t; `scale` is the magnitude of the values, below which all is rounding."""
    if se <= ROUNDING * scale:  # without spread, only equality can be told
        same = abs(delta) <= min(ROUNDING * scale, margin or math.inf)
        return TTest(name, delta, delta, delta, 1.0, 0.0 if margin else None) if same else TTest(name, delta)
    half = special.stdtrit(df, 1 - ALPHA / 2) * se
    p = 2 * special.stdtr(df, -abs(delta) / se)
    p_equivalence = None if margin is None else float(special.stdtr(df, (abs(delta) - margin) / se))
    return TTest(name, delta, float(delta - half), float(delta + half), float(p), p_equivalence)


def paired(a: Sequence[float], b: Sequence[float], margin: float | None = None) -> TTest:
    """Test the differences of runs with the same seeds, as `statistics.compare` does."""
    d = np.subtract(a, b)
    se = d.std(ddof=1) / math.sqrt(len(d))
    return t_test(PAIRED, float(d.mean()), se, len(d) - 1, np.abs([*a, *b]).max(), margin)


def welch(a: Sample, b: Sample, margin: float | None = None) -> TTest:
    """Test the difference of the means of two independent groups with unequal variances (Welch 1947)."""
    delta = a.mean - b.mean
    if a.sd is None or b.sd is None:
        return TTest(None, delta)
    va, vb = a.sd**2 / a.n, b.sd**2 / b.n
    df = (va + vb) ** 2 / ((va**2 / (a.n - 1) + vb**2 / (b.n - 1)) or 1)
    return t_test(WELCH, delta, math.sqrt(va + vb), df, max(abs(a.mean), abs(b.mean)), margin)


def prediction(a: Sample, value: float) -> TTest:
    """Test whether `value` may be one more run: it lies within mean ± t·sd·√(1 + 1/n) (Hahn and Meeker 1991, 4.8).

    The interval is that of the difference of the mean and the value, as in the other tests.
    """
    if a.sd is None:
        return TTest(None, a.mean - value)
    return t_test(PREDICTION, a.mean - value, a.sd * math.sqrt(1 + 1 / a.n), a.n - 1, abs(a.mean), None)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p of McNemar's test: the binomial test of one half among the images they differ in."""
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


# Report


def of_groups(a: Group, b: Group, terms: Terms) -> Report:
    """Return the comparison of two groups of runs: see docs/compare.md for the keys."""
    if both := {run.path.resolve() for run in a.runs} & {run.path.resolve() for run in b.runs}:
        raise UserError(f"these runs are in both groups: {named(sorted(map(str, both)))}")
    _name(a, b)
    if unpaired := _unpaired(a.seeds, b.seeds):
        test, why = welch(Sample.of(a.values), Sample.of(b.values), terms.margin), f"Not paired by seed: {unpaired}."
    else:
        test, why = paired(a.values, b.values, terms.margin), f"Paired by seed: {_listed(a.seeds)} in both groups."
    changes, other_data = config_differences(b.runs[0], a.runs[0]), _data_differences([*a.runs, *b.runs])
    refusal = "the data differ" if other_data else _refusal({a.name: len(a.runs), b.name: len(b.runs)}, (a, b))
    return _judged((_described(a), _described(b)), test, refusal, terms) | {
        "test_reason": why,
        "config_differences": [{"key": key, "against": there, "runs": here} for key, there, here in changes],
        "not_comparable": other_data,
        "warnings": [*_warnings((a, b), terms.metric)],
        "per_image": per_image(a, b, terms.metric),
    }


def of_published(a: Group, other: Sample, note: str, terms: Terms) -> Report:
    """Return the comparison of runs with a published number: a Welch test, or the prediction interval of one run."""
    _name(a)
    mine, alone, name = Sample.of(a.values), other.sd is None, "the published result"
    test = prediction(mine, other.mean) if alone else welch(mine, other, terms.margin)
    other_data = _data_differences(a.runs)
    refusal = "the data differ" if other_data else _refusal({a.name: mine.n} | ({} if alone else {name: other.n}), [a])
    group = {"name": name, **other._asdict(), "ci_low": None, "ci_high": None, "runs": [], "omitted": []}
    return _judged((_described(a), group), test, refusal, terms) | {
        "test_reason": "Of the published result, only one number is known." if alone else "Not paired by seed.",
        "config_differences": None,
        "not_comparable": other_data,
        "warnings": [note, *([SINGLE_NUMBER] if alone else []), PUBLISHED, *_warnings([a], terms.metric)],
        "per_image": {"reason": "the published result has no predictions"},
    }


def _described(group: Group) -> Report:
    runs = [{"path": str(run.path), "seed": run.seed, "value": run.value} for run in group.runs]
    omitted = [{"path": str(run.path), "reason": run.reason} for run in group.omitted]
    return {"name": group.name, **vars(summarise(group.values)), "runs": runs, "omitted": omitted}


def _unpaired(a: Sequence[int], b: Sequence[int]) -> str:
    """Return why two groups cannot be paired by seed; empty if they can. Both are sorted."""
    if repeated := sorted({seed for seeds in (a, b) for seed in seeds if seeds.count(seed) > 1}):
        return f"{_listed(repeated)} more than once in a group"
    if single := sorted({*a} ^ {*b}):
        return f"{_listed(single)} in one group only"
    return "" if len(a) >= MIN_SEEDS else f"pairs require at least {MIN_SEEDS} common seeds"


def _listed(seeds: Sequence[int]) -> str:
    more = f" and {len(seeds) - MOST_ROWS} more" if len(seeds) > MOST_ROWS else ""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds[:MOST_ROWS]))}{more}"


def _refusal(sizes: Mapping[str, int], groups: Sequence[Group]) -> str:
    """Return why there is no verdict; empty if there is one."""
    few = [f"{name} has {n}" for name, n in sizes.items() if n < MIN_SEEDS]
    diverged = [str(run.path) for group in groups for run in group.omitted if run.diverged]
    reasons = [f"a verdict requires at least {MIN_SEEDS} finished runs per group; {' and '.join(few)}"] if few else []
    reasons += [f"leaving out diverged runs favors their group ({named(diverged)})"] if diverged else []
    return "; ".join(reasons)


def _data_differences(runs: Sequence[Run]) -> str | None:
    keys = sorted({key for run in runs for key, _, _ in differences(runs[0].data, run.data)})
    return f"Not comparable: the runs used different data ({', '.join(keys)} in manifest.json)." if keys else None


def _warnings(groups: Sequence[Group], metric: str) -> Iterable[str]:
    for group in groups:
        first, *others = group.runs
        if keys := sorted({key for run in others for key, _, _ in config_differences(first, run)}):
            yield f"The runs of {group.name} are not replicates: their configs differ in {named(keys)}."
        yield from (f"Left out of {group.name}: {line}." for line in omissions(group))
    commits = sorted({str(run.commit)[:12] for group in groups for run in group.runs})
    if len(commits) > 1:
        yield f"The runs were made by different code: commits {named(commits)}."
    if not metric.startswith("test/"):
        yield f"{metric} does not show how the runs perform on the test set."


def _judged(groups: tuple[Report, Report], test: TTest, refusal: str, terms: Terms) -> Report:
    """Return the test and its verdict; a refused verdict has no p value, and a reason."""
    a, b = (group["name"] for group in groups)
    question = f"is {a} better than {b}? ({'Higher' if terms.mode == 'max' else 'Lower'} is better.)"
    constant = "" if test.p is not None else "the differences have no spread, so no test applies"
    report: Report = {
        "question": f"{terms.metric}: {question}",
        **terms._asdict(),
        "groups": groups,
        "test": test.name,
        "delta": test.delta,
        "delta_ci_low": test.low,
        "delta_ci_high": test.high,
        "p": None if refusal else test.p,
        "p_equivalence": None if refusal else test.p_equivalence,
        "verdict": None if refusal else judge(test, terms.mode),
        "reason": refusal or constant or None,
    }
    if test.name == PREDICTION:
        report["question"] = f"{terms.metric}: is the published number a plausible single run of {a}?"
    unit = unit_of(report)
    return report | {"unit": "points" if unit.percent else None, "sentences": [*_sentences(report, unit)]}


def judge(test: TTest, mode: Mode) -> str:
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
    values = [run["value"] for group in report["groups"] for run in group["runs"]]
    metric = report["metric"] if are_shares(values, report["mode"]) else ""  # an accuracy may be in percent already
    return Unit.of({"metric": metric, "arms": dict(enumerate(report["groups"]))})


def _sentences(report: Report, unit: Unit) -> Iterable[str]:
    """Yield the verdict in plain words and in one unit, then what qualifies it."""
    a, b = (group["name"] for group in report["groups"])
    delta, verdict, margin = report["delta"], report["verdict"], unit.exact(report["margin"] or 0)
    evidence = f"({', '.join(_evidence(report, unit))})"
    difference = f"the difference is {unit.difference(delta)} {evidence}"
    size = unit.number(abs(delta)) + " points" * unit.percent
    yield {
        "better": f"{a} is better than {b} by {size} {evidence}.",
        "worse": f"{a} is worse than {b} by {size} {evidence}.",
        "equivalent": f"{a} is equivalent to {b} within ±{margin}: {difference}.",
        "inconclusive": f"{a} vs. {b} is inconclusive: {difference}.",
        "plausible": f"The published number is a plausible single run of {a}: {difference}.",
        "implausible": f"The published number is not a plausible single run of {a}: {difference}.",
    }.get(verdict, f"No verdict on {a} vs. {b}: {report['reason']}. So far {difference}.")
    if verdict == "inconclusive":
        yield f"{report['reason'].capitalize()}." if report["reason"] else STOPPING
    if report["test"] == PREDICTION and report["delta_ci_low"] is not None:
        low, high = (report["groups"][1]["mean"] + report[f"delta_ci_{end}"] for end in ("low", "high"))
        span = f"{unit.number(low)} to {unit.number(high)}{' %' * unit.percent}"
        yield f"One further run of {a} lies within {span} with a probability of 95 %."
    if verdict == "equivalent" and report["p"] < ALPHA:
        yield f"The difference is significant (p {probability(report['p'])}) but smaller than the margin."
    ends = [abs(report[f"delta_ci_{end}"] or 0) for end in ("low", "high")]
    if verdict in ("better", "worse") and min(ends) < (report["margin"] or 0):
        yield f"The difference may be smaller than the margin of {margin}."


def _evidence(report: Report, unit: Unit) -> Iterable[str]:
    if report["delta_ci_low"] is not None:
        yield f"95 % interval {interval(report, 'delta_ci', unit, True)}"
    if report["verdict"] == "equivalent":
        yield f"p {probability(report['p_equivalence'])} of two one-sided tests"
    elif report["p"] is not None:
        yield f"p {probability(report['p'])}"
    sizes = [str(group["n"]) for group in report["groups"] if group["runs"] or group["sd"] is not None]
    yield f"n = {sizes[0]} seeds" if report["test"] == PAIRED else f"n = {' and '.join(sizes)} runs"
    if report["test"]:
        yield report["test"]


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
            index, label, prediction = np.stack([file[name] for name in ("index", "label", "prediction")])
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
    lines += [report["test_reason"]]
    if (rows := report["config_differences"]) is not None:
        lines += ["", f"Config differences (against → runs):{'' if rows else ' none'}"]
        lines += _some([f"  {change_text(*row.values())}" for row in rows])
    lines += ["", *images_text(report["per_image"], MOST_ROWS)]
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


def _some(lines: Sequence[str], most: int | None = MOST_ROWS) -> list[str]:
    more = len(lines) - (most or len(lines))
    return [*lines[:most], *([f"  and {more} more (--json and --out list all)"] if more > 0 else [])]


def images_text(images: Report, most: int | None = None) -> list[str]:
    """Return the comparison image by image as lines, with at most `most` pairs."""
    if "reason" in images:
        return [f"No comparison image by image: {images['reason']}."]
    pairs = [
        f"  {row['runs']} vs. {row['against']}: {row['only_runs']} to {row['only_against']}, p {probability(row['p'])}"
        for row in images["pairs"]
    ]
    lines = [f"Images that only one of two runs classifies correctly, of {images['images']:,} (exact McNemar test):"]
    lines += [*_some(pairs, most), MCNEMAR]
    if boot := images["bootstrap"]:
        points, over = Unit(percent=True, decimals=2), count(boot["seeds"], "seed")
        ends = interval(boot, "ci", points, True)
        text = f"Difference in accuracy over {over} × {images['images']:,} images: {points.difference(boot['delta'])}"
        lines.append(f"{text} (95 % bootstrap interval {ends}). {BOOTSTRAP}")
    return lines
