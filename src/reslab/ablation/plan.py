"""What `ablate plan` prints: the cells, what each arm changes, the cost; no torch."""

import os
from pathlib import Path
from typing import Any

from reslab.ablation.cells import State, read_plan, seconds_per_cell, states
from reslab.ablation.study import Arm, Study
from reslab.runs.manifest import duration


def describe(study: Study, out: Path) -> str:
    """The plan in plain text, with what is there of it already in `out`."""
    found = states(study, out)
    done = sum(s.status == "complete" for s in found)
    judged = f"{study.metric} (more is better)" if study.mode == "max" else f"{study.metric} (less is better)"
    lines = [
        f"study     {study.name}: {study.question}",
        f"file      {os.path.relpath(study.path)}",
        f"cells     {len(study.arms)} arms × {len(study.seeds)} seeds ({_seeds(study)}) = {len(found)}; {done} done",
        f"judged    {judged} of the {'last' if study.test_weights == 'last' else 'best validated'} weights; {_margin(study)}",
        *(f"factor    {key}: {', '.join(labels)}" for key, labels in study.factors.items()),
        "arms",
        *(f"  {line}" for arm in study.arms.values() for line in _arm(arm, study)),
        f"cost      {_cost(study, found)}",
        f"folder    {out}{_earlier(study, out)}",
        f"plan      {study.hash}",
    ]
    return "\n".join(lines)


def _seeds(study: Study) -> str:
    return ", ".join(map(str, study.seeds))


def _margin(study: Study) -> str:
    if study.margin is None:
        return "no margin: no arm can be called equivalent"
    return f"differences within ±{study.margin:g} do not matter"


def _arm(arm: Arm, study: Study) -> list[str]:
    if arm.name == study.baseline:
        return [f"{arm.name}  (baseline)"]
    changes = [f"{key}: {_short(there)} → {_short(here)}" for key, there, here in arm.changes]
    return [f"{arm.name}  {changes[0]}"] if len(changes) == 1 else [arm.name, *(f"    {line}" for line in changes)]


def _short(value: Any) -> str:
    return "null" if value is None else str(value)


def _cost(study: Study, found: list[State]) -> str:
    each = seconds_per_cell(study, found)
    left = [each[s.cell.arm] for s in found if s.status != "complete"]
    if None in left:
        return "unknown until a cell is finished; `minutes` in the study file can state it"
    measured = any(s.status == "complete" for s in found)
    source = "measured on the finished cells" if measured else "as the study file states"
    total = sum(seconds for seconds in left if seconds)
    return f"{len(left)} cells to run, {duration(total)} with one job at a time ({source})"


def _earlier(study: Study, out: Path) -> str:
    before = read_plan(out).get("hash")
    if before is None:
        return " (nothing run yet)"
    return "" if before == study.hash else f" (was begun with another plan, {before[:12]}…)"
