"""Numbers and verdicts of a report as text, the same in every file and figure."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reslab.ablation.statistics import MAX_SEEDS, MIN_SEEDS, Reason, Why
from reslab.ablation.study import change_text

REASONS = {
    Why.MISSING: "no result for {cells}; `reslab ablate run` runs the missing cells",
    Why.DIVERGED: "no finite result for {cells}; leaving out a diverged seed would favor the arm: change the arm and "
    "run it again",
    Why.FEW_SEEDS: f"a verdict requires at least {MIN_SEEDS} seeds, got {{number}}; add seeds to the study and rerun "
    "`reslab ablate run`",
    Why.IDENTICAL: "both arms have the same result in every seed",
    Why.NO_MARGIN: "with a margin in the study file, the arms would be equivalent",
    Why.CONSTANT: "every seed differs by the same {size}, so no test applies: the metric is too coarse to show the "
    "spread between seeds; a new study with a finer metric (such as a loss) would",
    Why.NEGLIGIBLE: "the difference is significant (p_Holm {p}) but smaller than the margin of {margin}",
    Why.MAYBE_NEGLIGIBLE: "the difference may be smaller than the margin of {margin}",
    Why.ADJUSTED: "significant on its own, but not after adjusting for {number} comparisons",
    Why.NEXT_LOOK: "not decided so far; the next look is at {number} seeds",
    Why.LAST_LOOK: "not decided at the last look, at {number} seeds; only a study of new seeds can decide it",
    Why.HOPELESS: "stopped early: the chance of a verdict by the last look was {number} %",
    Why.UNEQUAL_SPREADS: "results of {cells} spread differently from those of the other arms, so the pooled test would "
    "give too many false verdicts; use `test: paired`",
    Why.POOLED_LOOKS: "the pooled test allows no planned looks; use `test: paired`, or `seeds` instead of `looks`",
    Why.FOLDS: "folds share training images, so they cannot decide this; a study over independent seeds (`seeds`) "
    "would show it",
    Why.SEPARATE: "{remedy} detect a difference of {size} at 80 % power",
    Why.EQUIVALENCE: "{remedy} show equivalence within ±{margin} at 80 % power",
}
FOLDS = (
    "The runs are folds of a cross-validation (seed k is fold k). Folds share training images, so they are not "
    "independent seeds: no unbiased estimate of their variance exists (Bengio & Grandvalet 2004). Intervals and p "
    "values use the corrected t test of Nadeau & Bengio (2003), an approximation, and the verdicts are exploratory. "
    "To confirm one, run a study over seeds."
)
TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"${sign}$" for sign in "<>|"},
    "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "→": r"$\to$", "–": "--", "…": r"\dots{}",
}  # fmt: skip
NAMED = 4  # cells that a sentence lists before it counts the rest


@dataclass(frozen=True)
class Unit:
    """How values of a metric are written: accuracies in percent and their differences in points, others unchanged."""

    percent: bool
    decimals: int

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "Unit":
        """Return the unit of the report's metric, with two significant digits of the smallest sd over the seeds."""
        percent = is_share(report["metric"]) and all((arm.get("mean") or 0) <= 1 for arm in report["arms"].values())
        factor = 100 if percent else 1
        spreads = [arm["sd"] * factor for arm in report["arms"].values() if (arm["sd"] or 0) > 1e-9]  # else rounding
        if not spreads:
            return cls(percent, 2 if percent else 4)
        return cls(percent, min(max(1 - math.floor(math.log10(min(spreads))), 1), 3 if percent else 5))

    @property
    def factor(self) -> int:
        return 100 if self.percent else 1

    @property
    def difference_unit(self) -> str:
        return " (points)" if self.percent else ""

    def axis(self, metric: str) -> str:
        return f"{metric} (%)" if self.percent else metric

    def number(self, value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value * self.factor:{sign}z.{self.decimals}f}".replace("-", "−")

    def signed(self, value: float | None) -> str:
        text = self.number(value, "+")
        return text if text.strip("+0.") else text[1:]  # no sign for 0.00

    def difference(self, value: float | None) -> str:
        return self.signed(value) + (" points" if self.percent and value is not None else "")

    def exact(self, size: float) -> str:
        """Return a margin or the size of a difference, not rounded to the decimals of the sd."""
        return f"{size * self.factor:.3g}" + (" points" if self.percent else "")


def is_share(metric: str) -> bool:
    """Return whether a metric is an accuracy, by its name: a share of the images."""
    return metric.rpartition("/")[2].startswith("acc")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def sd(value: Any, unit: Unit) -> str:
    """Return a standard deviation in the unit; value may be missing."""
    return unit.number(value) if isinstance(value, float) else "–"


