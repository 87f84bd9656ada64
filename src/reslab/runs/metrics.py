"""Reading metrics.csv: one row per logged step. No torch at import."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reslab.files import write_text

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, str]
Series = tuple["np.ndarray", "np.ndarray"]  # steps (n,) and values (n,) of one metric
Metrics = Mapping[str, Series]


def read_rows(path: Path, tail: int | None = None) -> tuple[list[str], list[Row]]:
    """Read the column names and the complete rows, if there is a file; a line that is still being written is left out.

    With `tail`, only the rows in this many bytes at the end of the file are read.
    """
    if not path.exists():
        return [], []
    with path.open("rb") as file:
        header = file.readline()
        if tail is not None and file.seek(0, os.SEEK_END) > len(header) + tail:
            file.seek(-tail, os.SEEK_END)
            file.readline()  # the rest of a line
        else:
            file.seek(len(header))
        lines = (header + file.read()).decode(errors="replace").split("\n")
    columns, *cells = csv.reader(lines[:-1]) if len(lines) > 1 else [[]]
    rows = [dict(zip(columns, row, strict=True)) for row in cells if len(row) == len(columns)]
    return columns, [row for row in rows if row.get("step", "").isdecimal()]


def read_metrics(path: Path) -> dict[str, Series]:
    """Read steps and values of every metric in a metrics.csv, by name; those never logged are left out."""
    columns, rows = read_rows(path)
    metrics = {name: series(rows, name) for name in columns if name != "step"}
    return {name: points for name, points in metrics.items() if len(points[0])}


def series(rows: Iterable[Row], name: str) -> Series:
    """Return steps and values (n,) of one metric, where a finite number was logged; the last one of each step."""
    import numpy as np  # not at import: `reslab runs` reads rows only

    logged = {int(row["step"]): _number(row[name]) for row in rows if row.get(name)}
    steps, values = np.array([*logged], dtype=float), np.array([*logged.values()], dtype=float)
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows as lines of metrics.csv."""
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write the whole file, atomically."""
    write_text(path, to_csv(columns, [dict(zip(columns, columns, strict=True)), *rows]))


def cut(path: Path, step: int) -> None:
    """Drop the rows after `step`: a run that resumes there logs them again."""
    columns, rows = read_rows(path)
    if columns:
        write_rows(path, columns, [row for row in rows if int(row["step"]) <= step])
    else:  # no file, or not even a whole header
        path.unlink(missing_ok=True)
