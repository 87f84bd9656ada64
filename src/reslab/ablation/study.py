"""Study files: arms, seeds and one question. Read, resolved and checked without importing torch."""

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

from reslab.ablation import resolve
from reslab.ablation.resolve import Config, merge
from reslab.diff import differences
from reslab.errors import UserError
from reslab.host import CONFIGS

Factors = dict[str, dict[str, Any]]  # values by label, by factor key
KEYS: dict[str, Any] = {  # of a study file, and their types
    **dict.fromkeys(("name", "question", "metric", "mode", "test_weights"), str),
    **dict.fromkeys(("base", "exclude", "seeds"), list),
    **dict.fromkeys(("arms", "factors"), dict),
    **dict.fromkeys(("margin", "minutes"), (float, int)),
    "baseline": (str, dict),
}
REQUIRED = ("question", "base", "baseline", "seeds")
# Options of a single run: they do not identify a study, and an arm cannot change them.
RUN_ONLY = ("run.dir", "run.name", "run.group", "run.job_type", "run.tags", "data.root", "data.download")


@dataclass(frozen=True)
class Arm:
    """One variant of the experiment.

    Attributes:
        name: Name of the arm and of its directory.
        levels: In a factor study, the label of the arm's level by factor key.
        config: Resolved config: base.yaml, the study's base files, the command line, then the arm's changes.
        changes: (key, value in the baseline, value here) for every key that differs from the baseline.
    """

    name: str
    levels: dict[str, str]
    config: Config
    changes: tuple[tuple[str, Any, Any], ...] = ()


@dataclass(frozen=True)
class Study:
    """A checked study file, as returned by `read_study`.

    Attributes:
        arms: All arms by name, in the file's order, including the baseline.
        factors: Level labels by factor key; empty if the file lists arms.
        minutes: Expected wall time per cell, if the file states it.
        overrides: Command-line options that apply to all arms.
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
        """Return the default study directory."""
        return Path("runs", "ablations", self.name)

    @property
    def hash(self) -> str:
        """Return the SHA-256 of everything that affects the results and how they are judged."""
        judged = {key: value for key, value in self.about().items() if key not in ("question", "factors")}
        arms = {arm.name: resolve.prune(arm.config, RUN_ONLY) for arm in self.arms.values()}
        content = {"name": self.name, **judged, "arms": arms}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """Return the keys of the study file that a plan and a report repeat."""
        keys = ("question", "metric", "mode", "margin", "test_weights", "baseline", "seeds", "factors")
        return {key: getattr(self, key) for key in keys}


def change_text(key: str, there: Any, here: Any) -> str:
    """Return "KEY: value in the baseline → value in the arm"."""
    return f"{key}: {_short_text(there)} → {_short_text(here)}"


def _short_text(value: Any) -> str:
    text = "null" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def find_study(name: str) -> Path:
    """Return the path of a study file, given its path or its name in configs/ablation."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = sorted(file.stem for file in (CONFIGS / "ablation").glob("*.yaml"))
    if name in shipped:
        return CONFIGS / "ablation" / f"{name}.yaml"
    near = difflib.get_close_matches(path.stem, shipped, 3, 0.5) or shipped
    raise UserError(f"no study file {name}; studies in configs/ablation: {', '.join(near)}")


def read_study(name: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study file.

    Args:
        name: Path of the file, or its name in configs/ablation.
        overrides: Options for all arms: --config FILE and --KEY VALUE, as for `reslab fit`.

    Raises:
        UserError: the file is invalid; the message names the key.
    """
    path = find_study(str(name))
    text = resolve.read_mapping(path)
    _check_keys(path, text)
    factors = {key: _levels(path, key, values) for key, values in (text.get("factors") or {}).items()}
    variants = dict(_arms(path, text, factors))
    base = _base(path, text, overrides, {key for _, changes in variants.values() for key in changes})
    title, test_weights = text.get("name", path.stem), text.get("test_weights", "last")
    arms = {}
    for arm, (levels, changes) in variants.items():
        run = {"name": f"{title}.{arm}", "test_weights": test_weights, "group": title, "job_type": arm}
        config = resolve.change(merge(base, {"run": run}), changes, path.parent)
        _check_arm(path, arm, changes, config)
        arms[arm] = Arm(arm, levels, config)
    baseline = _baseline(path, text["baseline"], factors, arms)
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
        factors={key: list(levels) for key, levels in factors.items()},
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
            raise UserError(f"{path}: {key} does not accept {value!r}")
    if lacking := [key for key in REQUIRED if not text.get(key)]:
        raise UserError(f"{path}: {lacking[0]} is missing or empty")
    if bool(text.get("arms")) == bool(text.get("factors")):
        raise UserError(f"{path}: give either arms or factors")


def _base(path: Path, text: Config, overrides: Sequence[str], varied: set[str]) -> Config:
    """Return the config that all arms start from: base.yaml, the study's base files, then the command line."""
    config = resolve.read_config(CONFIGS / "base.yaml")
    for part in text["base"]:  # a config file, or dotted keys and values
        if isinstance(part, dict):
            config = resolve.change(config, dict(resolve.flat(part)), path.parent)
        else:
            config = merge(config, resolve.read_config(path.parent / str(part)))
    for key, value in resolve.options(overrides):
        if key == "config":
            config = merge(config, resolve.read_config(Path(value)))
        elif clash := [v for v in varied if v == key or key.startswith(f"{v}.")]:
            raise UserError(f"{path}: --{key} would apply to all arms, but they differ in {clash[0]}")
        else:
            config = resolve.change(config, {key: yaml.load(value, resolve.Loader)}, Path())
    return config


# Arms


def _arms(path: Path, text: Config, factors: Factors) -> Iterator[tuple[str, tuple[dict[str, str], Config]]]:
    """Yield (name, (levels, changes)) of every arm; changes by dotted key."""
    if text.get("arms"):
        for name, changes in text["arms"].items():
            if not isinstance(changes, dict | None):
                raise UserError(f"{path}: arm {name} must hold keys and values, got {changes!r}")
            yield _folder_name(path, str(name)), ({}, dict(resolve.flat(changes or {})))
        return
    excluded = [_level_labels(path, factors, part) for part in text.get("exclude") or []]
    names = set()
    for labels in itertools.product(*factors.values()):
        levels = dict(zip(factors, labels, strict=True))
        if any(part.items() <= levels.items() for part in excluded):
            continue
        name = _folder_name(path, "+".join(f"{_short(key, factors)}={levels[key]}" for key in factors))
        if name in names:
            raise UserError(f"{path}: two arms would be called {name}: label the levels, as LABEL: VALUE")
        names.add(name)
        yield name, (levels, {key: factors[key][label] for key, label in levels.items()})


def _folder_name(path: Path, name: str) -> str:
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise UserError(f"{path}: {name!r} is not a valid directory name: use letters, digits and _ . = + -")
    return name


def _levels(path: Path, key: str, values: Any) -> dict[str, Any]:
    """Return a factor's values by label: the file's labels, else the values as text that fits a directory name."""
    if isinstance(values, dict) and values:
        return {str(label): value for label, value in values.items()}
    if not isinstance(values, list) or len(values) < 2:
        raise UserError(f"{path}: factor {key} requires a list of at least two values, or LABEL: VALUE pairs")
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    labels = [re.sub(r"[^\w.=-]+", "-", text).strip("-") for text in texts]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"{path}: factor {key} has the level {twice[0]} twice")
    return dict(zip(labels, values, strict=True))


