"""What is going on in a study: one live table on a terminal, a line an event elsewhere."""

import csv
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from reslab.ablation.cells import Cell, State, read_config, seconds_per_cell
from reslab.ablation.study import Study
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import duration

REFRESH = 1.0  # seconds
TAIL = 16384  # bytes of metrics.csv that surely hold the last epoch's row


class StudyProgress:
    """Shows cells as they run.

    Args:
        study: The study.
        found: The states of all its cells at the start.
        jobs: How many run at a time, for the time left; None where that is not known.
    """

    def __init__(self, study: Study, found: Sequence[State], jobs: int | None = None) -> None:
        self.study, self.jobs = study, jobs
        self.states = {s.cell: s for s in found}
        self.running: dict[Cell, float] = {}  # since when
        self._beside: list[float] = []  # seconds that cells took beside what they count themselves: their start
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

    def started(self, cell: Cell, note: str = "") -> None:
        self.running[cell] = time.monotonic()
        self._say(f"{cell.name}: started{note}")

    def ended(self, state: State, note: str = "") -> None:
        since = self.running.pop(state.cell, None)
        if since and state.status == "complete" and len(state.manifest["attempts"]) == 1:
            self._beside.append(time.monotonic() - since - state.manifest["wall_seconds"])
        self.states[state.cell] = state
        self._say(f"{state.cell.name}: {self._outcome(state)}{note}")

    def refresh(self, now: bool = False) -> None:
        """Draws the table anew, once a second."""
        if self._live and (now or time.monotonic() - self._drawn > REFRESH):
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _say(self, event: str) -> None:
        if self._live:
            self.refresh(now=True)
        else:
            done = sum(s.status == "complete" for s in self.states.values())
            print(f"[{done}/{len(self.states)}] {event}{self._left()}", flush=True)

    def _outcome(self, state: State) -> str:
        if state.status != "complete":
            return f"{state.status}: {state.detail}" if state.detail else state.status
        value = state.results.get(self.study.metric)
        logged = f"{self.study.metric} {value:.4f}, " if value is not None else ""
        return f"complete, {logged}{duration(state.manifest['wall_seconds'])}"

    def _left(self) -> str:
        """The time until all is done, from what finished cells of the same arm took."""
        cost = seconds_per_cell(self.study, list(self.states.values()))
        now, beside = time.monotonic(), fmean(self._beside) if self._beside else 0.0
        todo = [s.cell for s in self.states.values() if s.status not in ("complete", "unreadable", "mismatched")]
        left = 0.0
        for cell in todo:
            if (seconds := cost[cell.arm]) is None:
                return ""
            left += max(seconds + beside - (now - self.running.get(cell, now)), 0)
        return f"; about {duration(left / min(self.jobs, len(todo)))} left" if self.jobs and todo else ""

    def _table(self) -> Table:
        count = {status: sum(s.status == status for s in self.states.values()) for status in ("complete", "failed")}
        waiting = len(self.states) - sum(count.values()) - len(self.running)
        title = f"{self.study.name}: {count['complete']} of {len(self.states)} done, {len(self.running)} running, "
        table = Table(title=f"{title}{waiting} to come, {count['failed']} failed{self._left()}", title_justify="left")
        for column in ("cell", "state", "for"):
            table.add_column(column)
        for cell, since in self.running.items():
            table.add_row(cell.name, progress(cell, self.study.metric), duration(time.monotonic() - since))
        ended = [s for s in self.states.values() if s.status != "missing" and s.cell not in self.running]
        for s in [s for s in ended if s.status != "complete"] + [s for s in ended if s.status == "complete"][-8:]:
            table.add_row(s.cell.name, self._outcome(s), "")
        return table


def progress(cell: Cell, metric: str) -> str:
    """Where a running cell is: epoch, and the newest validation metric of the study's kind."""
    wanted = f"val/{metric.partition('/')[2]}"
    rows = _last_rows(RunFolder(cell.folder).metrics)
    if not rows:
        return "starting"
    epochs = read_config(cell.config).get("trainer", {}).get("max_epochs")
    epoch = int(float(rows[-1].get("epoch") or 0)) + 1  # in the test one more than there are
    if epochs and 0 < epochs < epoch:
        return "testing"
    values = [row[wanted] for row in rows if row.get(wanted)]
    shown = f", {wanted} {float(values[-1]):.4f}" if values else ""
    return f"epoch {epoch}{f' of {epochs}' if epochs and epochs > 0 else ''}{shown}"


def _last_rows(path: Path) -> list[Mapping[str, str]]:
    """The last whole rows of a metrics.csv that is being written."""
    try:
        with path.open("rb") as file:
            header = file.readline().decode()
            start = file.tell()
            file.seek(max(start, file.seek(0, 2) - TAIL))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return []
    columns = next(csv.reader([header]))
    rows = [row for row in csv.reader(lines) if len(row) == len(columns)]
    return [dict(zip(columns, row, strict=True)) for row in rows]
