"""The plan log of a study, plan.jsonl: one line per plan, appended before its cells run and never changed.

The first line shows what was planned before any result; a later one, what was changed and how many results existed.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from reslab import resolve
from reslab.ablation.study import RUN_ONLY, Arm, Study
from reslab.ablation.study_file import MIN_LOOK
from reslab.errors import UserError
from reslab.files import sync_directory
from reslab.resolve import Config
from reslab.runs import manifest as manifests

PLANS, OLD_PLAN = "plan.jsonl", "plan.json"  # the second of earlier versions: overwritten by every plan
JUDGED = ("baseline", "metric", "mode", "margin", "test", "looks", "test_weights")  # what verdicts depend on
Plan = dict[str, Any]


def append_plan(study: Study, out: Path, data: Mapping[str, Config] | None = None) -> None:
    """Append the study's plan to plan.jsonl, unless it is the last one there; `data` holds hashes by arm.

    A line that a crash cut off is removed first; complete lines are never touched.
    """
    (lines, _), plans = _read(out), read_plans(out)
    if plan := next_plan(study, out, plans, data):
        git = manifests.git_state(Path(__file__).parent) or {}
        about = {"time": manifests.now(), "commit": git.get("sha"), "dirty": git.get("dirty")}
        imported = plans if not lines else []  # from plan.json
        _append(out / PLANS, lines, [*imported, {**about, **plan}])


def next_plan(study: Study, out: Path, plans: Sequence[Plan], data: Mapping[str, Config] | None = None) -> Plan | None:
    """Return what `append_plan` would log now; None if the last of `plans` is the same."""
    last = plans[-1] if plans else {}
    known = {**last.get("data", {}), **(data or {})}  # an arm's data may not be on this machine
    plan: Plan = {"name": study.name, "hash": study.hash, **study.about()}
    plan["data"] = {arm: hashes for arm, hashes in known.items() if arm in study.arms}
    plan["arms"] = {arm.name: _arm(arm) for arm in study.arms.values()}
    plan = json.loads(json.dumps(plan, default=str))
    if plans and all(last.get(key) == value for key, value in plan.items()):
        return None
    complete = _complete(out)
    return {"results": len(complete), "complete": complete, **plan}


def append_decisions(study: Study, out: Path, decisions: Mapping[str, Plan]) -> list[str]:
    """Log what was decided at a look, by arm; a decision that is in the log stays. Return the arms that are new."""
    known = read_decisions(study, out)
    new = {arm: decision for arm, decision in decisions.items() if arm not in known}
    if new:
        lines, _ = _read(out)
        _append(out / PLANS, lines, [{"time": manifests.now(), "hash": study.hash, "decisions": new}])
    return list(new)


def read_decisions(study: Study, out: Path) -> dict[str, Plan]:
    """Return the decisions about the study as it is now, by arm: look, stopped and verdict."""
    decisions: dict[str, Plan] = {}
    for line in _read(out)[1]:
        if line.get("hash") == study.hash:
            decisions = {**line.get("decisions", {}), **decisions}
    return decisions


def read_plans(out: Path) -> list[Plan]:
    """Return all plans, the oldest first; [] if nothing was run yet.

    Raises:
        UserError: a line other than the last is damaged, or was changed after a later one was appended.
    """
    return [line for line in _read(out)[1] if "decisions" not in line]


def read_plan(out: Path) -> Plan:
    """Return the last plan; {} if nothing was run yet."""
    return next(reversed(read_plans(out)), {})


def _read(out: Path) -> tuple[list[bytes], list[Plan]]:
    """Return the complete lines of plan.jsonl and their plans; without the file, the plan of an earlier version."""
    try:
        lines = (out / PLANS).read_bytes().splitlines()
    except FileNotFoundError:
        return [], _old_plan(out / OLD_PLAN)
    except OSError as error:
        raise UserError(f"cannot read {out / PLANS}: {error.strerror}") from error
    plans: list[Plan] = []
    for i, line in enumerate(lines):
        try:
            plans.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if i < len(lines) - 1:
                raise UserError(f"{out / PLANS}: line {i + 1} is damaged; restore it, or use another --out") from error
            break
        if plans[i].get("previous") != (_sha256(lines[i - 1]) if i else None):
            raise UserError(f"{out / PLANS}: the lines before line {i + 1} were changed; restore them")
    return lines[: len(plans)], plans


def _old_plan(path: Path) -> list[Plan]:
    try:
        plan = dict(json.loads(path.read_text(encoding="utf-8")))
        time = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it, or use another --out") from error
    plan.pop("cells", None)
    unknown = dict.fromkeys(("commit", "dirty", "results", "complete"))
    return [{"time": time, **unknown, "imported": OLD_PLAN, **plan}]


def _append(path: Path, lines: Sequence[bytes], plans: Sequence[Plan]) -> None:
    """Append plans with one write, each with the hash of the line before it, after the complete lines."""
    if not plans:
        return
    *_, last = [b"", *lines]
    new = b""
    for plan in plans:
        last = json.dumps({**plan, "previous": _sha256(last) if last else None}, ensure_ascii=False).encode()
        new += last + b"\n"
    whole = sum(len(line) + 1 for line in lines)
    with path.open("ab") as file:
        if (size := file.tell()) < whole:  # only the newline of the last line is missing
            new = b"\n" + new
        elif size > whole:
            file.truncate(whole)
        file.write(new)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _arm(arm: Arm) -> dict[str, Any]:
    changed = {key for key, _, _ in arm.changes}
    ignored = [key for key in (*RUN_ONLY, *manifests.NOT_IDENTITY) if key not in changed]
    config = json.dumps(resolve.prune(arm.config, ignored), sort_keys=True, default=str)
    return {"levels": arm.levels, "changes": arm.changes, "config": _sha256(config.encode())}


def _complete(out: Path) -> list[str]:
    """Return all complete cells in the directory, whichever plan they belong to."""
    names = []
    for path in out.glob("*/seed-*/manifest.json"):
        with contextlib.suppress(UserError, AttributeError):
            if manifests.read(path).get("status") == "complete":
                names.append(path.parent.relative_to(out).as_posix())
    return sorted(names)


@dataclass(frozen=True)
class PlanHistory:
    """What the plan log says about a study: when its arms and seeds were planned, and what changed since."""

    study: Study
    plans: Sequence[Plan]

    @cached_property
    def results(self) -> list[int | None]:
        """The most results that existed at each plan or before; None if unknown."""
        most: list[int | None] = []
        for plan in self.plans:
            n = plan.get("results")
            most.append(max([n, *(m for m in most if m is not None)]) if n is not None else None)
        return most

    @cached_property
    def _arms(self) -> dict[str, Plan]:
        return json.loads(json.dumps({arm.name: _arm(arm) for arm in self.study.arms.values()}, default=str))

    def arm(self, name: str) -> str:
        """Return when an arm was planned, as it is now."""
        return self._label(self._holds(plan, name) for plan in self.plans)

    def is_current(self, name: str) -> bool:
        """Return whether the last plan has the arm as it is now."""
        return bool(self.plans) and self._holds(self.plans[-1], name)

    def _holds(self, plan: Plan, name: str) -> bool:
        if (then := plan.get("arms", {}).get(name)) is None:
            return False
        key = "config" if "config" in then else "changes"
        return then.get(key) == self._arms[name][key]

    def seed(self, seed: int) -> str:
        return self._label(seed in plan.get("seeds", []) for plan in self.plans)

    def _label(self, planned: Iterator[bool]) -> str:
        """Return the label of what was planned first at the first True."""
        first = next((i for i, yes in enumerate(planned) if yes), None)
        if first is None:
            return "not planned yet"
        n = self.results[first]
        if n is None:
            return "planned before the plan log began"
        return f"added {_after(n)}" if n else "planned before any result"

    def changes(self) -> Iterator[str]:
        """Yield what was changed although results existed: how verdicts are reached, and arms or seeds removed."""
        for (old, new), n in zip(pairwise(self.plans), self.results[1:], strict=True):
            for key in JUDGED if n else ():
                if key in old and old[key] != new.get(key):
                    yield f"{key} changed from {_text(old[key])} to {_text(new.get(key))} {_after(n)}"
            for thing in ("arms", "seeds") if n else ():
                if gone := [str(item) for item in old.get(thing, ()) if item not in new.get(thing, ())]:
                    yield f"{thing} removed {_after(n)}: {', '.join(gone)}"

    def looks(self, now: int = 0) -> list[int]:
        """Return the numbers of seeds at which verdicts could be seen; `now` is that of the present results.

        A look was taken when seeds were added although results existed. With fewer than three seeds there was no
        verdict to see.
        """
        looks = {now}
        for old, new in pairwise(self.plans):
            if set(new.get("seeds", ())) - set(old.get("seeds", ())):
                looks.add(_seeds_with_results(old, new.get("complete") or ()))
        return sorted(look for look in looks if look >= MIN_LOOK)

    @property
    def looks_planned(self) -> bool:
        """Whether the study's looks were planned before any result."""
        later = [plan for plan, n in zip(self.plans, self.results, strict=True) if n]
        before = [plan for plan, n in zip(self.plans, self.results, strict=True) if n == 0]
        return bool(self.study.looks and before) and all(
            plan.get("looks") == self.study.looks for plan in (*before[-1:], *later)
        )


def seeds_compared(baseline: set[int], arms: Sequence[set[int]]) -> int:
    """Return the most seeds for which the baseline and one other arm have results."""
    return max((len(baseline & arm) for arm in arms), default=0)


def _seeds_with_results(plan: Plan, complete: Sequence[str]) -> int:
    """Return `seeds_compared` of a plan whose complete cells have these names."""
    seeds = {arm: {s for s in plan.get("seeds", ()) if f"{arm}/seed-{s}" in complete} for arm in plan.get("arms", ())}
    baseline = seeds.pop(plan.get("baseline", ""), set())
    return seeds_compared(baseline, list(seeds.values()))


def _after(n: int | None) -> str:
    return f"after {n} result{'' if n == 1 else 's'}"


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
