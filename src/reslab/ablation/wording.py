"""Numbers and verdicts in plain words, the same in every file and figure of a report."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RULES = {
    "last": "those of the last epoch, whatever any result looked like (test_weights: last)",
    "best": "those of the epoch with the best validation (test_weights: best)",
}
TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"${sign}$" for sign in "<>|"},
    "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "→": r"$\to$", "–": "--", "…": r"\dots{}",
}  # fmt: skip
NAMED = 4  # cells that a sentence names, before it counts the rest


@dataclass(frozen=True)
class Unit:
    """How values of a metric are written: accuracies in percent, their differences in points; all else as it is."""

    percent: bool
    decimals: int

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "Unit":
        """The unit of the report's metric, with two significant digits of the smallest spread between seeds."""
        percent = report["metric"].rpartition("/")[2].startswith("acc")
        factor = 100 if percent else 1
        spreads = [arm["sd"] * factor for arm in report["arms"].values() if arm["sd"]]
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
        said = self.number(value, "+")
        return said if said.strip("+0.") else said[1:]  # no sign for 0.00

    def value(self, value: float | None) -> str:
        return self.number(value) + (" %" if self.percent and value is not None else "")

    def difference(self, value: float | None) -> str:
        return self.signed(value) + (" points" if self.percent and value is not None else "")

    def margin(self, margin: float) -> str:
        """A margin as it was given, not rounded to the spread's digits."""
        return f"±{margin * self.factor:.6g}" + (" points" if self.percent else "")


def probability(p: float | None) -> str:
    """p to two digits, and never as 0."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def sentence(name: str, arm: Mapping[str, Any], report: Mapping[str, Any], unit: Unit) -> str:
    """The verdict on an arm against the baseline, with what it rests on."""
    baseline, verdict, seen = report["baseline"], arm["verdict"], _evidence(arm, unit)
    if verdict is None:
        so_far = f" So far: {seen}." if seen else ""
        return f"No verdict on {name} against {baseline}: {arm['reason']}.{so_far}"
    if verdict == "equivalent":
        said = f"{name} is equivalent to {baseline} within {unit.margin(report['margin'])}"
    elif verdict == "inconclusive":
        said = f"{name} against {baseline} is inconclusive"
    else:
        said = f"{name} is {verdict} than {baseline}"
    return f"{said}: {seen}" + (f"; {arm['reason']}." if arm["reason"] else ".")


def _evidence(arm: Mapping[str, Any], unit: Unit) -> str:
    if arm["delta"] is None:
        return ""
    parts = [unit.difference(arm["delta"])]
    if arm["delta_ci_low"] is not None:
        parts.append(f"95 % interval {unit.signed(arm['delta_ci_low'])} to {unit.signed(arm['delta_ci_high'])}")
    if arm["verdict"] == "equivalent" and arm["p_equivalence"] is not None:
        parts.append(f"p_Holm {_equals(arm['p_equivalence'])} of two one-sided tests")
    elif arm["p_holm"] is not None:
        parts.append(f"p_Holm {_equals(arm['p_holm'])}")
    return ", ".join([*parts, f"n = {arm['n_pairs']}"])


def _equals(p: float) -> str:
    said = probability(p)
    return said if said.startswith("<") else f"= {said}"


def judged(report: Mapping[str, Any], unit: Unit) -> list[str]:
    """What was measured, on which weights, and by which rules it is judged."""
    metric, others = report["metric"], len(report["arms"]) - 1
    split = metric.partition("/")[0]
    said = [f"Judged by {metric}: {'more' if report['mode'] == 'max' else 'less'} is better."]
    if split == "test":
        said.append("The test set was used once a run, at its end.")
    else:
        set_ = {"val": "validation", "train": "training"}.get(split, split)
        best = " The rule picked the best epoch by validation, so the level is flattered." * (
            report["test_weights"] == "best"
        )
        said.append(f"This is a {set_} metric: nothing here says how the arms do on the test set.{best}")
    tested = "; ".join(f"{g['is']['weights']} ({count(len(g['cells']), 'cell')})" for g in report["tested_weights"])
    said.append(f"The weights are {RULES[report['test_weights']]}." + (f" Tested: {tested}." if tested else ""))
    if report["margin"] is None:
        said.append("The study states no margin: no arm can be called equivalent.")
    else:
        said.append(f"Differences within {unit.margin(report['margin'])} do not matter, by the study's margin.")
    said.append(
        "Arms are paired with the baseline by seed; intervals are Student's t, 95 %, each for itself; p is of the "
        f"paired t test, adjusted over {count(others, 'comparison')} (Holm)."
    )
    return said


def row(name: str, arm: Mapping[str, Any], report: Mapping[str, Any], unit: Unit) -> dict[str, Any]:
    """An arm's line in the tables, as text."""
    planned, found = len(report["seeds"]), {"name": name, "bold": name in best(report)}
    found |= {"n": str(arm["n"]) if arm["n"] == planned else f"{arm['n']} of {planned}"}
    found |= {"mean": unit.number(arm["mean"]), "sd": unit.number(arm["sd"]), "interval": _interval(arm, "ci", unit)}
    found["changes"] = [f"{key}: {_short(there)} → {_short(here)}" for key, there, here in arm["changes"]]
    found["seconds"] = arm["wall_seconds"]
    found["baseline"] = name == report["baseline"]
    if not found["baseline"]:
        found |= {"delta": unit.signed(arm["delta"]), "delta_interval": _interval(arm, "delta_ci", unit, signed=True)}
        found |= {"p": probability(arm["p_holm"]), "detectable": unit.number(arm["min_detectable_delta"])}
        found["g"] = "–" if arm["hedges_g"] is None else f"{arm['hedges_g']:.2f}".replace("-", "−")
        found["verdict"] = arm["verdict"] or "no verdict"
    return found


