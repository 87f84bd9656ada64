"""A study file: arms, seeds and one question; resolved, compared and checked without importing torch."""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from reslab.ablation.resolve import (
    Config,
    Loader,
    check_key,
    flat,
    leaves,
    loaded,
    merge,
    nested,
    options,
    prune,
    read_config,
    read_mapping,
    with_defaults,
)
from reslab.diff import differences
from reslab.errors import UserError
from reslab.host import CONFIGS

METRICS = ("test/acc", "test/acc5", "test/loss", "val/acc", "val/acc5", "val/loss", "train/acc", "train/loss")
KEYS: dict[str, Any] = {  # of a study file, and their types
    "name": str, "question": str, "base": list, "baseline": (str, dict), "metric": str, "mode": str, "test_weights": str,
    "margin": (float, int), "arms": dict, "factors": dict, "exclude": list, "seeds": list, "minutes": (float, int),
}  # fmt: skip
REQUIRED = ("question", "base", "baseline", "seeds")
NOT_THE_STUDYS = ("run.dir", "run.name", "run.group", "run.job_type", "run.tags", "data.root", "data.download")


@dataclass(frozen=True)
class Arm:
    """One variant of the experiment.

    Attributes:
        name: Also the name of its folder.
        levels: In a factor study, the label of each factor's level by the factor's key.
        config: The resolved config: base.yaml, the study's base files, the command line, the arm's own changes.
        changes: (key, in the baseline, here), for every key that has not the baseline's value.
    """

    name: str
    levels: dict[str, str]
    config: Config
    changes: tuple[tuple[str, Any, Any], ...] = ()


@dataclass(frozen=True)
class Study:
    """A study file, read and checked; `read_study` makes one.

    Attributes:
        arms: By name, in the file's order, the baseline among them.
        factors: The labels of the levels by the factor's key; empty where the file lists arms.
        minutes: What the file says that a cell costs.
        overrides: The options that it was read with.
    """

    path: Path
    name: str
    question: str
    baseline: str
    metric: str
    mode: Literal["max", "min"]
    margin: float | None
    test_weights: str
    seeds: list[int]
    arms: dict[str, Arm]
    factors: dict[str, list[str]]
    minutes: float | None
    overrides: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        """The folder of its cells and report, unless --out says another."""
        return Path("runs", "ablations", self.name)

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides about the numbers and how they are judged; in hexadecimal."""
        named = {
            key: getattr(self, key) for key in ("name", "baseline", "metric", "mode", "margin", "test_weights", "seeds")
        }
        arms = {arm.name: prune(arm.config, NOT_THE_STUDYS) for arm in self.arms.values()}
        return hashlib.sha256(json.dumps({**named, "arms": arms}, sort_keys=True, default=str).encode()).hexdigest()


def find_study(name: str) -> Path:
    """A study file by its path, or by its name in configs/ablation."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = sorted(file.stem for file in (CONFIGS / "ablation").glob("*.yaml"))
    if name in shipped:
        return CONFIGS / "ablation" / f"{name}.yaml"
    near = difflib.get_close_matches(path.stem, shipped, 3, 0.5) or shipped
    raise UserError(f"there is no study file {name}; in configs/ablation are: {', '.join(near)}")


