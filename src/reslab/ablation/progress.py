"""Progress of a running study: a live table on a terminal, one line per event elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from reslab.ablation.cells import FINAL, NOT_BEGUN, Cell, State, read_config, seconds_per_cell, state
from reslab.ablation.looks import cells_due, comparisons, decided_at, without_unneeded
from reslab.ablation.plan_log import append_decisions
from reslab.ablation.study import Study
from reslab.errors import Exit
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import duration
from reslab.runs.metrics import read_rows

REFRESH = 1.0  # seconds
TAIL = 16384  # bytes at the end of metrics.csv, enough for the last epoch's row


class StudyProgress:
    """Keep the states of a study's cells, and print them as they change.

    Args:
        current: State of every cell at the start.
        retries: How often a failed cell is retried.
        jobs: Number of concurrent runs, to estimate the time left; None if unknown.
    """

    def __init__(self, study: Study, current: Sequence[State], retries: int, jobs: int | None = None) -> None:
        self.study, self.retries, self.jobs = study, retries, jobs
        self.states = {s.cell: s for s in current}
        self.running: dict[Cell, float] = {}  # start times
        self._tries: Counter[Cell] = Counter()  # that ended
        self._drawn = 0.0
        self._live = Live(console=Console(), auto_refresh=False) if sys.stdout.isatty() else None

    def __enter__(self) -> "StudyProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            self.refresh(now=True)
            self._live.stop()

    def to_run(self) -> list[Cell]:
        """Return the cells that still have to run."""
        return cells_due(self.study, [*self.states.values()], self._decided())

    def next_cells(self) -> list[Cell]:
        """Return the cells to run when none is waiting: those of the next look, once all of this one have ended."""
        return [] if self.running else self.next_look()

    def next_look(self) -> list[Cell]:
        """Log and report what the look that has ended decided; return the cells of the next one."""
        if not self.study.looks:
            return []
        compared = comparisons(self.study, [*self.states.values()])
        stopped = {arm: {"look": c.look, "stopped": c.stopped, "verdict": c.verdict} for arm, c in compared.items()}
        new = append_decisions(self.study, self._out, {arm: d for arm, d in stopped.items() if d["stopped"]})
        for arm in new:
            self._report(f"{arm}: {compared[arm].verdict} after {compared[arm].look} seeds ({stopped[arm]['stopped']})")
        return [cell for cell in self.to_run() if not self._tries[cell]]

    def exit_status(self) -> int:
        return Exit.OK if all(s.status == "complete" for s in self._needed()) else Exit.FAILED

    @property
    def _out(self) -> Path:
        return next(iter(self.states)).folder.parents[1]

    def _decided(self) -> dict[str, int]:
        return decided_at(self.study, self._out)

    def _planned(self) -> int:
        """Return how many cells there will be."""
        return len(self._needed())

    def _needed(self) -> list[State]:
        current = without_unneeded(self.study, [*self.states.values()], self._decided())
        return [s for s in current if s.status != "not needed"]

    def started(self, cell: Cell, note: str = "") -> None:
        self.running[cell] = time.monotonic()
        again = f" (try {self._tries[cell] + 1})" if self._tries[cell] else ""
        self._report(f"{cell.name}: started{note}{again}")

    def ended(self, cell: Cell, may_retry: bool, how: str = "", interrupted: bool = False) -> bool:
        """Report how a cell ended; return whether to retry it, if it `may_retry` and would not end the same again.

        `interrupted`: all cells were stopped, so one that left no run directory did not fail.
        """
        ended = state(self.study, cell, read_config(cell.config))
        if interrupted and ended.status == "missing":
            ended = State(cell, "interrupted", NOT_BEGUN, {})
        self._tries[cell] += 1
        retry = may_retry and ended.status not in (*FINAL, "diverged") and self._tries[cell] <= self.retries
        self.running.pop(cell, None)
        self.states[cell] = ended
        note = (how if ended.status != "complete" else "") + ("; will be retried" if retry else "")
        self._report(f"{cell.name}: {self._outcome(ended)}{note}")
        return retry

    def refresh(self, now: bool = False) -> None:
        """Redraw the table, at most once per second unless `now`."""
        if self._live and (now or time.monotonic() - self._drawn > REFRESH):
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _report(self, event: str) -> None:
        if self._live:
            self.refresh(now=True)
        else:
            done = sum(s.status == "complete" for s in self.states.values())
            print(f"[{done}/{self._planned()}] {event}{self._time_left()}", flush=True)

    def _outcome(self, state: State) -> str:
        if state.status != "complete":
            return f"{state.status}: {state.detail}" if state.detail else state.status
        value = state.manifest["results"].get(self.study.metric)
        result = f"{self.study.metric} {value:.4f}, " if value is not None else ""
        return f"complete, {result}{duration(state.manifest['wall_seconds'])}"

    def _time_left(self) -> str:
        """Return the estimated time left, from finished cells of the same arm; empty if unknown."""
        cost = seconds_per_cell(self.study, list(self.states.values()))
        now, left, cells = time.monotonic(), 0.0, self.to_run()
        for cell in cells:
            if (seconds := cost[cell.arm]) is None:
                return ""
            left += max(seconds - (now - self.running.get(cell, now)), 0)
        return f"; about {duration(left / min(self.jobs, len(cells)))} left" if self.jobs and cells else ""

    def _table(self) -> Table:
        count = Counter(s.status for s in self.states.values())
        needed = self._planned()
        waiting = needed - count["complete"] - count["failed"] - len(self.running)
        title = f"{self.study.name}: {count['complete']} of {needed} complete, {len(self.running)} running, "
        title += f"{waiting} waiting, {count['failed']} failed{self._time_left()}"
        table = Table("cell", "state", "time", title=title, title_justify="left")
        for cell, since in self.running.items():
            table.add_row(cell.name, _epoch(cell, self.study.metric), duration(time.monotonic() - since))
        ended = [s for s in self.states.values() if s.status != "missing" and s.cell not in self.running]
        for s in [s for s in ended if s.status != "complete"] + [s for s in ended if s.status == "complete"][-8:]:
            table.add_row(s.cell.name, self._outcome(s), "")
        return table


def _epoch(cell: Cell, metric: str) -> str:
    """Return the epoch of a running cell, and its latest value of the study's metric in validation."""
    name = f"val/{metric.partition('/')[2]}"
    _, rows = read_rows(RunFolder(cell.folder).metrics, tail=TAIL)
    if not rows:
        return "starting"
    epochs = read_config(cell.config).get("trainer", {}).get("max_epochs")
    epoch = int(float(rows[-1].get("epoch") or 0)) + 1  # during the test, one more than there are
    if epochs and 0 < epochs < epoch:
        return "testing"
    values = [row[name] for row in rows if row.get(name)]
    latest = f", {name} {float(values[-1]):.4f}" if values else ""
    return f"epoch {epoch}{f' of {epochs}' if epochs and epochs > 0 else ''}{latest}"
