"""A study's report as text for the terminal: at most 80 columns, all numbers in one unit."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from reslab.ablation.wording import Unit, row

WIDTH = 80
HEADER = {"n": "n", "mean_sd": "mean ± sd", "delta": "difference", "delta_interval": "95 % interval"}
HEADER |= {"verdict": "verdict"}


def summary(report: Mapping[str, Any], sentences: Sequence[str]) -> str:
    """Return question, warnings, table and the sentences of the verdicts."""
    unit = Unit.of(report)
    scale = f"{unit.axis(report['metric'])}; differences from {report['baseline']}"
    parts = [wrapped(report["question"])]
    parts += [wrapped(f"Note: {warning}") for warning in report["warnings"]]
    parts.append("\n".join([wrapped(scale + (" in points" if unit.percent else "")), *_table(report, unit)]))
    return "\n\n".join([*parts, "\n".join(wrapped(f"- {sentence}", "  ") for sentence in sentences)])


def wrapped(text: str, indent: str = "") -> str:
    """Return text wrapped to the terminal's width."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _table(report: Mapping[str, Any], unit: Unit) -> list[str]:
    rows = {name: _cells(row(name, arm, report, unit)) for name, arm in report["arms"].items()}
    widths = {key: max(map(len, [title, *(r[key] for r in rows.values())])) for key, title in HEADER.items()}
    longest = max(map(len, rows))
    # Names that leave no room for the numbers get a separate line.
    fits = longest + 2 * len(widths) + sum(widths.values()) <= WIDTH
    lines = [_line("arm".ljust(longest) if fits else "arm\n", HEADER, widths)]
    return lines + [_line(name.ljust(longest) if fits else f"{name}\n", r, widths) for name, r in rows.items()]


def _cells(numbers: Mapping[str, Any]) -> dict[str, str]:
    mean_sd = f"{numbers['mean']} ± {numbers['sd']}" if numbers["mean"] != "–" else "–"
    cells = {"n": numbers["n"], "mean_sd": mean_sd}
    if numbers["baseline"]:
        return cells | {"delta": "", "delta_interval": "", "verdict": "baseline"}
    return cells | {key: numbers[key] for key in ("delta", "delta_interval", "verdict")}


def _line(name: str, cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    numbers = [cells[key].rjust(width) for key, width in widths.items() if key != "verdict"]
    return "  ".join([name, *numbers, cells["verdict"]])