def read_study(name: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Reads and checks a study file.

    Args:
        name: The file, or its name in configs/ablation.
        overrides: Of every arm: --config FILE and --KEY VALUE, as for `reslab fit`.

    Raises:
        UserError: naming the file and the key that is wrong.
    """
    path = find_study(str(name))
    text = read_mapping(path)
    _check_keys(path, text)
    wanted = dict(_arms(path, text))
    base = _base(path, text, overrides, {key for _, changes in wanted.values() for key in changes})
    title, test_weights = text.get("name", path.stem), text.get("test_weights", "last")
    arms = {}
    for arm, (levels, changes) in wanted.items():
        run = {"name": f"{title}.{arm}", "test_weights": test_weights, "group": title, "job_type": arm}
        config = merge(base, {"run": run})
        for key, value in changes.items():
            config = merge(config, nested(key, loaded(value, path.parent)))
        _check_arm(path, arm, changes, config)
        arms[arm] = Arm(arm, levels, config)
    baseline = _baseline(path, text, arms)
    study = Study(
        path=path,
        name=title,
        question=" ".join(text["question"].split()),
        baseline=baseline,
        metric=text.get("metric", "test/acc"),
        mode=text.get("mode", "min" if text.get("metric", "").endswith("loss") else "max"),
        margin=text.get("margin"),
        test_weights=test_weights,
        seeds=text["seeds"],
        arms=_compared(path, arms, baseline),
        factors=_factors(text),
        minutes=text.get("minutes"),
        overrides=tuple(overrides),
    )
    _check_values(study)
    return study


# Reading


def _check_keys(path: Path, text: Config) -> None:
    for key, value in text.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 3, 0.5) or KEYS
            raise UserError(f"{path}: no such key {key!r}; nearest: {', '.join(near)}")
        if value is not None and not isinstance(value, KEYS[key]):
            raise UserError(f"{path}: {key} does not take {value!r}")
    if lacking := [key for key in REQUIRED if not text.get(key)]:
        raise UserError(f"{path}: {lacking[0]} is missing or empty")
    if bool(text.get("arms")) == bool(text.get("factors")):
        raise UserError(f"{path}: give either arms or factors")


def _base(path: Path, text: Config, overrides: Sequence[str], varied: set[str]) -> Config:
    """The config that all arms start from: base.yaml, the study's base files, then the command line."""
    config = read_config(CONFIGS / "base.yaml")
    for part in text["base"]:
        config = merge(config, _part(part, path.parent))
    for key, value in options(overrides):
        if key == "config":
            config = merge(config, read_config(Path(value)))
        elif clash := [v for v in varied if v == key or key.startswith(f"{v}.")]:
            raise UserError(f"--{key} is for all arms, but they differ in {clash[0]} ({path})")
        else:
            config = merge(config, nested(key, loaded(yaml.load(value, Loader), Path())))
    return config


def _part(part: Any, folder: Path) -> Config:
    """A part of a study's base: a config file, by its path relative to `folder`, or dotted keys and their values."""
    if not isinstance(part, dict):
        return read_config(folder / str(part))
    config: Config = {}
    for key, value in flat(part):
        config = merge(config, nested(key, loaded(value, folder)))
    return config


# Arms


def _arms(path: Path, text: Config) -> Iterator[tuple[str, tuple[dict[str, str], Config]]]:
    """(name, (levels, changes)) of every arm; changes by dotted key."""
    if text.get("arms"):
        for name, changes in text["arms"].items():
            if not isinstance(changes, dict | None):
                raise UserError(f"{path}: arm {name}: keys and values, not {changes!r}")
            yield _folder_name(path, str(name)), ({}, dict(flat(changes or {})))
        return
    factors = {key: _levels(path, key, values) for key, values in text["factors"].items()}
    excluded = [_level_labels(path, factors, part) for part in text.get("exclude") or []]
    seen = set()
    for labels in itertools.product(*factors.values()):
        levels = dict(zip(factors, labels, strict=True))
        if any(part.items() <= levels.items() for part in excluded):
            continue
        name = _folder_name(path, "+".join(f"{_short(key, factors)}={levels[key]}" for key in factors))
        if name in seen:
            raise UserError(f"{path}: two arms would be called {name}: give the levels labels, as LABEL: VALUE")
        seen.add(name)
        yield name, (levels, {key: factors[key][label] for key, label in levels.items()})


def _folder_name(path: Path, name: str) -> str:
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise UserError(f"{path}: arm {name!r}: a folder's name, of letters, digits and _ . = + -")
    return name


def _levels(path: Path, key: str, values: Any) -> dict[str, Any]:
    """A factor's values by label: as the mapping gives them, else as they read in a folder's name."""
    if isinstance(values, dict) and values:
        return {str(label): value for label, value in values.items()}
    if not isinstance(values, list) or len(values) < 2:
        raise UserError(f"{path}: factor {key}: a list of at least two values, or LABEL: VALUE pairs")
    labels = [re.sub(r"[^\w.=-]+", "-", _text(value)).strip("-") for value in values]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"{path}: factor {key} has the level {twice[0]} twice")
    return dict(zip(labels, values, strict=True))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(key: str, factors: Mapping[str, Any]) -> str:
    """The key's last name, or as much of it as tells it from the other factors."""
    parts = key.split(".")
    for n in range(1, len(parts)):
        short = ".".join(parts[-n:])
        if sum(other.endswith(short) for other in factors) == 1:
            return short
    return key