def _interval(group: Mapping[str, Any], ends: str, unit: Unit, signed: bool = False) -> str:
    low, high = group[f"{ends}_low"], group[f"{ends}_high"]
    write = unit.signed if signed else unit.number
    return "–" if low is None else f"{write(low)} to {write(high)}"


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def best(report: Mapping[str, Any]) -> set[str]:
    """The arms that the verdicts carry as best: all that are better than the baseline, or it, if all are worse."""
    verdicts = {name: arm["verdict"] for name, arm in report["arms"].items() if name != report["baseline"]}
    if better := {name for name, verdict in verdicts.items() if verdict == "better"}:
        return better
    return {report["baseline"]} if verdicts and set(verdicts.values()) == {"worse"} else set()


def tiles(report: Mapping[str, Any]) -> dict[str, str]:
    """The other numbers worth a look, by name."""
    plan, cells = report["plan"], report["cells"]
    found = {"cells": f"{cells.get('complete', 0)} of {cells['planned']}", "arms": str(len(report["arms"]))}
    found["seeds"] = ", ".join(map(str, report["seeds"]))
    for key, name in (("gpu_hours", "GPU-hours"), ("cpu_hours", "CPU core-hours")):
        if report[key]:
            found[name] = f"{report[key]:,.3g}"
    found["plan"] = plan["hash"][:8]
    found["runs match it"] = "yes" if plan["matches"] else "no"
    return found


def effect(found: Mapping[str, Any], unit: Unit) -> dict[str, str]:
    """A main effect's or an interaction's line, as text."""
    return {
        "what": " × ".join(f"{factor}: {there} → {here}" for factor, there, here in found["levels"]),
        "delta": unit.signed(found["delta"]),
        "interval": _interval(found, "ci", unit, signed=True),
        "p": probability(found["p_holm"]),
    }


def per_image(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    """An arm's line in the table over test images, as text; in points of accuracy."""
    if "reason" in found:
        return {"name": name, "reason": found["reason"]}
    unit = Unit(percent=True, decimals=2)
    over = f"{count(found['seeds'], 'seed')} × {found['images']:,} images"
    interval = _interval(found, "ci", unit, signed=True)
    return {"name": name, "delta": unit.signed(found["delta"]), "interval": interval, "over": over}


def hardware(found: Mapping[str, Any]) -> str:
    """What a cell ran on, in a line."""
    gpus = found["gpus"] or []
    kinds = [f"{gpus.count(kind)} × {kind}" for kind in sorted(set(gpus))]
    width = [f"threads: {found['threads']}", f"processes: {found['world_size']}"]
    return ", ".join([*kinds, found["cpu"] or "CPU unknown", *width])


def code(found: Mapping[str, Any]) -> str:
    """Which code a cell ran, in a line."""
    if not found["sha"]:
        return "not recorded: not run from a git repository"
    return f"commit {found['sha'][:12]}" + (", with uncommitted changes" if found["dirty"] else "")


def caption(report: Mapping[str, Any]) -> str:
    """Of the table, for a paper: what n, the interval, the rule and the bold type are."""
    counts = sorted({arm["n"] for arm in report["arms"].values()})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    seeds = ", ".join(map(str, report["seeds"]))
    which = {"last": "last-epoch weights", "best": "best-validation weights"}[report["test_weights"]]
    bold = ""
    if chosen := best(report):
        bold = " Bold: all others are worse." if report["baseline"] in chosen else " Bold: better than the baseline."
    return (
        f"{report['question']} {report['metric']}, mean ± sd over n = {n} seeds ({seeds}), {which}. Differences to "
        f"{report['baseline']}, paired by seed, with 95 % t intervals; p adjusted by Holm's method.{bold}"
    )


def alternatives(report: Mapping[str, Any], unit: Unit) -> dict[str, str]:
    """What the figures show, for those who do not see them."""
    rows = [row(name, arm, report, unit) for name, arm in report["arms"].items()]
    means = "; ".join(f"{r['name']} {r['mean']} (95 % interval {r['interval']})" for r in rows)
    deltas = "; ".join(f"{r['name']} {r['delta']} ({r['verdict']})" for r in rows if not r["baseline"])
    return {
        "arms": f"Dot plot of {report['metric']} by arm: {means}.",
        "differences": f"Differences to {report['baseline']}: {deltas}.",
        "learning_curves": f"Learning curves of {report['curve']}, an arm each, with a band over the seeds.",
        "cost": f"{report['metric']} against the wall time of a cell, a point an arm.",
        "effects": "Main effects of the factors with their 95 % intervals.",
    }


def named(cells: Sequence[str]) -> str:
    """Some cells by name, the rest by number."""
    rest = len(cells) - NAMED
    return ", ".join(cells[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def count(n: int, thing: str) -> str:
    """1 cell, 2 cells."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def tex(text: str) -> str:
    """Plain text as LaTeX prints it."""
    return "".join(TEX.get(sign, sign) for sign in text)


def markdown(text: str) -> str:
    """Plain text as Markdown shows it, also in a table's cell."""
    return re.sub(r"([\\`*|<>\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)
