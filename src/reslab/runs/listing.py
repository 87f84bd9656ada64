"""Find the runs below some directories and read what a table shows of them. No torch, numpy or pandas at import."""

import contextlib
import csv
import difflib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import yaml

from reslab.errors import UserError
from reslab.host import CONFIGS
from reslab.runs.folder import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame

FACTS = ("status", "run", "name", "seed", "time", "start", "reason")  # columns of every run
STATUSES = ("complete", "running", "preempted", "failed", "diverged", "killed", "damaged", "no run")
PARTS = {"checkpoints", "figures", "export", "wandb", "lightning_logs", "mlruns", "tensorboard"}  # hold no runs
RUN_FILES = {"config.yaml", "metrics.csv", "checkpoints", "weights.safetensors"}
NO_MANIFEST = "no manifest.json"
CONFIG_FOLDERS = {"data.dataset": "data", "model.net": "net", "model.objective": "objective"}  # in configs/
UNFINISHED_TAILS = (2**13, 2**20)  # bytes of metrics.csv read for the latest metrics of an unfinished run
MOST_KEYS = 10_000  # of a config: more come from aliases of a hostile file
WRONG = (
    OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, yaml.YAMLError, csv.Error
)  # fmt: skip

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BLOCK_START = re.compile(r"^(?=[^\s#])", re.MULTILINE | re.ASCII)  # Unicode spaces are part of a key
_NESTED = re.compile(r"(\w+):\n((?:  .*\n|\s*\n)+)", re.ASCII)
Items = tuple[tuple[str, Any], ...]


class Listed(NamedTuple):
    """A run directory, or a directory that holds no run; `facts` has the columns of FACTS, None where unknown."""

    path: str
    facts: dict[str, Any]
    results: dict[str, float]  # metrics by name: of an unfinished run, the latest ones
    config: dict[str, Any]  # by dotted key without init_args; a class's value is its name

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    def get(self, column: str) -> Any:
        """Return the value of a column; None if the run lacks it."""
        return next((part[column] for part in (self.facts, self.results, self.config) if column in part), None)

    def has(self, column: str) -> bool:
        """Whether the run has a value in a column; a key of the config may have the value None."""
        return column in self.config or self.get(column) is not None


def table(*dirs: str | Path, where: Sequence[str] = (), sort: str | None = None) -> "DataFrame":
    """Return all runs below some directories (default: runs), one row per run.

    Columns: `status`, `run` (its directory), `name`, `seed`, `time` (seconds of training and testing), `start` (UTC),
    `reason` (why a run is not complete); then one per metric, such as `test/acc`; then one per config key that differs
    between the runs, such as `model.optimizer.lr`. Missing values are None, NaN or NaT.

    Args:
        where: Conditions that all rows satisfy, as of `reslab runs --where`: "data.dataset=cifar10".
        sort: Column to sort by, as of `reslab runs --sort`: "-test/acc".

    Raises:
        UserError: There is no such directory, or no run has a column named in `where` or `sort`.
    """
    import pandas as pd

    from reslab.runs.query import config_keys, metric_names, select

    runs = select(find_runs(dirs or ["runs"]), where, sort)
    columns = [*FACTS, *metric_names(runs), *config_keys(runs)]
    frame = pd.DataFrame([[run.get(column) for column in columns] for run in runs], columns=columns)
    return frame.assign(start=pd.to_datetime(frame["start"], utc=True), time=frame["time"].astype(float))


def find_runs(dirs: Iterable[str | Path]) -> list[Listed]:
    """Return all runs below some directories, and directories that hold no run; the oldest run first."""
    visited: set[tuple[int, int]] = set()
    runs = [read_run(path, reason) for top in dirs for path, reason in _directories(_existing(top), visited)]
    return sorted(runs, key=lambda run: (run.facts["start"] or "~", natural(run.facts["run"])))


def _existing(top: str | Path) -> str:
    path = os.fspath(Path(top).expanduser())
    if os.path.isdir(path):  # noqa: PTH112 (strings: paths of 1,000 runs as objects take a tenth of a second)
        return path
    if Path(path).exists():
        raise UserError(f"{path} is not a directory")
    parent = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
    near = difflib.get_close_matches(Path(path).name, [entry.name for entry in parent.iterdir() if entry.is_dir()], 1)
    hint = f"did you mean {Path(path).with_name(near[0])}?" if near else "`reslab fit` creates runs in runs/"
    raise UserError(f"there is no directory {path}: {hint}")


def natural(text: str) -> list[Any]:
    """Return a sort key that puts seed-2 before seed-10."""
    return [(int(part), "") if part.isdecimal() else (math.inf, part) for part in re.split(r"(\d+)", text)]


