"""Results of a study's cells as report.json holds them. Imports no torch."""

import contextlib
import difflib
import json
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

from reslab.ablation import noise
from reslab.ablation.cells import State, unplanned_runs
from reslab.ablation.dunnett import spreads
from reslab.ablation.plan_log import PlanHistory, read_decisions, read_plans, seeds_compared
from reslab.ablation.statistics import (
    MIN_SEEDS,
    compare_by_seed,
    factor_effects,
    paired_bootstrap,
    simulated_error,
    summarise,
)
from reslab.ablation.study import Study
from reslab.ablation.wording import FOLDS, Unit, count, explain, exploratory, named
from reslab.diff import differences
from reslab.errors import UserError
from reslab.runs.predictions import read_predictions
from reslab.runs.verify import CODE

RESAMPLES = 10_000
MOST_SIMULATED = 200  # seeds: a simulation of more takes too long for a report
RENAMED = {"n": "n_pairs", "sd": "delta_sd"}  # keys of a comparison that an arm has, too
HARDWARE = ("cpu", "gpus", "threads", "world_size")  # of the manifest's `environment`
SOFTWARE = ("python", "packages", "cuda", "cudnn", "determinism")
FINGERPRINT = ("files", "split", "classes")  # of the manifest's `data`
Report = dict[str, Any]
BySeed = dict[str, dict[int, float]]  # the metric by arm and seed


def analyse(study: Study, out: Path, states: Sequence[State]) -> Report:
    """Return the content of report.json: plain values, None where there is none; `states` ordered by arm.

    Raises:
        UserError: cells have finished, but none logged the study's metric.
    """
    values = of_metric(study, results(study, states))
    done = [state for state in states if state.status == "complete"]
    faults = dict(_data_faults(study, done))
    by_seed = _by_seed(states, values, faults)
    arms, unit = _arms(study, states, values, by_seed, faults)
    report: Report = {
        "study": study.name,
        **_planned(study, out, states, arms),
        **study.about(),
        "confidence": 0.95,
        "cells": {"planned": sum(s.status != "not needed" for s in states), **Counter(s.status for s in states)},
        "missing": [
            {"cell": s.cell.name, "arm": s.cell.arm, "seed": s.cell.seed, "status": s.status, "detail": s.detail}
            for s in states
            if s.status not in ("complete", "not needed")
        ],
        "command": command(study, out),
        "tested_weights": _groups(done, lambda manifest: {"weights": manifest.get("tested_weights")}),
        "hardware": _groups(done, lambda manifest: _subset(manifest.get("environment"), HARDWARE)),
        "software": _groups(done, lambda manifest: _subset(manifest.get("environment"), SOFTWARE)),
        "code": _groups(done, lambda manifest: _subset(manifest.get("git"), CODE)),
        **_hours(study, states),
        "arms": arms,
        "noise": noise.sources(study, by_seed, lambda arm: _correct(study, done, arm)),
        "spread": _spread(study, by_seed),
        **_effects(study, by_seed, faults, unit),
        "per_image": _per_image(study, done),
    }
    skipped = [state.cell.name for state in states if state.status == "not needed"]
    report["warnings"] = list(_warnings(report, study, out, values, skipped))
    # As JSON has it: None for a number that is not finite.
    return json.loads(json.dumps(report, default=str), parse_constant=lambda constant: None)


def results(study: Study, states: Sequence[State]) -> pd.DataFrame:
    """Return one row per planned cell, as ordered in `states`: arm, seed, status, factor levels, final metrics."""
    rows, metrics = [], []
    for state in states:
        arm = study.arms[state.cell.arm]
        final = state.manifest.get("results") if state.status == "complete" else None
        items = final.items() if isinstance(final, dict) else ()
        rows.append({"arm": arm.name, "seed": state.cell.seed, "status": state.status, **arm.levels})
        metrics.append({name: v for name, v in items if isinstance(v, int | float) and math.isfinite(v)})
    names = sorted({name for cell in metrics for name in cell})
    return pd.DataFrame(rows).join(pd.DataFrame(metrics, columns=names, dtype=float))


