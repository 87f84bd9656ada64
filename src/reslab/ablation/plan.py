"""Text printed by `ablate plan`: cells, changes of each arm, cost, power. Imports no torch."""

import os
from collections.abc import Iterator
from pathlib import Path

from reslab.ablation.cells import Cell, State, seconds_per_cell, states
from reslab.ablation.looks import cells_due, decided_at
from reslab.ablation.plan_log import PlanHistory, next_plan, read_plan, read_plans
from reslab.ablation.power import power
from reslab.ablation.study import Arm, Study, change_text
from reslab.ablation.wording import FOLDS, Unit, count, is_share
from reslab.runs.manifest import duration


def describe(study: Study, out: Path, find: float | None = None) -> str:
    """Return the plan as plain text: what is done in `out`, what it can find, what finding `find` would cost."""
    current = states(study, out)
    done = sum(s.status == "complete" for s in current)
    seeds = f"{'folds' if study.folds else 'seeds'} ({', '.join(map(str, study.seeds))})"
    number = f"{'at most ' if study.looks else ''}{len(study.seeds)}"
    better = "higher" if study.mode == "max" else "lower"
    weights = "last" if study.test_weights == "last" else "best validated"
    margin = "no margin, so no arm can be called equivalent"
    if study.margin is not None:
        size = Unit(is_share(study.metric), 2).exact(study.margin)
        margin = f"differences within ±{size} do not matter"
    recorded = read_plan(out).get("hash")
    earlier = "nothing run yet" if recorded is None else f"holds runs of another plan, {recorded[:12]}…"
    lines = [
        f"study      {study.name}: {study.question}",
        f"file       {os.path.relpath(study.path)}",
        f"cells      {len(study.arms)} arms × {number} {seeds} = {len(current)}; {done} done",
        f"metric     {study.metric} ({better} is better) of the {weights} weights; {margin}",
        f"test       {study.test}, {_looks(study)}",
        *(f"factor     {key}: {', '.join(labels)}" for key, labels in study.factors.items()),
        "arms",
        *(f"  {line}" for arm in study.arms.values() for line in _arm(arm, study)),
        f"cost       {_cost(study, out, current)}",
        *(f"{'' if i else 'finds':<11}{line}" for i, line in enumerate(power(study, out, current, find))),
        f"directory  {out}" + (f" ({earlier})" if recorded != study.hash else ""),
        f"plan       {study.hash}",
        *(f"note       {note}" for note in notes(study, out)),
        *([f"note       {FOLDS}"] if study.folds else []),
    ]
    return "\n".join(lines)


def notes(study: Study, out: Path) -> Iterator[str]:
    """Yield what running the study now would change in its plan although results exist."""
    plans = read_plans(out)
    if not plans or (plan := next_plan(study, out, plans)) is None:
        return
    before, after = PlanHistory(study, plans), PlanHistory(study, [*plans, plan])
    known = list(before.changes())
    yield from [change for change in after.changes() if change not in known]
    if after.looks() != before.looks() and not after.looks_planned:
        more = [str(seed) for seed in study.seeds if seed not in plans[-1].get("seeds", ())]
        results = count(plan["results"], "result")
        what = f"seed{'s' * (len(more) > 1)} {', '.join(more)}"
        yield f"{what} added after {results}: without planned looks, verdicts are exploratory"


def _looks(study: Study) -> str:
    if study.folds:
        return "corrected t test (Nadeau & Bengio 2003), judged once, after all folds"
    return f"judged after {', '.join(map(str, study.looks))} seeds" if study.looks else "judged once, after all seeds"


def _arm(arm: Arm, study: Study) -> list[str]:
    if arm.name == study.baseline:
        return [f"{arm.name}  (baseline)"]
    changes = [change_text(*change) for change in arm.changes]
    return [f"{arm.name}  {changes[0]}"] if len(changes) == 1 else [arm.name, *(f"    {line}" for line in changes)]


def _cost(study: Study, out: Path, current: list[State]) -> str:
    each, left = seconds_per_cell(study, current), [s.cell for s in current if s.status != "complete"]
    if None in each.values():
        return "unknown until a cell has finished; set `minutes` in the study file to state it"
    source = "as stated in the study file" if len(left) == len(current) else "measured on the finished cells"

    def time(cells: list[Cell]) -> str:
        return duration(sum(each[cell.arm] or 0 for cell in cells))

    if not study.looks:
        return f"{len(left)} cells to run, {time(left)} one after the other ({source})"
    decided = decided_at(study, out)
    due = cells_due(study, current, decided)
    at_most = [s.cell for s in current if s.cell in left and s.cell.arm not in decided]
    if not due:
        return "all arms are decided: nothing to run"
    next_look = f"{len(due)} cells to the next look, {time(due)} one after the other"
    return f"{next_look}; at most {len(at_most)}, {time(at_most)} ({source})"
