"""What the cells of a study say, as report.json holds it. No torch here."""

import difflib
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from reslab.ablation.cells import State, read_plan, unplanned_runs
from reslab.ablation.statistics import Comparison, compare_by_seed, factor_effects, paired_bootstrap, summarise
from reslab.ablation.study import Study
from reslab.ablation.wording import count, named
from reslab.diff import differences
from reslab.errors import UserError
from reslab.runs.figures import read_predictions
from reslab.runs.verify import CODE

RESAMPLES = 10_000
RENAMED = {"n": "n_pairs", "sd": "delta_sd"}  # of a comparison, beside the arm's own
HARDWARE = ("cpu", "gpus", "threads", "world_size")  # of the manifest's `environment`
SOFTWARE = ("python", "packages", "cuda", "cudnn", "determinism")
FINGERPRINT = ("files", "split", "classes")  # of the manifest's `data`
Report = dict[str, Any]


def analyse(study: Study, out: Path, states: Sequence[State]) -> Report:
    """Everything that report.json holds: plain values, None where there is none.

    Raises:
        UserError: cells have finished, and none has logged the study's metric.
    """
    order = list(study.arms)
    states = sorted(states, key=lambda state: order.index(state.cell.arm))
    values = of_metric(study, results(study, states))
    done = [state for state in states if state.status == "complete"]
    faults = dict(_data_faults(study, states))
    report: Report = {
        "study": study.name,
        "question": study.question,
        "plan": _plan(study, out, states),
        "metric": study.metric,
        "mode": study.mode,
        "margin": study.margin,
        "test_weights": study.test_weights,
        "baseline": study.baseline,
        "seeds": study.seeds,
        "factors": study.factors,
        "confidence": 0.95,
        "cells": {"planned": len(states), **Counter(state.status for state in states)},
        "missing": [_missing(state) for state in states if state.status != "complete"],
        "command": command(study, out),
        "tested_weights": _groups(done, lambda manifest: {"weights": manifest.get("tested_weights")}),
        "hardware": _groups(done, lambda manifest: _some(manifest.get("environment"), HARDWARE)),
        "software": _groups(done, lambda manifest: _some(manifest.get("environment"), SOFTWARE)),
        "code": _groups(done, lambda manifest: _some(manifest.get("git"), CODE)),
        **_hours(study, states),
        "arms": _arms(study, states, values, faults),
        **_effects(study, states, values, faults),
        "per_image": _per_image(study, done),
    }
    report["warnings"] = list(_warnings(report, study, out, values))
    return _plain(report)


def results(study: Study, states: Sequence[State]) -> pd.DataFrame:
    """A row a planned cell, in the file's order of arms: arm, seed, status, the factors' levels, the final metrics."""
    found = {(state.cell.arm, state.cell.seed): state for state in states}
    rows, metrics = [], []
    for arm in study.arms.values():
        for seed in study.seeds:
            state = found[arm.name, seed]
            rows.append({"arm": arm.name, "seed": seed, "status": state.status, **arm.levels})
            metrics.append(_numbers(state))
    names = sorted({name for cell in metrics for name in cell})
    return pd.DataFrame(rows).join(pd.DataFrame(metrics, columns=names, dtype=float))


def _numbers(state: State) -> dict[str, float]:
    found = state.manifest.get("results") if state.status == "complete" else None
    items = found.items() if isinstance(found, dict) else ()
    return {name: float(value) for name, value in items if isinstance(value, int | float) and math.isfinite(value)}


