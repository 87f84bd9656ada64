"""metrics.csv: a row a logged step, every step once."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from reslab.files import write_text

COLUMNS = (
    "step", "epoch", "train/loss", "train/acc", "lr", "images_per_second",
    "val/loss", "val/acc", "val/acc5", "test/loss", "test/acc", "test/acc5",
)  # fmt: skip


class MetricsCSV(Logger):
    """Appends to metrics.csv; what is logged at one step by several callers becomes one row.

    Args:
        path: The file; it is continued where it exists.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = list(COLUMNS)
        self._row: dict[str, Any] = {}
        self._row_at = 0  # where in the file the last row begins
        if path.exists():
            self._columns, rows = _read(path)
            if rows:
                self._row = rows[-1]
                self._row_at = path.stat().st_size - len(self._line(self._row))

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        return None

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The whole resolved config lies beside this file already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError("metrics.csv has a row a step: log_metrics needs the step")
        self._admit(metrics)
        if not self.path.exists():
            self.path.write_bytes(self._line({name: name for name in self._columns}))
        if str(step) != str(self._row.get("step")):
            self._row, self._row_at = {"step": step}, self.path.stat().st_size
        self._row.update(metrics)
        with self.path.open("r+b") as file:
            file.seek(self._row_at)
            file.write(self._line(self._row))
            file.truncate()

    def _admit(self, metrics: dict[str, float]) -> None:
        """Adds columns for names not seen before, to the rows that are there too."""
        new = [name for name in metrics if name not in self._columns]
        if not new:
            return
        self._columns += new
        if self.path.exists():
            _, rows = _read(self.path)
            _write(self.path, self._columns, rows)
            self._row_at = self.path.stat().st_size - len(self._line(self._row)) if self._row else 0

    def _line(self, row: dict[str, Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        return text.getvalue().encode()


def cut(path: Path, step: int) -> None:
    """Drops the rows after `step`: the run goes on from there and will log them again."""
    if path.exists():
        columns, rows = _read(path)
        # A kill may have left the last line half written: a row counts when all its cells are there.
        _write(path, columns, [r for r in rows if None not in r.values() and int(r["step"]) <= step])


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or COLUMNS), list(reader)


def _write(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
