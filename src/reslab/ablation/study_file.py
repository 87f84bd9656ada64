"""Keys of a study file, each with an example, and all mistakes of a file in one message. Imports no torch."""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from reslab.errors import UserError
from reslab.resolve import Config, Loader, read_mapping

MIN_LOOK = 3  # seeds: fewer give no verdict (statistics.MIN_SEEDS, whose import takes a second)


class Mistakes:
    """Mistakes of one study file, collected so that they are reported at once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)

    @contextlib.contextmanager
    def collect(self, where: str = "") -> Iterator[None]:
        """Add a UserError of the block, with `where` before its message, and continue after the block."""
        try:
            yield
        except UserError as error:
            self.add(f"{where}{error}")

    def raise_all(self, path: Path) -> None:
        """Raise a UserError that lists all mistakes, if there are any."""
        if len(self.texts) == 1:
            raise UserError(f"{path}: {self.texts[0]}")
        if self.texts:
            raise UserError("\n  ".join([f"{path} has {len(self.texts)} mistakes:", *self.texts]))


class Key(NamedTuple):
    """One key of a study file."""

    requires: str  # what its value must be
    example: str  # a line of a study file
    about: str  # what it does, for `ablate new`
    accepts: Callable[[Any], bool]


def folder_name(name: str) -> str:
    """Return `name` if a directory can have it, else raise UserError."""
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise UserError(f"{name!r} is not a valid directory name: use letters, digits and _ . = + -")
    return name


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_integer(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: Any) -> bool:
    """Return whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _are_seeds(value: Any) -> bool:
    if not isinstance(value, list):
        return _is_integer(value, 1)
    return bool(value) and all(map(_is_integer, value)) and len({*value}) == len(value)


def _are_looks(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(_is_integer(look, MIN_LOOK) for look in value):
        return False
    return value == sorted({*value})


def _one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda value: value in choices


KEYS = {
    "name": Key(
        "a directory name (letters, digits and _ . = + -)", "name: shortcuts", "default: the name of this file",
        lambda value: _is_text(value) and bool(re.fullmatch(r"\w[\w.=+-]*", value)),
    ),
    "question": Key(
        "text", "question: Which kind of shortcut is best?", "what the report answers; default: made from the arms",
        _is_text,
    ),
    "base": Key(
        "a list", "base: [configs/experiment/digits.yaml]",
        "config files (or dotted keys and values) that all arms start from; later ones win",
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(part, str | dict) for part in value),
    ),
    "baseline": Key(
        "the name of an arm", "baseline: A", "the arm that all others are compared with",
        lambda value: isinstance(value, str | dict | int | float) and not isinstance(value, bool),
    ),
    "metric": Key(
        "train/NAME, val/NAME or test/NAME", "metric: test/acc", "any metric that the runs log; default: test/acc",
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"(train|val|test)/\S+", value)),
    ),
    "mode": Key(
        "max or min", "mode: max", "whether high or low values are good; default: min for losses, else max",
        _one_of("max", "min"),
    ),
    "margin": Key(
        "a number above 0", "margin: 0.002",
        "differences below it do not matter; without it, no arm can be called equivalent", is_positive,
    ),
    "arms": Key(
        "names with dotted keys and values", "arms: {A: {}, plain: {model.net.shortcut: none}}",
        "what each arm changes in the base", lambda value: isinstance(value, dict),
    ),
    "factors": Key(
        "dotted keys with at least two values each", "factors: {model.net.shortcut: [A, none]}",
        "instead of arms: the full grid of these values", lambda value: isinstance(value, dict),
    ),
    "exclude": Key(
        "a list of factors and values", "exclude: [{model.net.shortcut: none}]", "cells of the grid that do not run",
        lambda value: isinstance(value, list),
    ),
    "seeds": Key(
        "a number of seeds, or a list of different integers of at least 0", "seeds: 5",
        "seeds 0 to 4 in every arm; or a list of seeds", _are_seeds,
    ),
    "looks": Key(
        f"a list of increasing integers of at least {MIN_LOOK}", "looks: [3, 5, 8]",
        "instead of seeds: judge after 3, 5 and 8 seeds, and stop as soon as all arms are decided", _are_looks,
    ),
    "test": Key(
        "paired or pooled", "test: paired",
        "paired: t tests by seed (default); pooled: one variance for all arms, stronger with few seeds",
        _one_of("paired", "pooled"),
    ),
    "sd": Key(
        "a number above 0", "sd: 0.002", "sd of the metric over seeds, if you know it: `ablate plan` counts with it",
        is_positive,
    ),
    "test_weights": Key(
        "last or best", "test_weights: last", "weights that are tested: the last, or the best by validation",
        _one_of("last", "best"),
    ),
    "minutes": Key(
        "a number above 0", "minutes: 12", "expected time of one run, until some have been measured", is_positive,
    ),
}  # fmt: skip