def of_metric(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """The study's metric, a row an arm and a column a seed, NaN where there is none."""
    done = table[table["status"] == "complete"]
    logged = [name for name in table.columns[3 + len(study.factors) :] if done[name].notna().any()]
    if len(done) and study.metric not in logged:
        near = difflib.get_close_matches(study.metric, logged, max(len(logged), 1), 0) or ["nothing"]
        raise UserError(f"no run logs the metric {study.metric!r} ({study.path}); they log: {', '.join(near)}")
    column = table[study.metric] if study.metric in table else pd.Series(np.nan, table.index)
    wide = column.to_numpy(float).reshape(len(study.arms), len(study.seeds))
    return pd.DataFrame(wide, index=list(study.arms), columns=study.seeds)


def command(study: Study, out: Path) -> str:
    """The command line that fills what is missing."""
    where = [] if out == study.out else ["--out", _shown(out)]
    return shlex.join(["reslab", "ablate", "run", _shown(study.path), *where, *study.overrides])


def _shown(path: Path) -> str:
    """Relative to where the user is, if it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _plan(study: Study, out: Path, states: Sequence[State]) -> Report:
    try:
        recorded = read_plan(out).get("hash")
    except UserError:
        recorded = None
    foreign = any(state.status == "mismatched" for state in states)
    return {"hash": study.hash, "recorded": recorded, "matches": recorded == study.hash and not foreign}


def _missing(state: State) -> Report:
    cell = state.cell
    return {"cell": cell.name, "arm": cell.arm, "seed": cell.seed, "status": state.status, "detail": state.detail}


# Arms


def _arms(study: Study, states: Sequence[State], values: pd.DataFrame, faults: Mapping[str, str]) -> Report:
    found = _by_seed(states, values, faults)
    compared = compare_by_seed(found, study.baseline, study.seeds, study.margin, study.mode)
    arms = {}
    for name, arm in study.arms.items():
        of_arm = [state for state in states if state.cell.arm == name]
        arms[name] = {
            "levels": arm.levels,
            "changes": [list(change) for change in arm.changes],
            "cells": dict(Counter(state.status for state in of_arm)),
            **asdict(summarise(values.loc[name].dropna().to_numpy())),
            **(_renamed(compared[name]) if name in compared else {}),
            "data_differ": name in faults,
            "wall_seconds": _mean(of_arm, "wall_seconds"),
            "samples_per_second": _mean(of_arm, "samples_per_second"),
        }
        if name in faults:
            arms[name]["reason"] = faults[name]
    return arms


def _renamed(comparison: Comparison) -> Report:
    return {RENAMED.get(key, key): value for key, value in asdict(comparison).items()}


def _by_seed(states: Sequence[State], values: pd.DataFrame, faults: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """The metric by arm and seed: NaN where a cell diverged, nothing without a result that can be compared."""
    known = values.to_dict("index")
    found: dict[str, dict[int, float]] = {state.cell.arm: {} for state in states}
    for cell, status in ((state.cell, state.status) for state in states if state.cell.arm not in faults):
        value = known[cell.arm][cell.seed]
        if status == "diverged" or not math.isnan(value):
            found[cell.arm][cell.seed] = value
    return found


def _effects(study: Study, states: Sequence[State], values: pd.DataFrame, faults: Mapping[str, str]) -> Report:
    """Main effects and pairwise interactions of a factor study."""
    if not study.factors:
        return {}
    if faults:
        return {"effects": [], "interactions": [], "effects_reason": "not all arms saw the same data"}
    found = _by_seed(states, values, faults)
    by_labels = {tuple(arm.levels.values()): found[name] for name, arm in study.arms.items()}
    effects = factor_effects(study.factors, by_labels, study.seeds)
    main, pairs = ([asdict(effect) for effect in group] for group in (effects.main, effects.interactions))
    return {"effects": main, "interactions": pairs, "effects_reason": effects.reason}


def _mean(states: Sequence[State], key: str) -> float | None:
    found = [state.manifest.get(key) for state in states if state.status == "complete"]
    numbers = [value for value in found if isinstance(value, int | float)]
    return float(np.mean(numbers)) if numbers else None


def _data_faults(study: Study, states: Sequence[State]) -> Iterator[tuple[str, str]]:
    """The arms whose cells saw other data than the baseline's, and which: no comparison stands on that."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in study.arms}
    for state in states:
        if state.status == "complete":
            seen[state.cell.arm].append(_some(state.manifest.get("data"), FINGERPRINT))
    for name in study.arms:
        both = seen[study.baseline] + seen[name]
        parts = {key for data in both for key, _, _ in differences(both[0], data)}
        if parts and name != study.baseline:
            said = ", ".join(sorted(parts))
            yield name, f"its cells and the baseline's did not see the same data: {said} differ in their manifests"


# Across cells


def _some(group: Any, keys: Sequence[str]) -> dict[str, Any]:
    return {key: group.get(key) if isinstance(group, dict) else None for key in keys}


def _groups(states: Sequence[State], of: Callable[[Mapping[str, Any]], dict[str, Any]]) -> list[Report]:
    """What the manifests say, each different thing once, the most frequent first, with the cells that say it."""
    groups: list[Report] = []
    for state in states:
        said = of(state.manifest)
        group = next((group for group in groups if group["is"] == said), None)
        if group is None:
            groups.append(group := {"is": said, "cells": []})
        group["cells"].append(state.cell.name)
    return sorted(groups, key=lambda group: -len(group["cells"]))


def _hours(study: Study, states: Sequence[State]) -> Report:
    """GPU-hours of the cells that used GPUs, core-hours of the others, of all attempts that could say."""
    hours = {"gpu_hours": 0.0, "cpu_hours": 0.0}
    for state in states:
        environment, seconds = state.manifest.get("environment"), state.manifest.get("wall_seconds")
        if isinstance(environment, dict) and isinstance(seconds, int | float):
            accelerator = (study.arms[state.cell.arm].config.get("trainer") or {}).get("accelerator")
            on_gpu = bool(environment.get("gpus")) and accelerator != "cpu"
            width = environment.get("world_size", 1) * (1 if on_gpu else environment.get("threads", 1))
            hours["gpu_hours" if on_gpu else "cpu_hours"] += seconds * width / 3600
    return {key: round(value, 4) for key, value in hours.items()}


def _warnings(report: Report, study: Study, out: Path, values: pd.DataFrame) -> Iterator[str]:
    """What a reader must know before the numbers."""
    plan, cells = report["plan"], report["cells"]
    if not plan["recorded"]:
        yield "There is no readable plan.json: nothing shows that these runs were planned before they ran."
    elif plan["recorded"] != plan["hash"]:
        recorded, here = plan["recorded"][:12], plan["hash"][:12]
        yield f"The study is not the one that was planned before the runs: its hash is {here}, the plan's {recorded}."
    if mismatched := [state["cell"] for state in report["missing"] if state["status"] == "mismatched"]:
        yield f"Not of this plan, and not counted: {named(mismatched)}."
    if faults := [name for name, arm in report["arms"].items() if arm["data_differ"]]:
        yield f"Not all cells saw the same data as the baseline's, which takes the verdict from {named(faults)}."
    if lacking := cells["planned"] - cells.get("complete", 0):
        yield f"{lacking} of {count(cells['planned'], 'cell')} have no result: they are listed below, with the reason."
    gone = [state["cell"] for state in report["missing"]]
    empty = [f"{arm}/seed-{seed}" for arm, row in values.iterrows() for seed in row.index[row.isna()]]
    if silent := [cell for cell in empty if cell not in gone]:
        yield f"Finished without a value of {study.metric}: {named(silent)}."
    if others := unplanned_runs(study, out):
        yield f"Beside the plan's cells there are others, which count nowhere: {named(others)}."
    for circumstance in ("hardware", "software", "code"):
        yield from _differing(circumstance, report[circumstance])


def _differing(circumstance: str, groups: Sequence[Report]) -> Iterator[str]:
    """One sentence where cells ran in different circumstances: in what, and which cells are the odd ones."""
    if len(groups) < 2:
        return
    first, *odd = groups
    keys = sorted({key for group in odd for key, _, _ in differences(first["is"], group["is"])})
    cells = named([cell for group in odd for cell in group["cells"]])
    yield f"The cells did not all run with the same {circumstance}: {', '.join(keys)} differ ({cells} from the rest)."


# Per image


def _per_image(study: Study, states: Sequence[State]) -> dict[str, Report]:
    """Every arm against the baseline over seeds and test images, where all their cells kept their predictions."""
    others = [name for name in study.arms if name != study.baseline]
    if not study.metric.startswith("test/"):
        reason = f"the metric is {study.metric}: test predictions are not looked at to choose between arms"
        return {name: {"reason": reason} for name in others}
    read = {name: _correct(study, states, name) for name in study.arms}
    return {name: _bootstrap(read[study.baseline], read[name]) for name in others}


Correct = tuple[np.ndarray, np.ndarray]  # of M images: identity (M, 2) as index and label, and answers bool (S, M)


def _correct(study: Study, states: Sequence[State], arm: str) -> Correct | str:
    """Which test images every seed of an arm got right; a reason where that cannot be said."""
    cells = [state.cell for state in states if state.cell.arm == arm]
    if len(cells) < len(study.seeds):
        return f"{arm} has cells without a result"
    images, rows = None, []
    for cell in cells:
        try:
            found = read_predictions(cell.folder)
        except (OSError, ValueError, KeyError, BadZipFile):
            found = None
        if found is None:
            return f"{cell.name} has no readable predictions.npz"
        identity = np.stack([found.index, found.label], axis=1)
        if images is not None and not np.array_equal(images, identity):
            return f"{cell.name} was not tested on the same images as the other cells"
        images = identity
        rows.append(found.prediction == found.label)
    assert images is not None
    return images, np.stack(rows)


def _bootstrap(baseline: Correct | str, arm: Correct | str) -> Report:
    if isinstance(baseline, str) or isinstance(arm, str):
        return {"reason": baseline if isinstance(baseline, str) else arm}
    if not np.array_equal(baseline[0], arm[0]):
        return {"reason": "it was not tested on the same images as the baseline"}
    delta, low, high = paired_bootstrap(arm[1], baseline[1], RESAMPLES, np.random.default_rng(0))
    seeds, images = arm[1].shape
    return {"seeds": seeds, "images": images, "delta": delta, "ci_low": low, "ci_high": high}


def _plain(value: Any) -> Any:
    """The value as JSON knows it: None for what is no finite number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