def probability(p: float | None) -> str:
    """Return p with two digits, never as 0."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def explain(
    reasons: Sequence[Reason],
    unit: Unit,
    margin: float | None = None,
    delta: float | None = None,
    p_holm: float | None = None,
    n: int = 0,
) -> str:
    """Return the reasons of a comparison of `n` seeds, or of missing effects, as text; empty if there are none."""
    numbers = {"margin": unit.exact(margin or 0), "size": unit.exact(abs(delta or 0)), "p": equals(p_holm or 0)}
    texts = []
    for r in reasons:
        texts.append(REASONS[r.why].format(cells=named(r.cells), number=r.number, remedy=_remedy(r, n), **numbers))
    return "; ".join(texts)


def _remedy(reason: Reason, n: int) -> str:
    """Return what would settle an inconclusive comparison: not more seeds in the same study (optional stopping)."""
    if reason.number is None:
        return f"more than {MAX_SEEDS:,} seeds per arm would be needed to"
    return f"a new study with about {count(n + reason.number, 'seed')} per arm, or planned looks, would"


def exploratory(looks: Sequence[int], seeds: Sequence[int], chance: float | None) -> str:
    """Return why verdicts are exploratory: seeds were added after these looks, which no plan stated beforehand."""
    *first, last = map(str, looks)
    odds = "above 5 %" if chance is None else f"{chance:.1%}".replace("%", " %")
    fresh = f"{max(seeds) + 1} to {max(seeds) + len(seeds)}"
    return (
        f"Seeds were added after results, without planned looks: verdicts could be seen at {', '.join(first)} and "
        f"{last} seeds. With {len(looks)} looks, the chance of a false verdict is {odds}, so the verdicts are "
        f"exploratory. To confirm a verdict, run a new study with fresh seeds (such as {fresh}), or with planned looks "
        f"(looks: {list(looks)} in the study file before the first run)."
    )


def by_label(labels: Mapping[str, str]) -> str:
    """Return names grouped by their label, in the order of the labels: `0, 1: planned before any result; 2: ...`."""
    groups: dict[str, list[str]] = {}
    for name, label in labels.items():
        groups.setdefault(label, []).append(name)
    return "; ".join(f"{', '.join(names)}: {label}" for label, names in groups.items())


def equals(p: float) -> str:
    """Return "= 0.012" or "< 0.0001"."""
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def row(name: str, arm: Mapping[str, Any], report: Mapping[str, Any], unit: Unit) -> dict[str, Any]:
    """Return the cells of an arm's row in the tables."""
    planned = len(report["seeds"])
    return {
        "name": name,
        "bold": name in best(report),
        "baseline": name == report["baseline"],  # the cells from `delta` to `verdict` are empty
        "n": str(arm["n"]) if arm["n"] == planned else f"{arm['n']} of {planned}",
        "mean": unit.number(arm["mean"]),
        "sd": unit.number(arm["sd"]),
        "interval": interval(arm, "ci", unit),
        "delta": unit.signed(arm.get("delta")),
        "delta_interval": interval(arm, "delta_ci", unit, signed=True),
        "p": probability(arm.get("p_holm")),
        "g": Unit(percent=False, decimals=2).number(arm.get("hedges_g")),
        "detectable": unit.number(arm.get("min_detectable_delta")),
        "verdict": arm.get("verdict") or "no verdict",
        "changes": [change_text(*change) for change in arm["changes"]],
        "planned": arm["planned"],
        "seconds": arm["wall_seconds"],
    }


def interval(group: Mapping[str, Any], ends: str, unit: Unit, signed: bool = False) -> str:
    """Return the interval of a group of numbers as text."""
    low, high = group.get(f"{ends}_low"), group.get(f"{ends}_high")
    write = unit.signed if signed else unit.number
    return "–" if low is None else f"{write(low)} to {write(high)}"


def best(report: Mapping[str, Any]) -> set[str]:
    """Return the best arms by verdict: those better than the baseline, or the baseline if all others are worse."""
    verdicts = {name: arm["verdict"] for name, arm in report["arms"].items() if name != report["baseline"]}
    if better := {name for name, verdict in verdicts.items() if verdict == "better"}:
        return better
    return {report["baseline"]} if verdicts and set(verdicts.values()) == {"worse"} else set()


def named(cells: Sequence[str]) -> str:
    """Return the first few names and the number of the rest."""
    rest = len(cells) - NAMED
    return ", ".join(cells[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def count(n: int, thing: str) -> str:
    """Return "1 cell", "2 cells"."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def tex(text: str) -> str:
    """Escape plain text for LaTeX."""
    return "".join(TEX.get(sign, sign) for sign in text)


def markdown(text: str) -> str:
    """Escape plain text for Markdown, including table cells."""
    return re.sub(r"([\\`*|<>\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)