def read_text(path: Path, mistakes: Mistakes) -> Config:
    """Return the content of a study file; add names that appear twice, or that YAML reads as a truth value."""
    text = read_mapping(path)
    for mistake in _ambiguous_names(yaml.compose(path.read_text(encoding="utf-8"), Loader)):
        mistakes.add(mistake)
    return text


def _ambiguous_names(node: yaml.Node | None) -> Iterator[str]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _ambiguous_names(item)
    if not isinstance(node, yaml.MappingNode):
        return
    names = [key.value for key, _ in node.value]
    for i, (key, value) in enumerate(node.value):
        line = f"line {key.start_mark.line + 1}"
        if key.tag.endswith((":bool", ":null")):
            yield f'{line}: YAML does not read the name {key.value} as text; write "{key.value}"'
        elif key.value in names[:i] and key.value != "<<":
            yield f"{line}: {key.value} appears twice"
        yield from _ambiguous_names(value)


def check_keys(text: Config, mistakes: Mistakes) -> Config:
    """Add every unknown key, wrong value and missing key of a study file; return its valid keys."""
    valid = {}
    for key, value in text.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 3, 0.5)
            example = f" ({KEYS[near[0]].example})" if near else ""
            mistakes.add(f"no such key {key!r}; nearest: {', '.join(near or KEYS)}{example}")
        elif value is not None and KEYS[key].accepts(value):
            valid[key] = value
        elif value is not None:
            mistakes.add(f"{key} must be {KEYS[key].requires}{_example(key)} (got {value!r})")
            valid |= {key: [value]} if key == "base" and _is_text(value) else {}  # the arms can still be checked
    lacking = [key for key in ("base", "baseline") if text.get(key) is None]
    lacking += ["seeds"] if text.get("seeds") is None and text.get("looks") is None else []
    for key in lacking:
        mistakes.add(f"{key} is missing{_example(key)}")
    if valid.get("looks") and valid.get("test") == "pooled":  # its error over looks is not kept: docs/statistics.md
        mistakes.add("test: pooled allows no planned looks: use test: paired, or seeds instead of looks")
    if bool(text.get("arms")) == bool(text.get("factors")):
        mistakes.add(f"give either arms or factors{_example('arms')}")
    return {key: value for key, value in valid.items() if key not in ("arms", "factors", "exclude") or value}


def seeds_of(text: Config, mistakes: Mistakes) -> list[int]:
    """Return the seeds that `seeds` and `looks` state; `looks` must end at their number."""
    looks, stated = text.get("looks"), text.get("seeds", text.get("looks", [0])[-1])
    seeds = list(range(stated)) if isinstance(stated, int) else stated
    if looks and "seeds" in text and len(seeds) != looks[-1]:
        message = f"looks ends at {looks[-1]} seeds, but seeds has {len(seeds)}: leave seeds out"
        mistakes.add(f"{message}{_example('looks')}")
    return seeds


def _example(key: str) -> str:
    return f": {KEYS[key].example}"
