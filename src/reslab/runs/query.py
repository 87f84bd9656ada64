"""Columns, conditions and order of the table of runs."""

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from reslab.errors import UserError
from reslab.resolve import SHORT_KEYS as CONFIG_KEYS
from reslab.resolve import short_key
from reslab.runs import manifest as manifests
from reslab.runs.listing import FACTS, ClassName, Listed, is_number, natural

SHORT_KEYS = {name: short_key(key) for name, key in CONFIG_KEYS.items() if name not in FACTS}
# Where these keys differ they are shown first; then come the others, in the order of the config.
FIRST = ("data.dataset", "model.net", "model.objective", "model.optimizer", *SHORT_KEYS.values())
NOT_SHOWN = (*manifests.NOT_IDENTITY, "seed_everything", "run.name")
ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip
MISSING = object()


def metric_names(runs: Iterable[Listed]) -> list[str]:
    """Return the names of all metrics: those of the test set first, then of validation and training."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    ranks = {"test": 0, "val": 1, "train": 2}
    return sorted(names, key=lambda name: ranks.get(name.partition("/")[0], 3))


def main_metrics(runs: Sequence[Listed], split: str) -> list[str]:
    """Return the most important metric of a split: the accuracy; of runs that have none, the first one."""
    main = (next(iter(sorted(_of_split(run, split), key=f"{split}/acc".__ne__)), None) for run in runs)
    return [name for name in dict.fromkeys(main) if name]


def _of_split(run: Listed, split: str) -> list[str]:
    return [name for name in run.results if name.startswith(f"{split}/")]


def config_keys(runs: Sequence[Listed]) -> list[str]:
    """Return the config keys in which runs differ, apart from the seed and from where and how they were executed.

    The most important ones come first; those that only some of the runs have, such as arguments of one class, last.
    """
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if not key.startswith(NOT_SHOWN) and _differs(key, configs)]
    partial = {key for key in differing if not all(key in config for config in configs)}
    return sorted(differing, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), key in partial))


def _differs(key: str, configs: Sequence[dict[str, Any]]) -> bool:
    first = configs[0].get(key, MISSING)
    return any(config.get(key, MISSING) != first for config in configs)


def default_columns(runs: Sequence[Listed]) -> list[str]:
    """Return the columns shown unless others are chosen."""
    metrics = [name for split in ("test", "val") for name in main_metrics(runs, split)]
    named = ["name"] if any(not _in_path(run) for run in runs) else []
    reasons = ["reason"] if any(run.facts["reason"] for run in runs) else []
    return ["status", "run", *named, "seed", *metrics, *config_keys(runs), "time", "start", *reasons]


def _in_path(run: Listed) -> bool:
    """Whether a run's directory tells its name: runs/digits/ID, or STUDY/ARM/seed-0 for STUDY.ARM."""
    name, path = run.facts["name"], run.path
    return not name or name in path or all(part in path for part in name.split("."))


def resolve(key: str, runs: Sequence[Listed]) -> str:
    """Return the column that a user names: in full, by a short key, without init_args, or by its last parts.

    Raises UserError if no run has the column, or several fit.
    """
    columns = dict.fromkeys([*FACTS, *metric_names(runs), *(key for run in runs for key in run.config)])
    plain = re.sub(r"\.(init_args|dict_kwargs)(?=\.|$)", "", key.strip().removesuffix(".class_path"))
    plain = SHORT_KEYS.get(plain, "seed" if plain == "seed_everything" else plain)
    if plain in columns:
        return plain
    ends = [column for column in columns if column.endswith((f".{plain}", f"/{plain}"))]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{key} is ambiguous: {', '.join(ends)}")
    near = difflib.get_close_matches(plain, columns, 3, 0.5)
    raise UserError(f"no run has {key}; nearest: {', '.join(near)}" if near else f"no run has {key}")


