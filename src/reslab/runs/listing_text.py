"""The command `reslab runs`: the table of runs as text that fits the terminal, CSV, JSON or a page."""

import csv
import io
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reslab.runs.listing import FACTS, STATUSES, Listed, find_runs, is_number
from reslab.runs.manifest import duration
from reslab.runs.query import config_keys, default_columns, local_time, metric_names, resolve, select, shown

WIDEST_VALUE, NARROWEST_RUN, NARROWEST_REASON = 28, 24, 20
KEPT_KEYS = 2  # of the columns of config keys, while there is another column to leave out
CUT_RUN = "cut the directory"
GAP = "  "


def show_runs(
    dirs: Sequence[str], where: Sequence[str], sort: str | None, columns: str | None,
    as_csv: bool, as_json: bool, html: Path | None,
) -> None:  # fmt: skip
    """Print the runs below `dirs`, or write them to a page; what is not part of the table goes to stderr."""
    everything = find_runs(dirs)
    runs = select(everything, where, sort)
    chosen = [resolve(key, everything) for key in columns.split(",")] if columns and everything else None
    if html:
        from reslab.runs.listing_page import write_page

        write_page(html, runs, chosen)
        print(f"{summary(runs)}\npage  {html} ({html.stat().st_size / 1e6:.1f} MB)")
    elif as_csv or as_json:
        chosen = chosen or [*FACTS, *metric_names(runs), *config_keys(runs)]
        sys.stdout.write((to_csv if as_csv else to_json)(runs, chosen))
    elif runs:
        _print_table(runs, chosen)
    else:
        print(f"no run in {', '.join(dirs)}" + (f" satisfies {' and '.join(where)}" if where else ""), file=sys.stderr)


def _print_table(runs: Sequence[Listed], chosen: Sequence[str] | None) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines, hidden = text_table(runs, chosen or default_columns(runs), width)
    print(*lines, sep="\n", flush=True)
    print(summary(runs), file=sys.stderr)
    if hidden:
        names = ", ".join(hidden[:4]) + (f" and {len(hidden) - 4} more" if len(hidden) > 4 else "")
        print(f"not shown: {names} (a wider terminal, --columns, --csv or --html shows them)", file=sys.stderr)


def summary(runs: Sequence[Listed]) -> str:
    """Return how many runs there are of each status."""
    counts = Counter(run.facts["status"] for run in runs)
    others = counts.pop("no run", 0)
    order = sorted(counts, key=lambda status: STATUSES.index(status) if status in STATUSES else len(STATUSES))
    total = runs_of(sum(counts.values()))
    parts = f"{total}: {', '.join(f'{counts[status]} {printable(status)}' for status in order)}" if counts else total
    return parts + (f"; {others} without a run" if others else "")


def runs_of(count: int) -> str:
    """Return "1 run" or "2 runs"."""
    return f"{count} run" + "s" * (count != 1)


def to_csv(runs: Sequence[Listed], columns: Sequence[str]) -> str:
    """Return the table as CSV, with all digits; a missing value is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for run in runs:
        values = ((column, run.get(column)) for column in columns)
        writer.writerow(["" if v is None else v if c == "start" else safe(shown(c, v)) for c, v in values])
    return text.getvalue()


def to_json(runs: Sequence[Listed], columns: Sequence[str]) -> str:
    """Return the table as a JSON list with one object per run; a missing value is null."""
    rows = [{column: _finite(run.get(column)) for column in columns} for run in runs]
    return json.dumps(rows, indent=1, default=str) + "\n"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def safe(text: str) -> str:
    """Return the text without bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def printable(text: str) -> str:
    """Return the text without characters that move the cursor, such as escape codes and line breaks."""
    return "".join(c if c.isprintable() else "?" for c in text)


def text_table(runs: Sequence[Listed], columns: Sequence[str], width: int | None = None) -> tuple[list[str], list[str]]:
    """Return the lines of the table, and the columns for which `width` leaves no room (None: no limit)."""
    titles = short_titles(columns)
    cells = {c: [titles[c], *(printable(cell(c, run)) for run in runs)] for c in columns}
    if width is not None:
        cells = {c: [text if c in FACTS else _cut(text, WIDEST_VALUE) for text in cells[c]] for c in columns}
    kept = fitting(columns, {c: max(map(len, cells[c])) for c in columns}, width)
    right = {c for c in kept if all(run.get(c) is None or is_number(run.get(c)) for run in runs)}
    lines = []
    for row in zip(*(cells[c] for c in kept), strict=True):
        texts = [_cut(text, kept[c], keep_end=c == "run") for c, text in zip(kept, row, strict=True)]
        padded = [t.rjust(kept[c]) if c in right else t.ljust(kept[c]) for c, t in zip(kept, texts, strict=True)]
        lines.append(GAP.join(padded).rstrip())
    return lines, [c for c in columns if c not in kept]


def _cut(text: str, width: int, keep_end: bool = False) -> str:
    if len(text) <= width:
        return text
    return ("..." + text[3 - width :] if keep_end else text[: width - 3] + "...")[:width]


def short_titles(columns: Sequence[str]) -> dict[str, str]:
    """Return the last part of each config key, or as many parts as tell it from the other columns."""
    titles = {}
    for column in columns:
        parts = column.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        unique = (end for end in ends if not any(c != column and f".{c}".endswith(f".{end}") for c in columns))
        titles[column] = next(unique, column)
    return titles


def cell(column: str, run: Listed) -> str:
    """Return a value as readers see it: metrics with four digits, durations in minutes, times to the minute."""
    if not run.has(column):
        return "" if column in FACTS else "-"
    value = run.get(column)
    if column == "time":
        return duration(value)
    if column == "start":
        return local_time(value)[:-3]
    if column in run.results and column not in run.facts:
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.6g}" if isinstance(value, float) else shown(column, value)


def fitting(columns: Sequence[str], widths: Mapping[str, int], width: int | None) -> dict[str, int]:
    """Return the columns to show, with their widths, so that a line is no longer than `width`.

    A long reason is cut first. Then columns are left out: config keys from the last one, except for KEPT_KEYS; `start`
    and `name`. Then the directory is cut, and at last all other columns are left out.
    """
    kept = dict(widths)
    if width is None:
        return kept
    keys = [c for c in columns if "." in c]
    order = [*reversed(keys[KEPT_KEYS:]), "start", "name", CUT_RUN, "time", *reversed(keys[:KEPT_KEYS]), "seed"]
    smallest = {"reason": NARROWEST_REASON}
    for column in [*order, *reversed(columns)]:
        if _excess(kept, width) <= sum(max(0, kept[c] - smallest[c]) for c in smallest if c in kept) or len(kept) == 1:
            break
        if column == CUT_RUN:
            smallest["run"] = NARROWEST_RUN
        else:
            kept.pop(column, None)
    for column in smallest:
        if column in kept and (excess := _excess(kept, width)) > 0:
            kept[column] = max(min(smallest[column], kept[column]), kept[column] - excess)
    return {c: min(size, width) for c, size in kept.items()}


def _excess(widths: Mapping[str, int], width: int) -> int:
    return sum(widths.values()) + len(GAP) * (len(widths) - 1) - width