def _directories(top: str, visited: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yield run directories with "", and others below `top` that hold no run with the reason.

    Each directory is visited once, also where symbolic links lead to it.
    """
    runs: set[str] = set()
    others: dict[str, str] = {}
    pending, links = [(top, False)], list[tuple[str, bool]]()
    while pending or links:
        path, inside = (pending or links).pop()
        try:
            if (place := _place(path)) in visited:
                continue
            visited.add(place)
            entries = list(os.scandir(path))
        except OSError as error:
            others[path] = f"cannot read the directory: {error.strerror}"
            continue
        names = {entry.name for entry in entries}
        if "manifest.json" in names:
            runs.add(path)
        elif not inside:
            others[path] = _why_no_run(names)
        inside = inside or path in runs
        for entry in entries:
            if entry.name not in PARTS and not entry.name.startswith(".") and _is_directory(entry):
                (links if entry.is_symlink() else pending).append((entry.path, inside))
    yield from ((path, "") for path in runs)
    yield from _without_runs(others, runs, top)


def _place(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of symbolic links
        return False


def _why_no_run(names: set[str]) -> str:
    if names & {"plan.jsonl", "plan.json", "arm.yaml"}:  # a study and its arms
        return NO_MANIFEST
    if names & {"log.txt", ".lock"} and not names & RUN_FILES:
        return f"{NO_MANIFEST}: it was stopped before it began to train"
    return f"{NO_MANIFEST}: a part of the run is missing" if names & RUN_FILES else NO_MANIFEST


def _without_runs(others: Mapping[str, str], runs: set[str], top: str) -> Iterator[tuple[str, str]]:
    """Yield the directories that are remains of a run, and the topmost ones that hold nothing of that kind."""
    with_runs = _parents(runs, top)
    remains = {path for path, reason in others.items() if reason != NO_MANIFEST} - with_runs
    holders = with_runs | _parents(remains, top) | {top}
    for path, reason in others.items():
        if path in remains or (path not in holders and os.path.dirname(path) in holders):  # noqa: PTH120
            yield path, reason


def _parents(paths: Iterable[str], top: str) -> set[str]:
    """Return all directories above some paths, up to `top`."""
    parents: set[str] = set()
    for path in paths:
        while path != top and (path := os.path.dirname(path)) not in parents:  # noqa: PTH120
            parents.add(path)
    return parents


def read_run(path: str, reason: str = "") -> Listed:
    """Read a run directory. What is damaged or missing is left out, with the reason; nothing is raised."""
    facts = dict.fromkeys(FACTS) | {"run": path, "status": "no run", "reason": reason}
    if reason:
        if busy(path):
            facts |= {"status": "running", "reason": "it has just been started"}
        return Listed(path, facts, {}, {})
    try:
        manifest = _read_manifest(f"{path}/manifest.json")
        facts, results = facts | _facts(path, manifest), _results(manifest)
    except WRONG as error:
        return Listed(path, facts | {"status": "damaged", "reason": f"manifest.json: {_cause(error)}"}, {}, {})
    if facts["status"] != "complete":
        results = _latest(path) | results
    config: dict[str, Any] = {}
    try:
        config = _read_config(f"{path}/config.yaml")
    except WRONG as error:
        facts["reason"] = "; ".join(filter(None, [facts["reason"], f"config.yaml: {_cause(error)}"]))
    return Listed(path, facts, results, config)


def _read_manifest(path: str) -> dict[str, Any]:
    manifest = json.loads(_text(path))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("status"), str) or "attempts" not in manifest:
        raise ValueError("not the manifest of a run")
    return manifest


def _text(path: str) -> str:
    if not os.path.isfile(path) and os.path.exists(path):  # noqa: PTH110, PTH113 (reading a pipe would wait forever)
        raise ValueError("not a file")
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        return file.read()


def _cause(error: BaseException) -> str:
    """Return the cause of an unreadable file in one line."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())


def _facts(path: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    attempts = manifest["attempts"] if isinstance(manifest["attempts"], list) else []
    attempts = [attempt for attempt in attempts if isinstance(attempt, dict)] or [{}]
    status, seconds = manifest["status"], manifest.get("wall_seconds")
    seconds = float(seconds) if is_number(seconds) else None
    how = str(attempts[-1].get("how") or "")
    if status != "complete" and busy(path):
        status, how = "running", ""
        if since := _time(attempts[-1].get("started")):
            seconds = (seconds or 0.0) + max(0.0, (datetime.now(UTC) - since).total_seconds())
    elif status == "running":
        status, how = "killed", "killed: its process is gone"
    start = _time(attempts[0].get("started"))
    return {
        "status": status,
        "name": manifest["name"] if isinstance(manifest.get("name"), str) else None,
        "seed": manifest["seed"] if is_number(manifest.get("seed")) else None,
        "time": seconds,
        "start": start.astimezone(UTC).isoformat(timespec="seconds") if start else None,
        "reason": None if status == "complete" else how.partition(": ")[2] or None,
    }


def busy(path: str) -> bool:
    """Whether a process holds the run's lock, as far as this user may ask."""
    try:
        return RunFolder(path).busy()
    except OSError:
        return False


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def _numbers(values: Any) -> dict[str, float]:
    pairs = values.items() if isinstance(values, dict) else ()
    return {name: float(value) for name, value in pairs if is_number(value)}


def _results(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Return the results of a run, then those of `reslab test --on` with the name of the test set: cifar10_c/mCE."""
    results, sets = _numbers(manifest.get("results")), manifest.get("test_sets")
    for name, entry in sets.items() if isinstance(sets, dict) else ():
        further = _numbers(entry.get("results")) if isinstance(entry, dict) else {}
        results = {f"{name}/{metric.removeprefix('test/')}": value for metric, value in further.items()} | results
    return results


def _latest(path: str) -> dict[str, float]:
    """Return the latest training and validation metrics in metrics.csv."""
    from reslab.runs.metrics import read_rows

    latest: dict[str, float] = {}
    for tail in UNFINISHED_TAILS:
        try:
            rows = read_rows(Path(path, "metrics.csv"), tail)[1] if os.path.isfile(f"{path}/metrics.csv") else []  # noqa: PTH113
            logged = {name: text for row in rows for name, text in row.items() if text}
            latest = _numbers({n: float(v) for n, v in logged.items() if n.startswith(("train/", "val/"))})
        except WRONG:
            return {}
        if any(name.startswith("val/") for name in latest):
            break
    return latest


def _read_config(path: str) -> dict[str, Any]:
    """Return a resolved config by dotted keys."""
    text = _text(path)
    try:
        return dict(_blocks(text, ""))
    except (ValueError, yaml.YAMLError):  # an alias of another block, for example
        return dict(_flat_mapping(yaml.load(text, _Loader)))


def config_values(path: Path) -> list[Any]:
    """Return all values of a config file. Raises one of WRONG if it is damaged."""
    return [*_read_config(str(path)).values()]


def _blocks(text: str, prefix: str) -> Items:
    """Return the items of a mapping in YAML.

    YAML is slow (2 ms per config), and most configs have most of their blocks (a key with the lines below it) in
    common with others: each block is parsed once. Raises ValueError or YAMLError if the text has another structure.
    """
    return tuple(item for block in _BLOCK_START.split(text) for item in _block(block, prefix))


@functools.cache
def _block(text: str, prefix: str) -> Items:
    if not text.strip(" \t\r\n") or text.startswith("#"):
        return ()
    if (nested := _NESTED.fullmatch(text)) and "\n  class_path:" not in text:
        with contextlib.suppress(ValueError, yaml.YAMLError):  # the value is no mapping
            return _blocks(re.sub("^  ", "", nested[2], flags=re.MULTILINE), f"{prefix}{nested[1]}.")
    mapping = yaml.load(text, _Loader)
    if not isinstance(mapping, dict) or len(mapping) != 1 or not all(isinstance(key, str) for key in mapping):
        raise ValueError(f"not a block with one key: {text}")
    return _flat_mapping(mapping, prefix)


def _flat_mapping(mapping: Any, prefix: str = "") -> Items:
    if not isinstance(mapping, dict):
        raise ValueError("it must hold keys and values")
    items = (item for key, value in mapping.items() for item in flat(value, f"{prefix}{key}"))
    if len(kept := tuple(itertools.islice(items, MOST_KEYS + 1))) > MOST_KEYS:
        raise ValueError(f"it has more than {MOST_KEYS} keys")
    return kept


def flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys without init_args, and their values; that of a class is the name of its config, or its name."""
    if not isinstance(value, dict) or not value:
        yield key, value
    elif "class_path" not in value:
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}")
    else:
        arguments = tuple(_arguments(value, key))
        yield key, config_name(key, class_name(value), arguments)
        yield from arguments


def _arguments(value: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    for group in ("init_args", "dict_kwargs"):
        for name, inner in (value.get(group) or {}).items():
            yield from flat(inner, f"{key}.{name}")


def class_name(value: Mapping[str, Any]) -> str:
    """Return the name of a class without its module."""
    return str(value["class_path"]).rpartition(".")[2]


class ClassName(str):
    """The name of a config file that describes a class, such as resnet20, or of the class if no file does."""

    names: set[str]  # all names of the class, in lower case


def config_name(key: str, of_class: str, arguments: Items) -> ClassName:
    """Return the name of the config file of a class with these arguments: the first that states most of them."""
    values = dict(arguments)
    fitting = {
        name: len(items)
        for name, (class_, items) in shipped(CONFIG_FOLDERS.get(key, ""), key).items()
        if class_ == of_class and all(k in values and values[k] == v for k, v in items)
    }
    named = ClassName(max(fitting, key=fitting.__getitem__, default=of_class))
    named.names = {name.lower() for name in (*fitting, of_class)}
    return named


@functools.cache
def shipped(folder: str, key: str) -> dict[str, tuple[str, Items]]:
    """Return class and arguments of each config file in a folder of configs/, also of the user's own, by name."""
    configs: dict[str, tuple[str, Items]] = {}
    for path in [
        path for top in (CONFIGS, Path("configs")) if folder for path in sorted((top / folder).glob("*.yaml"))
    ]:
        try:
            value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
            configs[path.stem] = class_name(value), tuple(_arguments(value, key))
        except WRONG:
            continue
    return configs