class Condition(NamedTuple):
    """A condition on one column, such as test/acc>0.9."""

    column: str
    operator: str
    text: str

    @classmethod
    def parse(cls, condition: str, runs: Sequence[Listed]) -> "Condition":
        """Read KEY=VALUE, or the same with != < <= > >= ~ in the place of =."""
        match = re.fullmatch(r"\s*([^=!<>~]+?)\s*(==|!=|<=|>=|[=<>~])\s*(.*?)\s*", condition, re.DOTALL)
        if not match:
            raise UserError(f"--where {condition}: write KEY=VALUE; operators are = != < <= > >= and ~ (matches)")
        key, sign, text = match.groups()
        column, sign = resolve(key, runs), "=" if sign == "==" else sign
        if sign in ORDER and column != "start" and number(text) is None:
            raise UserError(f"--where {condition}: {text!r} is not a number")
        if sign in ORDER and _is_share(column) and (number(text) or 0) > 1:
            raise UserError(
                f"--where {condition}: {column} is a share in [0, 1]: write {float(text) / 100:g} or {text}%"
            )
        if sign == "~":
            _check_pattern(condition, text)
        return cls(column, sign, text)

    def holds(self, run: Listed) -> bool:
        """Whether a run satisfies the condition; without a value, it only satisfies !=."""
        if not run.has(self.column):
            return self.operator == "!="
        value = run.get(self.column)
        if self.operator in ("=", "!="):
            return equals(self.column, value, self.text) == (self.operator == "=")
        if self.operator == "~":
            return re.search(self.text, shown(self.column, value), re.IGNORECASE) is not None
        if self.column == "start":
            return ORDER[self.operator](local_time(value), self.text.replace("T", " "))
        return is_number(value) and ORDER[self.operator](value, number(self.text))


def _check_pattern(condition: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"--where {condition}: {pattern!r} is not a regular expression: {error}") from None


def _is_share(column: str) -> bool:
    return "/" in column and column.rpartition("/")[2].startswith("acc")


def number(text: str) -> float | None:
    """Return a number such as 0.9, 1e-3 or 90%; None if the text is none."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None
    return value / 100 if text.endswith("%") else value


def equals(column: str, value: Any, text: str) -> bool:
    """Whether a value is the one that a user writes; case does not matter, and a class may be named by its config."""
    if isinstance(value, ClassName):
        return text.removesuffix(".yaml").replace("/", ".").rpartition(".")[2].lower() in value.names
    if isinstance(value, list):
        return _without_spaces(shown(column, value)) == _without_spaces(text)
    if is_number(value) and (parsed := number(text)) is not None:
        return math.isclose(value, parsed, rel_tol=1e-9)
    return text.lower() == shown(column, value).lower()


def _without_spaces(text: str) -> str:
    return re.sub(r"[\s'\"]", "", text).lower()


def shown(column: str, value: Any) -> str:
    """Return a value as text: numbers unrounded, lists as JSON."""
    if column == "start":
        return local_time(value)
    if value is None or isinstance(value, bool | list | dict):
        return json.dumps(value, default=str)
    return str(value)


def local_time(text: str | None) -> str:
    """Return a time of the manifest in the time zone of this machine: 2026-11-26 03:38:15."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S") if text else ""


def select(runs: Sequence[Listed], where: Sequence[str], sort: str | None) -> list[Listed]:
    """Return the runs that satisfy all conditions, sorted by columns: `-test/acc`, or `data.dataset,-test/acc`."""
    conditions = [Condition.parse(condition, runs) for condition in where] if runs else []
    selected = [run for run in runs if all(condition.holds(run) for condition in conditions)]
    for key in reversed((sort or "").split(",")):
        if key and runs:
            column, falling = resolve(key.strip().removeprefix("-"), runs), key.strip().startswith("-")
            present = [run for run in selected if run.get(column) is not None]
            missing = [run for run in selected if run.get(column) is None]  # last in either order
            present.sort(key=lambda run: _sort_key(column, run.get(column)), reverse=falling)
            selected = present + missing
    return selected


def _sort_key(column: str, value: Any) -> Any:
    if isinstance(value, int | float):
        return [(float(value), "")]
    return [(math.inf, ""), *natural(shown(column, value).lower())]
