"""The logger of metrics.csv."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from reslab.runs.metrics import read_rows, to_csv, write_rows


class MetricsCSV(Logger):
    """Writes metrics.csv, or appends to it: values logged at the same step share one row. `columns` come first."""

    name = "metrics"
    version = ""
    merges_rows = True  # LogRows passes everything on at once: a row must be on disk before the checkpoint of its step

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__()
        self.path = path
        self._columns = list(columns)
        self._row: dict[str, Any] | None = None  # the last one in the file; None until the file is read

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml beside this file holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError("metrics.csv has one row per step: log_metrics requires the step")
        if self._row is None:  # not earlier: a run that resumes first cuts the file
            columns, rows = read_rows(self.path)
            self._columns, self._row = columns or self._columns, dict(rows[-1]) if rows else {}
        new = [name for name in metrics if name not in self._columns]
        self._columns += new
        if new or not self.path.exists():
            write_rows(self.path, self._columns, read_rows(self.path)[1])
        same_row = str(step) == str(self._row.get("step"))
        start = self.path.stat().st_size - (len(self._line(self._row)) if same_row else 0)
        self._row = {**(self._row if same_row else {"step": step}), **metrics}
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(self._line(self._row))
            file.truncate()

    def _line(self, row: dict[str, Any]) -> bytes:
        return to_csv(self._columns, [row]).encode()