def _level_labels(path: Path, factors: Mapping[str, Mapping[str, Any]], part: Any) -> dict[str, str]:
    """KEY: VALUE (or label) of some factors, as KEY: label."""
    labels = {}
    for key, value in part.items() if isinstance(part, dict) else [(part, None)]:
        if key not in factors:
            raise UserError(f"{path}: {key!r} is none of the factors: {', '.join(factors)}")
        found = [label for label, level in factors[key].items() if value == level or str(value) == label]
        if not found:
            raise UserError(f"{path}: {key} has no level {value!r}: {', '.join(factors[key])}")
        labels[key] = found[0]
    return labels


def _factors(text: Config) -> dict[str, list[str]]:
    return {key: list(_levels(Path(), key, values)) for key, values in (text.get("factors") or {}).items()}


def _baseline(path: Path, text: Config, arms: Mapping[str, Arm]) -> str:
    wanted = text["baseline"]
    if isinstance(wanted, dict) and text.get("factors"):
        levels = _level_labels(path, {k: _levels(path, k, v) for k, v in text["factors"].items()}, wanted)
        found = [arm.name for arm in arms.values() if arm.levels == levels]
        if found:
            return found[0]
    if wanted not in arms:
        near = difflib.get_close_matches(str(wanted), arms, 3, 0.5) or list(arms)[:8]
        raise UserError(f"{path}: the baseline {wanted!r} is no arm; arms: {', '.join(near)}")
    return str(wanted)


# Checks


def _check_arm(path: Path, arm: str, changes: Config, config: Config) -> None:
    """Refuses keys that are not an arm's to change, and keys that nothing in the config takes."""
    for key in changes:
        if key.startswith(NOT_THE_STUDYS) or key in ("seed_everything", "run.test_weights"):
            raise UserError(f"{path}: arm {arm}: {key} is not an arm's to change")
    try:
        for key in (*changes, *leaves(config)):
            check_key(key, config)
    except UserError as error:
        raise UserError(f"{path}: arm {arm}: {error}") from error


def _check_values(study: Study) -> None:
    path, seeds = study.path, study.seeds
    if bad := [seed for seed in seeds if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0]:
        raise UserError(f"{path}: seeds are whole numbers from 0, not {bad[0]!r}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds has a seed twice: {seeds}")
    if study.metric not in METRICS:
        near = difflib.get_close_matches(study.metric, METRICS, 3, 0.4) or METRICS
        raise UserError(f"{path}: no run logs the metric {study.metric!r}; nearest: {', '.join(near)}")
    for key, choices in (("mode", ("max", "min")), ("test_weights", ("last", "best"))):
        if getattr(study, key) not in choices:
            raise UserError(f"{path}: {key} is {' or '.join(choices)}, not {getattr(study, key)!r}")
    if study.margin is not None and not study.margin > 0:
        raise UserError(f"{path}: margin is the difference that begins to matter, more than 0, not {study.margin}")
    _folder_name(path, study.name)
    if len(study.arms) < 2:
        raise UserError(f"{path}: there is nothing to compare the baseline with: give a second arm")


def _compared(path: Path, arms: Mapping[str, Arm], baseline: str) -> dict[str, Arm]:
    """The arms with what each changes against the baseline; two that are the same are an error."""
    there, compared = arms[baseline].config, {}
    seen: dict[Any, str] = {(): baseline}
    for arm in arms.values():
        changes = tuple(_changes(there, arm.config))
        signature = tuple((key, json.dumps(here, sort_keys=True)) for key, _, here in changes)
        if arm.name != baseline and signature in seen:
            raise UserError(f"{path}: arm {arm.name} is the same as {seen[signature]}: it changes nothing that counts")
        seen[signature] = arm.name
        compared[arm.name] = replace(arm, changes=changes)
    return compared


def _changes(there: Config, here: Config) -> Iterator[tuple[str, Any, Any]]:
    for key, a, b in differences(with_defaults(there), with_defaults(here)):
        if not key.startswith("run."):
            yield key, a, b
