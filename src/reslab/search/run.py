"""Run a search: trials are proposed as runs become free, and run as the cells of a study are."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from reslab.ablation import launch
from reslab.ablation.cells import ARM, Cell, State, state
from reslab.ablation.progress import StudyProgress
from reslab.ablation.study import Arm
from reslab.errors import Exit, UserError
from reslab.files import write_text
from reslab.interrupt import close, resume_hint
from reslab.resolve import Loader
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import duration
from reslab.search import report
from reslab.search.search_file import Search, read_search
from reslab.search.trials import LOG, Result, Trial, TrialLog, best_first, propose

FAILURES = 3  # trials that fail one after the other end the search: the next would fail, too


def search(
    name: str, out: str | None, overrides: list[str], check: bool, jobs: int | None, jobs_per_gpu: int,
    fresh_processes: bool, retries: int, command: str,
) -> int:  # fmt: skip
    """Run `reslab search`: start or resume a search, report, and propose a study; return the exit status."""
    plan = read_search(name, overrides)
    folder = Path(out) if out else plan.out
    require_optuna()
    print(report.plan(plan, folder), flush=True)
    if check:
        check_values(plan)
        return Exit.OK
    resume_hint(lambda: f"to resume, run {command}" if (folder / LOG).exists() else "")
    resources = launch.LocalResources(jobs, jobs_per_gpu, fresh_processes)
    status, results = run_search(plan, folder, resources, retries)
    if status == Exit.PREEMPTED:
        return close()
    print(report.write_report(plan, folder, results))
    return status


def require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("reslab search requires Optuna: pip install 'reslab[hpo]'") from error


def check_values(search: Search) -> dict[str, str]:
    """Check every choice and both ends of every range against the classes; return hashes that identify the data."""
    arms = {f"settings {params}": search.arm("trial", params) for params in search.corners()}
    study = search.study({name: replace(arm, name=name) for name, arm in arms.items()})
    identities: dict[str, Any] = {}
    launch.typed_configs(study, identities)
    return next((dict(identity.hashes) for identity in identities.values()), {})


def run_search(
    search: Search, out: Path, resources: launch.LocalResources, retries: int = 1
) -> tuple[int, list[Result]]:
    """Run or resume a search on this machine; return the exit status, as of `ablate run`, and the results."""
    slots, folder = resources.slots(search.base), RunFolder(out)
    folder.probe()
    with folder.lock():
        server = resources.server(slots[0])
        log = TrialLog(search, out)
        data = check_values(search)
        progress = SearchProgress(search, out, log, data, retries, len(slots))
        with progress:
            pool = launch.Pool(progress, slots, server)
            pool.run()
    status = progress.exit_status()
    return Exit.PREEMPTED if status and pool.stopped else status, progress.results()


class SearchProgress(StudyProgress):
    """The cells of the trials so far, and the source of new ones.

    Args:
        data: Hashes that identify the data; a run on other data does not count.
    """

    def __init__(
        self, search: Search, out: Path, log: TrialLog, data: Mapping[str, str], retries: int, jobs: int
    ) -> None:
        self.search, self.out, self.log, self.data = search, out, log, dict(data)
        self.refused: dict[str, str] = {}  # why the settings of a trial cannot run, by arm
        super().__init__(search.study({}), [], retries, jobs)
        for trial in log.trials:
            self._add(trial)
        if mismatched := [s for s in self.states.values() if s.status == "mismatched"]:
            rows = [f"  {s.cell.name}: {s.detail}" for s in mismatched]
            raise UserError("\n".join([f"{out} holds other runs: move them away, or use another --out", *rows]))

    @property
    def _out(self) -> Path:
        return self.out

    def to_run(self) -> list[Cell]:
        """Return the cells that still have to run. A diverged cell has a result: these settings do not train."""
        return [cell for cell in super().to_run() if self.states[cell].status != "diverged"]

    def next_cells(self) -> list[Cell]:
        """Propose trials until one has cells to run; return these."""
        while self._may_propose():
            if cells := self._add(self.log.add(propose(self.search, self.results()))):
                return cells
        return []

    def _may_propose(self) -> bool:
        if len(self.log.trials) >= self.search.trials or self.stopped_by():
            return False
        return self.search.minutes is None or self._minutes() < self.search.minutes

    def stopped_by(self) -> str:
        """Return why the search cannot continue; "" if it can."""
        last = self.results()[-FAILURES:]
        return last[-1].detail if len(last) == FAILURES and all(r.status == "failed" for r in last) else ""

    def _minutes(self) -> float:
        return sum(s.manifest.get("wall_seconds") or 0 for s in self.states.values()) / 60

    def _add(self, trial: Trial) -> list[Cell]:
        """Write a trial's config; return its cells that have to run: none if an earlier trial has the same settings."""
        if trial.arm in self.study.arms or trial.arm in self.refused:
            return []
        arm, file = self.search.arm(trial.arm, trial.params), self.out / trial.arm / ARM
        self.study.arms[trial.arm] = arm
        try:
            text = file.read_text(encoding="utf-8") if file.exists() else self._write(arm, file)
        except UserError as error:
            self.refused[trial.arm] = str(error).replace("\n", " ")
            del self.study.arms[trial.arm]
            self._report(f"{trial.arm}: failed: {self.refused[trial.arm]}")
            return []
        cells = [Cell(trial.arm, seed, self.out / trial.arm / f"seed-{seed}") for seed in self.search.seeds]
        config = yaml.load(text, Loader)
        self.states |= {cell: state(self.study, cell, config, self.data) for cell in cells}
        return [cell for cell in self.to_run() if cell in cells]

    def _write(self, arm: Arm, file: Path) -> str:
        earlier = launch.runs_of_automatic_precision(self.study, self.out)
        text = launch.typed_configs(self.search.study({arm.name: arm}), earlier=earlier)[arm.name]
        file.parent.mkdir(exist_ok=True)
        write_text(file, text)
        return text

    def results(self) -> list[Result]:
        return [self._result(trial) for trial in self.log.trials]

    def _result(self, trial: Trial) -> Result:
        if trial.arm in self.refused:
            return Result(trial, "failed", detail=self.refused[trial.arm])
        states = [s for s in self.states.values() if s.cell.arm == trial.arm]
        values = [_metric(s, self.search.metric) for s in states]
        if any(s.status == "diverged" or value == math.inf for s, value in zip(states, values, strict=True)):
            return Result(trial, "diverged")
        numbers = [value for value in values if value is not None]
        if states and len(numbers) == len(states):
            return Result(trial, "complete", fmean(numbers))
        ended = [s for s in states if s.status != "complete" and self._has_failed(s)]
        return Result(trial, "failed", detail=_why(ended[0])) if ended else Result(trial, "running")

    def _has_failed(self, state: State) -> bool:
        """Return whether a cell without a result has ended; one that failed before it trained has no manifest."""
        tried = self._tries[state.cell] > 0 or state.status in ("failed", "unreadable")
        return tried and state.cell not in self.running

    def exit_status(self) -> int:
        results = self.results()
        unfinished = any(r.status in ("running", "failed") for r in results) or not results
        return Exit.FAILED if unfinished else Exit.OK

    def _planned(self) -> int:
        shared = len(self.log.trials) - len(self.study.arms)
        return (self.search.trials - shared) * len(self.search.seeds)

    def ended(self, cell: Cell, may_retry: bool, how: str = "", interrupted: bool = False) -> bool:
        before = best_first(self.search, self.results())[:1]
        retry = super().ended(cell, may_retry, how, interrupted)
        best = best_first(self.search, self.results())[:1]
        if best and best != before and best[0].trial.arm == cell.arm:
            self._report(
                f"{cell.arm}: best so far, {self.search.metric} {best[0].value:.4f}: {report.settings(best[0])}"
            )
        return retry

    def _time_left(self) -> str:
        walls = [s.manifest["wall_seconds"] for s in self.states.values() if s.status == "complete"]
        left = self._planned() - len(walls)
        if not walls or left <= 0:
            return ""
        seconds = fmean(walls) * left / (self.jobs or 1)
        if self.search.minutes is not None:
            seconds = min(seconds, max(self.search.minutes - self._minutes(), 0) * 60 / (self.jobs or 1))
        return f"; about {duration(seconds)} left"


def _metric(state: State, metric: str) -> float | None:
    """Return the value of a complete cell; infinity if it is not a finite number, None without a result."""
    if state.status != "complete":
        return None
    value = (state.manifest.get("results") or {}).get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf


def _why(state: State) -> str:
    return f"{state.detail or state.status} (see {state.cell.log})"