def of_metric(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Return the study's metric with one row per arm and one column per seed, NaN where there is none."""
    done = table[table["status"] == "complete"]
    logged = [name for name in table.columns[3 + len(study.factors) :] if done[name].notna().any()]
    if len(done) and study.metric not in logged:
        near = difflib.get_close_matches(study.metric, logged, max(len(logged), 1), 0) or ["nothing"]
        raise UserError(f"{study.path}: no run logs the metric {study.metric!r}; they log: {', '.join(near)}")
    column = table[study.metric] if study.metric in table else pd.Series(np.nan, table.index)
    wide = column.to_numpy(float).reshape(len(study.arms), len(study.seeds))
    return pd.DataFrame(wide, index=list(study.arms), columns=study.seeds)


def command(study: Study, out: Path) -> str:
    """Return the command line that runs the missing cells."""
    where = [] if out == study.out else ["--out", _shown(out)]
    return shlex.join(["reslab", "ablate", "run", _shown(study.path), *where, *study.overrides])


def _shown(path: Path) -> str:
    """Return the path relative to the working directory if it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _planned(study: Study, out: Path, states: Sequence[State], arms: Mapping[str, Report]) -> Report:
    """Return what the plan log shows; adds to every arm when it was planned."""
    plans, fault = [], None
    try:
        plans = read_plans(out)
    except UserError as error:
        fault = str(error)
    history = PlanHistory(study, plans)
    for name in study.arms:
        arms[name]["planned"] = history.arm(name)
    done = {name: {s.cell.seed for s in states if s.cell.arm == name and s.status == "complete"} for name in arms}
    others = [seeds for name, seeds in done.items() if name != study.baseline]
    looks = history.looks(seeds_compared(done[study.baseline], others))
    recorded = plans[-1].get("hash") if plans else None
    mismatched = any(state.status == "mismatched" for state in states)
    matches = recorded == study.hash and not mismatched
    return {
        "plan": {"hash": study.hash, "recorded": recorded, "matches": matches},
        "plan_log": [{key: plan.get(key) for key in ("time", "hash", "commit", "dirty", "results")} for plan in plans],
        "plan_log_fault": fault,
        "plan_changes": list(history.changes()),
        "seeds_planned": {str(seed): history.seed(seed) for seed in study.seeds},
        "looks_taken": looks,
        **_exploratory(study, looks, history.looks_planned),
    }


def _exploratory(study: Study, looks: Sequence[int], planned: bool) -> Report:
    """Return whether, and why, verdicts are exploratory: folds, or seeds added after results without planned looks."""
    if study.folds:
        return {"false_verdict_chance": None, "exploratory": FOLDS}
    if planned or len(looks) < 2:
        return {"false_verdict_chance": None, "exploratory": None}
    chance = false_verdict_chance(looks, len(study.arms) - 1)
    return {"false_verdict_chance": chance, "exploratory": exploratory(looks, study.seeds, chance)}


def false_verdict_chance(looks: Sequence[int], arms: int) -> float | None:
    """Return the simulated chance of a false verdict if `arms` arms are judged at every look; None: too many looks."""
    return simulated_error(looks, arms) if looks[-1] <= MOST_SIMULATED else None


def _arms(
    study: Study, states: Sequence[State], values: pd.DataFrame, by_seed: BySeed, faults: Mapping[str, str]
) -> tuple[dict[str, Report], Unit]:
    arms: dict[str, Report] = {}
    for name, arm in study.arms.items():
        cells = [state for state in states if state.cell.arm == name]
        arms[name] = {
            "levels": arm.levels,
            "changes": [list(change) for change in arm.changes],
            "cells": dict(Counter(state.status for state in cells)),
            **asdict(summarise(values.loc[name].dropna().to_numpy(), study.test)),
            "data_differ": name in faults,
            "wall_seconds": _mean(cells, "wall_seconds"),
            "samples_per_second": _mean(cells, "samples_per_second"),
        }
    unit = Unit.of({"metric": study.metric, "arms": arms})
    rules = (study.margin, study.mode, study.looks, study.test)
    for name, c in compare_by_seed(by_seed, study.baseline, study.seeds, *rules).items():
        arms[name] |= {RENAMED.get(key, key): value for key, value in vars(c).items() if key != "reasons"}
        arms[name]["reason"] = faults.get(name) or explain(c.reasons, unit, study.margin, c.delta, c.p_holm, c.n)
    return arms, unit


def _by_seed(states: Sequence[State], values: pd.DataFrame, faults: Mapping[str, str]) -> BySeed:
    """Return the metric by arm and seed: NaN for a diverged cell, nothing for one without a comparable result."""
    metric = values.to_dict("index")
    by_seed: BySeed = {state.cell.arm: {} for state in states}
    for state in states:
        arm, seed = state.cell.arm, state.cell.seed
        if arm not in faults and (state.status == "diverged" or not math.isnan(metric[arm][seed])):
            by_seed[arm][seed] = metric[arm][seed]
    return by_seed


def _spread(study: Study, by_seed: BySeed) -> Report:
    """Return the correlation between arms over the seeds that all have, and the largest ratio of their spreads."""
    common = [seed for seed in study.seeds if all(math.isfinite(of.get(seed, math.nan)) for of in by_seed.values())]
    if len(common) < MIN_SEEDS:
        return {"correlation": None, "ratio": None, "seeds": len(common)}
    table = np.array([[of[seed] for seed in common] for of in by_seed.values()])
    sds = table.std(axis=1, ddof=1)
    ratio = float(sds.max() / sds.min()) if sds.min() > 0 else None
    return {"correlation": float(spreads(table).correlation), "ratio": ratio, "seeds": len(common)}


def _effects(study: Study, by_seed: BySeed, faults: Mapping[str, str], unit: Unit) -> Report:
    """Return main effects and pairwise interactions of a factor study."""
    if not study.factors:
        return {}
    if faults:
        return {"effects": [], "interactions": [], "effects_reason": "the arms were not trained on the same data"}
    by_labels = {tuple(arm.levels.values()): by_seed[name] for name, arm in study.arms.items()}
    effects = factor_effects(study.factors, by_labels, study.seeds, study.test)
    main, pairs = ([asdict(effect) for effect in group] for group in (effects.main, effects.interactions))
    why = "effects are averages over the full grid: " if effects.reasons else ""
    return {"effects": main, "interactions": pairs, "effects_reason": why + explain(effects.reasons, unit)}


def _mean(states: Sequence[State], key: str) -> float | None:
    values = [state.manifest.get(key) for state in states if state.status == "complete"]
    numbers = [value for value in values if isinstance(value, int | float)]
    return float(np.mean(numbers)) if numbers else None


def _data_faults(study: Study, done: Sequence[State]) -> Iterator[tuple[str, str]]:
    """Yield each arm whose data differ from the baseline's, with the reason: such arms are not compared.

    The splits of folds differ, so those of one fold are compared.
    """
    for name in study.arms:
        groups: dict[int, list[Report]] = {}
        for s in done:
            if s.cell.arm in (study.baseline, name):
                of_fold = groups.setdefault(s.cell.seed if study.folds else 0, [])
                of_fold.append(_subset(s.manifest.get("data"), FINGERPRINT))
        keys = {key for both in groups.values() for one in both for key, _, _ in differences(both[0], one)}
        if keys and name != study.baseline:
            yield name, f"its cells and the baseline's used different data: {', '.join(sorted(keys))} in manifest.json"


def _subset(group: Any, keys: Sequence[str]) -> dict[str, Any]:
    return {key: group.get(key) if isinstance(group, dict) else None for key in keys}


def _groups(states: Sequence[State], of: Callable[[Mapping[str, Any]], dict[str, Any]]) -> list[Report]:
    """Group cells by a part of their manifests, the largest group first."""
    groups: dict[str, Report] = {}
    for state in states:
        part = of(state.manifest)
        groups.setdefault(json.dumps(part), {"is": part, "cells": []})["cells"].append(state.cell.name)
    return sorted(groups.values(), key=lambda group: -len(group["cells"]))


def _hours(study: Study, states: Sequence[State]) -> Report:
    """Return GPU-hours of the cells that used GPUs and core-hours of the others, over all recorded attempts."""
    hours = {"gpu_hours": 0.0, "cpu_hours": 0.0}
    for state in states:
        environment, seconds = state.manifest.get("environment"), state.manifest.get("wall_seconds")
        if isinstance(environment, dict) and isinstance(seconds, int | float):
            accelerator = (study.arms[state.cell.arm].config.get("trainer") or {}).get("accelerator")
            on_gpu = bool(environment.get("gpus")) and accelerator != "cpu"
            width = environment.get("world_size", 1) * (1 if on_gpu else environment.get("threads", 1))
            hours["gpu_hours" if on_gpu else "cpu_hours"] += seconds * width / 3600
    return {key: round(value, 4) for key, value in hours.items()}


def _warnings(report: Report, study: Study, out: Path, values: pd.DataFrame, skipped: Sequence[str]) -> Iterator[str]:
    """Yield what a reader must know before the numbers; `skipped` are cells that did not have to run."""
    plan, cells = report["plan"], report["cells"]
    if report["exploratory"]:
        yield report["exploratory"]
    if report["plan_changes"]:
        yield f"The plan was changed when results existed: {'; '.join(report['plan_changes'])}."
    for arm, decision in [] if report["plan_log_fault"] else read_decisions(study, out).items():
        now = report["arms"][arm]
        if (now["look"], now["verdict"]) != (decision["look"], decision["verdict"]):
            was = f"{decision['verdict']} after {decision['look']} seeds"
            yield f"{arm} was decided as {was}; its results have changed since and give another verdict."
    if report["plan_log_fault"]:
        yield f"The plan log cannot be trusted: {report['plan_log_fault']}."
    elif not plan["recorded"]:
        yield "There is no plan log (plan.jsonl), so nothing shows that these runs were planned before they ran."
    elif plan["recorded"] != plan["hash"]:
        hashes = f"its hash is {plan['hash'][:12]}, the plan's is {plan['recorded'][:12]}"
        yield f"The study file has changed since the runs were planned: {hashes}."
    if mismatched := [state["cell"] for state in report["missing"] if state["status"] == "mismatched"]:
        yield f"These runs do not match the plan and are not counted: {named(mismatched)}."
    if faults := [name for name, arm in report["arms"].items() if arm["data_differ"]]:
        yield f"These arms used different data than the baseline and get no verdict: {named(faults)}."
    if lacking := cells["planned"] - cells.get("complete", 0):
        yield f"{lacking} of {count(cells['planned'], 'cell')} have no result; they are listed below, with the reason."
    listed = [state["cell"] for state in report["missing"]]
    empty = [f"{arm}/seed-{seed}" for arm, row in values.iterrows() for seed in row.index[row.isna()]]
    if silent := [cell for cell in empty if cell not in (*listed, *skipped)]:
        yield f"These cells finished without a value of {study.metric}: {named(silent)}."
    if others := unplanned_runs(study, out):
        yield f"The study directory holds other runs, which are not counted: {named(others)}."
    for circumstance in ("hardware", "software", "code"):
        if odd := report[circumstance][1:]:  # all groups but the largest
            most = report[circumstance][0]["is"]
            keys = sorted({key for group in odd for key, _, _ in differences(most, group["is"])})
            where = named([cell for group in odd for cell in group["cells"]])
            yield f"Not all cells ran with the same {circumstance}: {', '.join(keys)} differ in {where}."


def _per_image(study: Study, states: Sequence[State]) -> dict[str, Report]:
    """Compare every arm with the baseline over seeds and test images, if all their cells kept their predictions."""
    others = [name for name in study.arms if name != study.baseline]
    if not study.metric.startswith("test/"):
        reason = f"the study's metric is {study.metric}: test predictions are not used to choose between arms"
        return {name: {"reason": reason} for name in others}
    correct = {name: _correct(study, states, name) for name in study.arms}
    return {name: _bootstrap(correct[study.baseline], correct[name]) for name in others}


Correct = tuple[np.ndarray, np.ndarray]  # M images: index and label (M, 2), and whether each seed is right (S, M)


def _correct(study: Study, states: Sequence[State], arm: str) -> Correct | str:
    """Return which test images every seed of an arm classifies correctly, or why that is unknown."""
    cells = [state.cell for state in states if state.cell.arm == arm]
    if len(cells) < len(study.seeds) and not study.looks:
        return f"{arm} has cells without a result"
    images, correct = [], []
    for cell in cells:
        predictions = None
        with contextlib.suppress(OSError, ValueError, KeyError, BadZipFile):
            predictions = read_predictions(cell.folder)
        if predictions is None:
            return f"{cell.name} has no readable predictions.npz"
        images.append(np.stack([predictions.index, predictions.label], axis=1))
        if not np.array_equal(images[0], images[-1]):
            return f"{cell.name} was not tested on the same images as the other cells"
        correct.append(predictions.prediction == predictions.label)
    return images[0], np.stack(correct)


def _bootstrap(baseline: Correct | str, arm: Correct | str) -> Report:
    if isinstance(baseline, str) or isinstance(arm, str):
        return {"reason": baseline if isinstance(baseline, str) else arm}
    if not np.array_equal(baseline[0], arm[0]):
        return {"reason": "it was not tested on the same images as the baseline"}
    both = min(len(arm[1]), len(baseline[1]))  # with planned looks, an arm may have stopped before the baseline
    delta, low, high = paired_bootstrap(arm[1][:both], baseline[1][:both], RESAMPLES, np.random.default_rng(0))
    seeds, images = both, arm[1].shape[1]
    return {"seeds": seeds, "images": images, "delta": delta, "ci_low": low, "ci_high": high}
