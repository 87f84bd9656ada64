"""The logger of metrics.csv."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from reslab.runs.metrics import read_rows, write_rows


class MetricsCSV(Logger):
    """Writes metrics.csv: values logged at the same step share one row.

    Args:
        path: The file. If it exists, rows are appended to it.
        columns: The names of the first columns. Other names get a column when they are first logged.
    """

    merges_rows = True  # LogRows passes everything on at once: a row must be on disk before the checkpoint of its step

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__()
        self.path = path
        self._columns = list(columns)
        self._row: dict[str, Any] = {}
        self._row_start = 0  # where in the file the last row begins
        columns_in_file, rows = read_rows(path)
        if columns_in_file:
            self._columns = columns_in_file
        if rows:
            self._row = dict(rows[-1])
            self._row_start = path.stat().st_size - len(self._line(self._row))

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml beside this file holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError("metrics.csv has one row per step: log_metrics requires the step")
        self._add_columns([name for name in metrics if name not in self._columns])
        if not self.path.exists():
            self.path.write_bytes(self._line({name: name for name in self._columns}))
        if str(step) != str(self._row.get("step")):
            self._row, self._row_start = {"step": step}, self.path.stat().st_size
        self._row.update(metrics)
        with self.path.open("r+b") as file:
            file.seek(self._row_start)
            file.write(self._line(self._row))
            file.truncate()

    def _add_columns(self, names: list[str]) -> None:
        self._columns += names
        if names and self.path.exists():
            write_rows(self.path, self._columns, read_rows(self.path)[1])
            self._row_start = self.path.stat().st_size - len(self._line(self._row)) if self._row else 0

    def _line(self, row: dict[str, Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        return text.getvalue().encode()
