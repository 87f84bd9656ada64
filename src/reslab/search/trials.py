"""Trials of a search: the log of their settings, and Optuna's proposal of the next one.

The log holds what was proposed; what came of it is read from the run directories. Optuna is given both again for every
proposal, with a seed made of the search's and the trial's number. So a proposal is a function of the search file and
the trials before it: a kill at any moment loses and repeats nothing, and the resumed search proposes the same.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reslab import resolve
from reslab.ablation.study import RUN_ONLY
from reslab.errors import UserError
from reslab.files import sync_directory
from reslab.runs import manifest as manifests
from reslab.search.search_file import Dimension, Params, Search, grid

if TYPE_CHECKING:
    import optuna

LOG = "trials.jsonl"
DIGITS = 4  # of values from a range: 0.02371 is as good as 0.023714839
LEAST_FOR_IMPORTANCE = 10  # complete trials
Status = Literal["running", "complete", "diverged", "failed"]


@dataclass(frozen=True)
class Trial:
    """Settings to try; those with the same settings as an earlier trial share its runs."""

    number: int
    params: Params
    arm: str  # directory of the runs


@dataclass(frozen=True)
class Result:
    """What came of a trial; `value` is the mean of the metric over the seeds, None unless complete."""

    trial: Trial
    status: Status
    value: float | None = None
    detail: str = ""


class TrialLog:
    """The file trials.jsonl: a line about the search, then one line per trial, appended before it runs."""

    def __init__(self, search: Search, out: Path) -> None:
        self.path, self.header = out / LOG, _identity(search)
        header, *lines = self._read() or [self.header]
        if changed := [key for key in self.header if header.get(key) != self.header[key]]:
            what = ", ".join("base or options" if key == "config" else key for key in changed)
            raise UserError(f"{out} holds trials of another search (changed: {what}): use another --out, or remove it")
        self.trials: list[Trial] = []
        for line in lines:
            self._remember(line["params"])

    def add(self, params: Params) -> Trial:
        """Append a trial to the file, and return it."""
        if not self.path.exists():
            self._append(self.header)
        self._append({"trial": len(self.trials), "params": params})
        return self._remember(params)

    def _remember(self, params: Params) -> Trial:
        same = next((trial.arm for trial in self.trials if trial.params == params), None)
        self.trials.append(Trial(len(self.trials), params, same or f"trial-{len(self.trials):03}"))
        return self.trials[-1]

    def _read(self) -> list[dict[str, Any]]:
        """Return the complete lines, after removing one that a crash cut off: its trial had not begun."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole))
        try:
            return [dict(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path} is damaged: restore it, or use another --out") from error

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.path.parent)


def _identity(search: Search) -> dict[str, Any]:
    """Return what proposals and results depend on. Trials, time, and the study that confirms may change."""
    config = resolve.prune(search.base, [*RUN_ONLY, *manifests.NOT_IDENTITY])
    stated = {"space": [[d.key, d.kind, d.values, d.step] for d in search.space], "metric": search.metric}
    stated |= {key: getattr(search, key) for key in ("mode", "sampler", "seed", "seeds")}
    stated["config"] = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return json.loads(json.dumps(stated, default=str))


def propose(search: Search, results: Sequence[Result]) -> Params:
    """Return the settings of the next trial."""
    if search.sampler == "grid":
        return grid(search.space)[len(results)]
    import optuna

    study = optuna_study(search, results)
    seed = int(np.random.SeedSequence([search.seed, len(results)]).generate_state(1)[0])
    samplers = optuna.samplers
    # constant_liar: trials that still run count as bad, so that concurrent ones differ.
    tpe = search.sampler == "tpe"
    study.sampler = samplers.TPESampler(seed=seed, constant_liar=True) if tpe else samplers.RandomSampler(seed)
    params = study.ask(_distributions(search)).params
    return {d.key: _value(d, params[d.key]) for d in search.space}


def optuna_study(search: Search, results: Sequence[Result]) -> "optuna.Study":
    """Return the trials as a study of Optuna, in memory: for its importances and figures."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if search.mode == "max" else "minimize")
    states = optuna.trial.TrialState
    # TPE takes a pruned trial for worse than all complete ones; a failed trial carries no information.
    of = {"complete": states.COMPLETE, "diverged": states.PRUNED, "failed": states.FAIL, "running": states.RUNNING}
    for result in results:
        params = {d.key: _encoded(d, result.trial.params[d.key]) for d in search.space}
        trial = optuna.trial.create_trial(
            state=of[result.status], value=result.value, params=params, distributions=_distributions(search)
        )
        study.add_trial(trial)
    return study


def _distributions(search: Search) -> dict[str, Any]:
    return {dimension.key: _distribution(dimension) for dimension in search.space}


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.kind == "choice":
        return CategoricalDistribution([_encoded(dimension, value) for value in dimension.values])
    low, high = dimension.values
    if dimension.kind == "int":
        return IntDistribution(low, high, step=int(dimension.step or 1))
    return FloatDistribution(low, high, log=dimension.kind == "log", step=dimension.step)


def _encoded(dimension: Dimension, value: Any) -> Any:
    """Return a value as Optuna gets it: choices may be of any type, so their JSON."""
    return json.dumps(value, default=str) if dimension.kind == "choice" else value


def _value(dimension: Dimension, proposed: Any) -> Any:
    if dimension.kind == "choice":
        return next(value for value in dimension.values if _encoded(dimension, value) == proposed)
    if dimension.kind == "int":
        return int(proposed)
    low, high = dimension.values
    digits = 12 if dimension.step else DIGITS
    return min(max(float(f"{proposed:.{digits}g}"), low), high)


def best_first(search: Search, results: Sequence[Result]) -> list[Result]:
    """Return the complete trials with different settings, the best first."""
    sign = -1 if search.mode == "max" else 1
    complete = {r.trial.arm: r for r in reversed(results) if r.value is not None}
    return sorted(
        complete.values(), key=lambda r: (sign * (r.value if r.value is not None else math.nan), r.trial.number)
    )


def importances(search: Search, results: Sequence[Result]) -> dict[str, float]:
    """Return each key's share in the variance of the metric (PED-ANOVA, Watanabe et al. 2023); {} for few trials."""
    if len(search.space) < 2 or len(best_first(search, results)) < LEAST_FOR_IMPORTANCE:
        return {}
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    shares = optuna.importance.get_param_importances(optuna_study(search, results), evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}
