"""Power of a study before it runs: the difference its seeds detect, and the seeds a difference requires."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reslab.ablation.cells import State, seconds_per_cell
from reslab.ablation.plan_log import PlanHistory, read_plans
from reslab.ablation.statistics import (
    ALPHA,
    MAX_SEEDS,
    MIN_SEEDS,
    POWER,
    Design,
    design,
    fold_factor,
    min_detectable_delta,
    seeds_needed,
    seeds_needed_for_equivalence,
)
from reslab.ablation.study import Study
from reslab.ablation.wording import Unit, count, is_share
from reslab.runs.manifest import duration

ACCURACY_SD = 0.002  # over seeds: .15 to .2 points on CIFAR-10


class Spread(NamedTuple):
    """Standard deviation of the paired differences between an arm and the baseline, and where it comes from."""

    sd: float
    source: str


def power(study: Study, out: Path, current: Sequence[State], find: float | None = None) -> list[str]:
    """Return what the study can find, and what finding a difference `find` would cost, one statement per line."""
    unit, comparisons = Unit(is_share(study.metric), 2), len(study.arms) - 1
    spread = _spread(study, out, current, unit)
    if spread is None:
        return [f"unknown: set `sd` in the study file, the sd of {study.metric} over seeds"]
    sd, alpha, n = spread.sd, ALPHA / comparisons, len(study.seeds)
    if study.looks:
        plan = design(sd, arms=comparisons, margin=study.margin, looks=study.looks, find=find)
        return [
            *_at_looks(study, plan, current, unit),
            _source(spread, unit),
            *_to_find(study, plan, current, unit, find),
        ]
    tests = f"{count(n, 'fold' if study.folds else 'seed')}, {count(comparisons, 'comparison')} (Holm)"
    if study.folds:
        size = unit.exact(fold_factor(n) * min_detectable_delta(sd, n, alpha))
        return [f"differences of {size} at 80 % power: {tests}, corrected test", _source(spread, unit)]
    lines = [f"nothing: a verdict requires at least {MIN_SEEDS} seeds"]
    if n >= MIN_SEEDS:
        lines = [f"differences of {unit.exact(min_detectable_delta(sd, n, alpha))} at 80 % power: {tests}, paired test"]
    if study.margin:
        enough = _seeds(seeds_needed_for_equivalence(sd, 0, study.margin, alpha))
        lines.append(f"equivalence within ±{unit.exact(study.margin)}: {enough} per arm, if there is no difference")
    lines.append(_source(spread, unit))
    if find is not None:
        lines.append(f"to find {unit.exact(find)}: {_cost(study, current, seeds_needed(sd, find, alpha))}")
    return lines


def _source(spread: Spread, unit: Unit) -> str:
    return f"sd of a paired difference: {unit.exact(spread.sd)}, {spread.source}"


def _at_looks(study: Study, plan: Design, current: Sequence[State], unit: Unit) -> list[str]:
    """Return what planned looks find, and the expected number of seeds and hours by the true difference."""
    tests = (
        f"looks at {', '.join(map(str, study.looks or ()))} seeds, {count(len(study.arms) - 1, 'comparison')} (Holm)"
    )
    lines = [f"differences of {unit.exact(plan.detectable)} at 80 % power: {tests}, paired test"]
    for row, size in zip(plan.rows, ("no difference", "1 sd", "2 sd", "3 sd"), strict=False):
        decided = f"decided in {100 * row.decided:.0f} % of studies"
        lines.append(f"{size}: {row.seeds:.1f} seeds per arm expected, {decided}{_hours(study, current, row.seeds)}")
    return lines


def _to_find(study: Study, plan: Design, current: Sequence[State], unit: Unit, find: float | None) -> list[str]:
    if find is None:
        return []
    seeds, power = plan.rows[-1].seeds, 100 * plan.rows[-1].power
    hours = _hours(study, current, seeds)
    lines = [f"to find {unit.exact(find)}: {power:.0f} % power, {seeds:.1f} seeds per arm expected{hours}"]
    return [*lines, f"80 % power: a last look at {_seeds(plan.seeds_to_find)}"] if power < 100 * POWER else lines


def _hours(study: Study, current: Sequence[State], seeds: float) -> str:
    """Return the time that an expected number of seeds takes, all arms one after the other; "" if unknown."""
    each = [seconds_per_cell(study, current)[arm] for arm in study.arms]
    return "" if None in each else f", {duration(seeds * sum(s for s in each if s))} one after the other"


def _seeds(n: int | None) -> str:
    return f"more than {MAX_SEEDS:,} seeds" if n is None else count(max(n, MIN_SEEDS), "seed")


def _cost(study: Study, current: Sequence[State], needed: int | None) -> str:
    if needed is None:
        return f"{_seeds(needed)} per arm"
    each, n = seconds_per_cell(study, current), max(needed, MIN_SEEDS)
    cells = f"{_seeds(needed)} per arm, {count(n * len(study.arms), 'cell')}"
    seconds = [each[arm] for arm in study.arms]
    if None in seconds:
        return f"{cells}; set `minutes` in the study file for the time"
    return f"{cells}, {duration(n * sum(s for s in seconds if s))} one after the other"


def _spread(study: Study, out: Path, current: Sequence[State], unit: Unit) -> Spread | None:
    """Return the spread from finished cells, else from the sd of the study file, else the default of the metric."""
    if measured := _measured(study, out, current):
        return measured
    sd = study.sd or (ACCURACY_SD if is_share(study.metric) else None)
    if sd is None:
        return None
    source = "as stated" if study.sd else "the default for accuracies (set `sd` in the study file)"
    return Spread(sd * math.sqrt(2), f"√2 × {unit.exact(sd)} if arms do not correlate; {source}")


def _measured(study: Study, out: Path, current: Sequence[State]) -> Spread | None:
    """Return the spread of the finished cells of arms that are still configured as in the last plan."""
    history = PlanHistory(study, read_plans(out))
    values: dict[str, dict[int, float]] = {arm: {} for arm in study.arms if history.is_current(arm)}
    for state in current:
        result = (state.manifest.get("results") or {}).get(study.metric) if state.status == "complete" else None
        if state.cell.arm in values and isinstance(result, int | float) and math.isfinite(result):
            values[state.cell.arm][state.cell.seed] = result
    baseline = values.pop(study.baseline, {})
    differences = [[of[seed] - baseline[seed] for seed in of if seed in baseline] for of in values.values()]
    if sd := _pooled_sd(differences):
        return Spread(sd, "measured on the finished cells")
    if sd := _pooled_sd([list(baseline.values())]):
        return Spread(sd * math.sqrt(2), "√2 × that of the finished baseline cells, if arms do not correlate")
    return None


def _pooled_sd(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the sd within groups of at least MIN_SEEDS values; None if there is none."""
    enough = [np.asarray(group) for group in groups if len(group) >= MIN_SEEDS]
    degrees = sum(len(group) - 1 for group in enough)
    return math.sqrt(sum(group.var(ddof=1) * (len(group) - 1) for group in enough) / degrees) if degrees else None
