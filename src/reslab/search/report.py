"""Report of a search: the best trials, the importance of each setting, and a study that confirms the best."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from reslab import resolve
from reslab.ablation.new import argument
from reslab.ablation.study import parse_study
from reslab.ablation.study_file import Mistakes
from reslab.ablation.wording import count, is_share, markdown
from reslab.files import write_text
from reslab.search.search_file import Params, Search
from reslab.search.trials import Result, best_first, importances

CONFIRM = "confirm.yaml"
SHOWN = 5  # trials in the table
MARGIN = 0.002  # of accuracies, if the file states none: the sd over seeds on CIFAR-10


def plan(search: Search, out: Path) -> str:
    """Return what the search will do, as text."""
    width = max(len(d.key) for d in search.space)
    budget = f", at most {search.minutes:g} minutes of run time" if search.minutes else ""
    runs = f"{count(search.trials, 'trial')} × {count(len(search.seeds), 'seed')}, sampler {search.sampler}{budget}"
    lines = [
        f"search     {search.name}: {runs}",
        f"metric     {search.metric} ({search.mode}); the test set is not used",
    ]
    lines += [f"{'' if i else 'space':<11}{d.key:<{width}}  {d}" for i, d in enumerate(search.space)]
    return "\n".join([*lines, f"directory  {out}"])


def settings(result: Result) -> str:
    return ", ".join(f"{resolve.short_key(key)} {value}" for key, value in result.trial.params.items())


def write_report(search: Search, out: Path, results: Sequence[Result]) -> str:
    """Write report.json, report.md and confirm.yaml, and return the text for the terminal."""
    best, shares = best_first(search, results), importances(search, results)
    study, why = confirmatory(search, out, best)
    counts = {
        status: sum(r.status == status for r in results) for status in ("complete", "diverged", "failed", "running")
    }
    content = {
        "search": search.name, "metric": search.metric, "mode": search.mode, "sampler": search.sampler,
        "seed": search.seed, "seeds": search.seeds, "trials": counts, "importance": shares,
        "best": [r.trial.number for r in best], "confirm": str(study) if study else None,
        "results": [{"trial": r.trial.number, "directory": r.trial.arm, "status": r.status, "value": r.value,
                     "params": r.trial.params, "detail": r.detail} for r in results],
    }  # fmt: skip
    write_text(out / "report.json", json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")
    lines = [*_table(search, best), "", *_notes(search, results, counts, shares)]
    following = f"next: reslab ablate run {argument(study)}" if study else f"no study to confirm: {why}"
    write_text(out / "report.md", _markdown(search, results, best, lines, following))
    return "\n".join(["", *lines, "", following, f"report: {out / 'report.md'}"])


def _table(search: Search, best: Sequence[Result]) -> list[str]:
    if not best:
        return ["no trial is complete"]
    rows = [[f"trial {r.trial.number}", f"{r.value:.4f}", settings(r)] for r in best[:SHOWN]]
    width = max(len(row[0]) for row in rows)
    return [
        f"{'best':<{width}}  {search.metric}",
        *(f"{a:<{width}}  {b:<{len(search.metric)}}  {c}" for a, b, c in rows),
    ]


def _notes(
    search: Search, results: Sequence[Result], counts: Mapping[str, int], shares: Mapping[str, float]
) -> list[str]:
    lines = [f"{count(n, 'trial')} {status}" for status, n in counts.items() if n and status != "complete"]
    lines += [f"trial {r.trial.number}: {r.detail}" for r in results if r.status == "failed"][:SHOWN]
    if shares:
        lines.append("importance  " + ", ".join(f"{resolve.short_key(k)} {100 * v:.0f} %" for k, v in shares.items()))
    if counts["complete"] > 1:
        best_of = f"the best of {counts['complete']} values on the same validation images"
        lines.append(f"The best {search.metric} is optimistic: it is {best_of}. A study with fresh seeds confirms it.")
    return lines


def _markdown(
    search: Search, results: Sequence[Result], best: Sequence[Result], lines: Sequence[str], following: str
) -> str:
    keys = [d.key for d in search.space]
    head = ["trial", "status", search.metric, *map(resolve.short_key, keys)]
    order = {r.trial.number: i for i, r in enumerate(best)}
    rows = sorted(results, key=lambda r: (order.get(r.trial.number, len(results)), r.trial.number))
    table = [head, ["---"] * len(head)]
    for r in rows:
        value = "" if r.value is None else f"{r.value:.4f}"
        table.append([str(r.trial.number), r.status, value, *(str(r.trial.params[key]) for key in keys)])
    text = [f"# {search.name}", "", *("| " + " | ".join(map(markdown, row)) + " |" for row in table), ""]
    return (
        "\n".join([*text, *(f"- {markdown(line)}" for line in lines[len(_table(search, best)) + 1 :]), "", following])
        + "\n"
    )


def confirmatory(search: Search, out: Path, best: Sequence[Result]) -> tuple[Path | None, str]:
    """Write a study of the base against the best settings, on the test set and with seeds that the search did not use.

    Return its path, or None and the reason why there is none: no trial is complete, or the base is the best.
    """
    path = out / CONFIRM
    arms: dict[str, Params] = {"base": {}}
    for result in best[: search.top]:
        params = _moved(result.trial.params, search.path.parent, out)
        arms[f"trial_{result.trial.number}"] = params
        mistakes = Mistakes()
        parse_study(path, _study(search, out, arms), (), mistakes)
        if any("it changes nothing" in text for text in mistakes.texts):  # the settings of the base
            del arms[f"trial_{result.trial.number}"]
            continue
        mistakes.raise_all(path)
    if len(arms) == 1:
        path.unlink(missing_ok=True)
        return None, "the base has the best settings" if best else "no trial is complete"
    if path.exists() and resolve.read_mapping(path).get("arms") == arms:  # it may have been edited, or run
        return path, ""
    header = (
        f"# Does the best of {search.name} beat the base, with fresh seeds and on the test set?\n"
        f"#   reslab ablate run {argument(path)}\n"
        f"# Proposed by reslab search. Check margin and looks before the first run: they are part of the plan.\n"
    )
    text = yaml.safe_dump(_study(search, out, arms), sort_keys=False, width=120, default_flow_style=None)
    write_text(path, header + text)
    return path, ""


def _study(search: Search, out: Path, arms: Mapping[str, Params]) -> dict[str, Any]:
    first = max(search.seeds) + 1
    metric = f"test/{search.metric.partition('/')[2]}"
    margin = search.margin or (MARGIN if is_share(metric) else None)
    return {
        "name": f"{search.name}_confirm",
        "base": _base(search, out),
        "baseline": "base",
        "metric": metric,
        "mode": search.mode,
        **({"margin": margin} if margin else {}),
        "test_weights": search.test_weights,
        "arms": dict(arms),
        "seeds": list(range(first, first + search.looks[-1])),
        "looks": search.looks,
    }


def _base(search: Search, out: Path) -> list[Any]:
    """Return the search's base, then the options of the command line, with paths relative to the study."""
    parts = [_moved(part, search.path.parent, out) for part in search.base_parts]
    for key, value in resolve.options(search.overrides):
        parts.append(
            _moved(value, Path(), out) if key == "config" else {key: _moved(resolve.parse_value(value), Path(), out)}
        )
    return parts


def _moved(value: Any, old: Path, new: Path) -> Any:
    """Return a value with every path of a YAML file in it made relative to another directory."""
    if isinstance(value, dict):
        return {key: _moved(inner, old, new) for key, inner in value.items()}
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and (old / value).is_file():
        return os.path.relpath((old / value).resolve(), new.resolve())
    return value