def _short(key: str, factors: Mapping[str, Any]) -> str:
    """Return the shortest end of a key that no other factor shares."""
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if sum(other.endswith(end) for other in factors) == 1), key)


def _level_labels(path: Path, factors: Factors, part: Any) -> dict[str, str]:
    """Return factors and values (or labels) as factors and labels."""
    labels = {}
    for key, value in part.items() if isinstance(part, dict) else [(part, None)]:
        if key not in factors:
            raise UserError(f"{path}: {key!r} is not a factor; factors: {', '.join(factors)}")
        matches = [label for label, level in factors[key].items() if value == level or str(value) == label]
        if not matches:
            raise UserError(f"{path}: {key} has no level {value!r}; levels: {', '.join(factors[key])}")
        labels[key] = matches[0]
    return labels


def _baseline(path: Path, baseline: Any, factors: Factors, arms: Mapping[str, Arm]) -> str:
    if isinstance(baseline, dict) and factors:
        levels = _level_labels(path, factors, baseline)
        baseline = next((arm.name for arm in arms.values() if arm.levels == levels), str(baseline))
    if not isinstance(baseline, str) or baseline not in arms:
        near = difflib.get_close_matches(str(baseline), arms, 3, 0.5) or list(arms)[:8]
        raise UserError(f"{path}: the baseline {baseline!r} is not an arm; arms: {', '.join(near)}")
    return baseline


# Checks


def _check_arm(path: Path, arm: str, changes: Config, config: Config) -> None:
    """Raise UserError for keys that an arm cannot change, and for keys that the config does not accept."""
    for key in changes:
        if key.startswith(RUN_ONLY) or key in ("seed_everything", "run.test_weights"):
            raise UserError(f"{path}: arm {arm}: an arm cannot change {key}")
    try:
        for key in (*changes, *dict(resolve.flat(config, classes=True))):
            resolve.check_key(key, config)
    except UserError as error:
        raise UserError(f"{path}: arm {arm}: {error}") from error


def _check_values(study: Study) -> None:
    path, seeds = study.path, study.seeds
    if bad := [seed for seed in seeds if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0]:
        raise UserError(f"{path}: seeds must be integers of at least 0, got {bad[0]!r}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds contains a seed twice: {seeds}")
    if not re.fullmatch(r"(train|val|test)/\S+", study.metric):
        raise UserError(f"{path}: metric must be train/NAME, val/NAME or test/NAME, got {study.metric!r}")
    for key, choices in (("mode", ("max", "min")), ("test_weights", ("last", "best"))):
        if getattr(study, key) not in choices:
            raise UserError(f"{path}: {key} must be {' or '.join(choices)}, got {getattr(study, key)!r}")
    if study.margin is not None and not study.margin > 0:
        raise UserError(f"{path}: margin must be more than 0, got {study.margin}: smaller differences do not matter")
    _folder_name(path, study.name)
    if len(study.arms) < 2:
        raise UserError(f"{path}: nothing to compare the baseline with: add a second arm")


def _compared(path: Path, arms: Mapping[str, Arm], baseline: str) -> dict[str, Arm]:
    """Return the arms with their changes from the baseline; raise UserError if two arms are the same."""
    complete = {name: resolve.with_defaults(arm.config) for name, arm in arms.items()}
    compared, by_changes = {}, {"[]": baseline}
    for name, arm in arms.items():
        rows = [row for row in differences(complete[baseline], complete[name]) if not row[0].startswith("run.")]
        signature = json.dumps([(key, here) for key, _, here in rows], sort_keys=True)
        if name != baseline and signature in by_changes:
            raise UserError(f"{path}: arm {name} is the same as {by_changes[signature]}: it changes nothing")
        by_changes[signature] = name
        compared[name] = replace(arm, changes=tuple(rows))
    return compared
