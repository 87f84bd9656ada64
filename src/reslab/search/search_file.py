"""Search files: a base config, a space of settings, and a validation metric. Read and checked without torch."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reslab import names, resolve
from reslab.ablation.study import RUN_ONLY, Arm, Study, base_config, wrong_keys
from reslab.ablation.study_file import KEYS as STUDY_KEYS
from reslab.ablation.study_file import (
    Key,
    Mistakes,
    are_seeds,
    is_integer,
    is_positive,
    one_of,
    read_text,
    valid_values,
)
from reslab.errors import UserError
from reslab.resolve import Config, merge

Params = dict[str, Any]  # values by key of the space
Kind = Literal["choice", "log", "float", "int"]
# Keys that change which images a trial is judged by, or how a run is executed, and not the method.
FIXED = (*RUN_ONLY, "run", "seed_everything", "data.dataset", "data.val_split", "data.split_seed", "data.folds",
         "data.fold", "data.classes", "trainer.limit_val_batches", "trainer.logger")  # fmt: skip
SPACE_EXAMPLE = "space: {model.optimizer.lr: {log: [0.01, 1]}, model.net.width: [16, 32]}"
DEFAULTS = {"metric": "val/acc", "sampler": "tpe", "seed": 0, "seeds": 1, "minutes": None, "top": 2, "looks": [3, 5, 8]}
KEYS = {
    "name": STUDY_KEYS["name"],
    "base": STUDY_KEYS["base"],
    "space": Key(
        "dotted keys with a list of values, or {log: [low, high]}, {float: [low, high]} or {int: [low, high]}",
        SPACE_EXAMPLE, "settings to search", lambda value: isinstance(value, dict) and bool(value),
    ),
    "metric": Key(
        "val/NAME (the test set is not used in a search)", "metric: val/acc", "what to optimize",
        lambda value: isinstance(value, str) and value.startswith("val/") and len(value) > 4,
    ),
    "mode": STUDY_KEYS["mode"],
    "trials": Key("an integer of at least 1", "trials: 20", "number of settings to try", lambda v: is_integer(v, 1)),
    "sampler": Key("tpe, random or grid", "sampler: tpe", "how to choose them", one_of("tpe", "random", "grid")),
    "seed": Key("an integer of at least 0", "seed: 0", "seed of the sampler", is_integer),
    "seeds": Key(STUDY_KEYS["seeds"].requires, "seeds: 1", "runs per trial; the metric is their mean", are_seeds),
    "minutes": Key("a number above 0", "minutes: 120", "start no trial after so much run time in total", is_positive),
    "top": Key("an integer of at least 1", "top: 2", "settings in the study that confirms", lambda v: is_integer(v, 1)),
    "margin": STUDY_KEYS["margin"],
    "looks": STUDY_KEYS["looks"],
}  # fmt: skip


@dataclass(frozen=True)
class Dimension:
    """The values of one key of the space: a list of choices, or a range."""

    key: str
    kind: Kind
    values: tuple[Any, ...]  # all choices, or (low, high)
    step: int | float | None = None

    def grid(self) -> list[Any] | None:
        """Return all values; None if the range is continuous."""
        if self.kind == "choice":
            return list(self.values)
        if self.step is None:
            return None
        low, high = self.values
        count = round((high - low) / self.step) + 1
        return [round(low + i * self.step, 12) if self.kind == "float" else low + i * self.step for i in range(count)]

    def __str__(self) -> str:
        if self.kind == "choice":
            return ", ".join(map(str, self.values))
        low, high = self.values
        return f"{low} to {high}" + {"log": ", log scale", "int": ", integers", "float": ""}[self.kind]


@dataclass(frozen=True)
class Search:
    """A checked search file, as returned by `read_search`."""

    path: Path
    name: str
    base: Config  # resolved, with run.skip_test
    base_parts: tuple[Any, ...]  # as stated
    space: tuple[Dimension, ...]
    metric: str
    mode: Literal["max", "min"]
    trials: int
    sampler: Literal["tpe", "random", "grid"]
    seed: int
    seeds: list[int]
    minutes: float | None
    top: int
    margin: float | None
    looks: list[int]
    overrides: tuple[str, ...]

    @property
    def out(self) -> Path:
        """The default search directory."""
        return Path("runs", "searches", self.name)

    @property
    def test_weights(self) -> str:
        return self.base.get("run", {}).get("test_weights", "last")

    def arm(self, name: str, params: Params) -> Arm:
        """Return the settings as an arm, whose runs are those of a trial."""
        return Arm(name, {}, configured(self.base, params, self.path.parent, self.name, name))

    def study(self, arms: dict[str, Arm]) -> Study:
        """Return the trials as a study, for everything that runs and watches cells."""
        return Study(
            path=self.path, name=self.name, question="", baseline="", metric=self.metric, mode=self.mode, margin=None,
            test_weights=self.test_weights, seeds=self.seeds, looks=None, test="paired", sd=None, arms=arms, factors={},
            minutes=None, overrides=self.overrides,
        )  # fmt: skip

    def corners(self) -> Iterator[Params]:
        """Yield settings that together have every choice and both ends of every range."""
        first = {d.key: d.values[0] for d in self.space}
        yield first
        yield from ({**first, d.key: value} for d in self.space for value in d.values[1:])


def grid(space: Sequence[Dimension]) -> list[Params]:
    """Return all settings of a space without continuous ranges."""
    columns = [dimension.grid() or [] for dimension in space]
    return [dict(zip((d.key for d in space), row, strict=True)) for row in itertools.product(*columns)]


def configured(base: Config, params: Params, folder: Path, group: str, name: str) -> Config:
    """Return the config of a trial."""
    start = merge(base, {"run": {"name": f"{group}.{name}", "group": group, "job_type": name}})
    return resolve.change(start, dict(resolve.flat(params)), folder)


def read_search(name: str | Path, overrides: Sequence[str] = ()) -> Search:
    """Read and check a search file.

    Args:
        name: Path of the file, or its name in configs/sweep.
        overrides: Options for all trials: --config FILE and --KEY VALUE, as for `reslab fit`.

    Raises:
        UserError: the file is invalid; the message lists all mistakes, each with an example.
    """
    path = names.find_file("sweep", str(name))
    mistakes = Mistakes()
    text = read_text(path, mistakes)
    if {"method", "parameters"} <= {*text}:
        raise UserError(f"{path} is a sweep of Weights & Biases, not a search file: wandb sweep {path}")
    search = _parse(path, text, overrides, mistakes)
    mistakes.raise_all(path)
    assert search is not None
    return search


def _parse(path: Path, stated: Config, overrides: Sequence[str], mistakes: Mistakes) -> Search | None:
    text = {**DEFAULTS, "name": path.stem, **valid_values(stated, KEYS, mistakes)}
    for key in ("base", "space", *(["trials"] if text["sampler"] != "grid" else [])):
        if stated.get(key) is None:
            mistakes.add(f"{key} is missing: {KEYS[key].example}")
    space = _space(text.get("space", {}), text["sampler"], mistakes)
    base = base_config(path.parent, text.get("base", []), overrides, {d.key for d in space}, mistakes)
    for message in wrong_keys(base):
        mistakes.add(f"base: {message}")
    trials = text.get("trials", 0)
    if text["sampler"] == "grid" and not mistakes.texts:
        trials = min(trials or math.inf, len(grid(space)))
    seeds = list(range(text["seeds"])) if isinstance(text["seeds"], int) else text["seeds"]
    search = Search(
        path=path,
        base=merge(base, {"run": {"skip_test": True}}),
        base_parts=tuple(text.get("base", [])),
        space=space,
        mode=text.get("mode", "min" if text["metric"].endswith("loss") else "max"),
        trials=trials,
        seeds=seeds,
        margin=text.get("margin"),
        overrides=tuple(overrides),
        **{key: text[key] for key in ("name", "metric", "sampler", "seed", "minutes", "top", "looks")},
    )
    _check_settings(search, mistakes)
    return None if mistakes.texts else search


def _space(stated: Mapping[str, Any], sampler: str, mistakes: Mistakes) -> tuple[Dimension, ...]:
    space = []
    for key, values in stated.items():
        with mistakes.collect(f"space: {key} "):
            space.append(_dimension(str(key), values))
            if sampler == "grid" and space[-1].grid() is None:
                raise UserError(
                    f"has no end of values for sampler: grid: list them, or add a step ({key}: [0.01, 0.1])"
                )
    return tuple(space)


def _dimension(key: str, stated: Any) -> Dimension:
    """Return the values of a key; the messages of errors continue "space: KEY"."""
    if fixed := next((name for name in FIXED if f"{resolve.short_key(key)}.".startswith(f"{name}.")), None):
        why = (
            "trials must be judged by the same images" if fixed.startswith(("data", "trainer.limit")) else "it is fixed"
        )
        raise UserError(f"cannot be searched: {why}")
    if isinstance(stated, list):
        if len(stated) < 2 or any(value in stated[:i] for i, value in enumerate(stated)):
            raise UserError(f"requires at least two different values: {key}: [16, 32] (got {stated!r})")
        return Dimension(key, "choice", tuple(stated))
    kinds: list[Kind] = [kind for kind in ("log", "float", "int") if isinstance(stated, dict) and kind in stated]
    if len(kinds) != 1 or not {*stated} <= {*kinds, "step"}:
        options = "a list of values, {log: [low, high]}, {float: [low, high]} or {int: [low, high]}"
        raise UserError(f"must be {options}: {key}: {{log: [0.01, 1]}} (got {stated!r})")
    return _range(key, kinds[0], stated[kinds[0]], stated.get("step", 1 if kinds[0] == "int" else None))


def _range(key: str, kind: Kind, ends: Any, step: Any) -> Dimension:
    types = int if kind == "int" else (int, float)
    example = f"{key}: {{{kind}: {'[1, 4]' if kind == 'int' else '[0.01, 1]'}}}"
    if not (isinstance(ends, list) and len(ends) == 2 and all(_is_number(end, types) for end in ends)):
        raise UserError(f"requires two {'integers' if kind == 'int' else 'numbers'}: {example} (got {ends!r})")
    low, high = ends
    if not low < high or (kind == "log" and low <= 0):
        raise UserError(f"requires {'0 < ' if kind == 'log' else ''}low < high: {example} (got {ends!r})")
    if step is not None:
        if kind == "log":
            raise UserError(f"cannot have a step on a log scale: list the values, or leave step out: {example}")
        count = (high - low) / step if _is_number(step, types) and step > 0 else 0.5
        if abs(count - round(count)) > 1e-9:
            example = f"{key}: {{{kind}: [0, 4], step: 2}}"
            raise UserError(f"requires a step above 0 that divides the range: {example} (got {step!r})")
    return Dimension(key, kind, (low, high), step)


def _is_number(value: Any, types: Any) -> bool:
    return isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value)


def _check_settings(search: Search, mistakes: Mistakes) -> None:
    """Add every key of the space that its classes do not accept, with any of its values."""
    of_base = set(wrong_keys(search.base))
    for dimension in search.space:
        for value in dimension.values:
            with mistakes.collect("space: "):
                arm = search.arm("trial", {dimension.key: value})
                for message in wrong_keys(arm.config):
                    if message not in of_base:
                        mistakes.add(f"space: {message}")
    if not mistakes.texts:
        with mistakes.collect("space: "):  # two spellings of one key
            search.arm("trial", next(search.corners()))
