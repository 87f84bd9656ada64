"""Which cells of a study are needed: all of them, or with planned looks those that the looks so far call for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from reslab.ablation.cells import FINAL, Cell, State
from reslab.ablation.plan_log import read_decisions
from reslab.ablation.statistics import Comparison, Why, compare_by_seed
from reslab.ablation.study import Study


def metric_by_seed(study: Study, states: Sequence[State]) -> dict[str, dict[int, float]]:
    """Return the study's metric by arm and seed: NaN for a diverged cell, nothing for one without a result."""
    by_seed: dict[str, dict[int, float]] = {arm: {} for arm in study.arms}
    for state in states:
        value = (state.manifest.get("results") or {}).get(study.metric) if state.status == "complete" else None
        if state.status == "diverged" or isinstance(value, int | float):
            by_seed[state.cell.arm][state.cell.seed] = math.nan if value is None else float(value)
    return by_seed


def comparisons(study: Study, states: Sequence[State]) -> dict[str, Comparison]:
    """Judge every arm by the results so far, under the rules of the study."""
    rules = (study.margin, study.mode, study.looks, study.test)
    return compare_by_seed(metric_by_seed(study, states), study.baseline, study.seeds, *rules)


def decided_at(study: Study, out: Path) -> dict[str, int]:
    """Return the look at which each arm was decided, by the plan log."""
    return {arm: decision["look"] for arm, decision in read_decisions(study, out).items()} if study.looks else {}


def seeds_needed(study: Study, states: Sequence[State], decided: Mapping[str, int]) -> dict[str, int]:
    """Return how many of the study's seeds every arm needs, as far as the results so far tell.

    An arm that has stopped needs those of its last look, one that still runs those of the next. The baseline needs as
    many as any arm. `decided` are the arms of `decided_at`: a decision is never taken back.
    """
    if not study.looks:
        return dict.fromkeys(study.arms, len(study.seeds))
    compared = {arm: c for arm, c in comparisons(study, states).items() if arm not in decided}
    diverged = {arm for arm, c in compared.items() if any(reason.why == Why.DIVERGED for reason in c.reasons)}
    running = [arm for arm, c in compared.items() if c.stopped is None and arm not in diverged]
    taken = max((compared[arm].look or 0 for arm in running), default=0)
    coming = next((look for look in study.looks if look > taken), study.looks[-1])
    needed = {arm: coming if arm in running else c.look or study.looks[0] for arm, c in compared.items()} | {**decided}
    return {arm: needed.get(arm, max(needed.values())) for arm in study.arms}


def cells_due(study: Study, states: Sequence[State], decided: Mapping[str, int]) -> list[Cell]:
    """Return the cells to run next, in the order of `states`."""
    needed = _needed_seeds(study, states, decided)
    return [s.cell for s in states if s.cell.seed in needed[s.cell.arm] and s.status not in FINAL]


def without_unneeded(study: Study, states: Sequence[State], decided: Mapping[str, int]) -> list[State]:
    """Return the states with the status `not needed` for cells that did not run because their arm was decided."""
    needed = _needed_seeds(study, states, decided)
    unneeded = {s.cell for s in states if s.status == "missing" and s.cell.seed not in needed[s.cell.arm]}
    return [replace(s, status="not needed", detail="") if s.cell in unneeded else s for s in states]


def _needed_seeds(study: Study, states: Sequence[State], decided: Mapping[str, int]) -> dict[str, set[int]]:
    return {arm: set(study.seeds[:n]) for arm, n in seeds_needed(study, states, decided).items()}
