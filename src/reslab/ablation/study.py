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
DEFAULTS = {"metric": "test/acc", "margin": None, "test_weights": "last", "minutes": None}
# Options of a single run: they do not identify a study, and an arm cannot change them.
RUN_ONLY = ("run.dir", "run.name", "run.group", "run.job_type", "run.tags", "data.root", "data.download")


@dataclass(frozen=True)
class Arm:
    """One variant of the experiment."""

    name: str  # also of its directory
    levels: dict[str, str]  # in a factor study, the label of the arm's level by factor key
    config: Config  # base.yaml, the study's base files, the command line, then the arm's changes
    changes: tuple[tuple[str, Any, Any], ...] = ()  # (key, value in the baseline, value here)


@dataclass(frozen=True)
class Study:
    """A checked study file, as returned by `read_study`."""

    path: Path
    name: str
    question: str
    baseline: str
    metric: str
    mode: Literal["max", "min"]
    margin: float | None
    test_weights: str
    seeds: list[int]
    arms: dict[str, Arm]  # by name, in the file's order, including the baseline
    factors: dict[str, list[str]]  # level labels by factor key; empty if the file lists arms
    minutes: float | None  # expected wall time per cell, if the file states it
    overrides: tuple[str, ...]  # command-line options that apply to all arms

    @property
    def out(self) -> Path:
        """The default study directory."""
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
    texts = ("null" if v is None else f"{v:.10g}" if isinstance(v, float) else str(v) for v in (there, here))
    return f"{key}: " + " → ".join(text if len(text) <= 80 else f"{text[:79]}…" for text in texts)


def read_study(name: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study file.

    Args:
        name: Path of the file, or its name in configs/ablation.
        overrides: Options for all arms: --config FILE and --KEY VALUE, as for `reslab fit`.

    Raises:
        UserError: the file is invalid; the message names the key.
    """
    path, shipped = Path(name), {file.stem: file for file in sorted((CONFIGS / "ablation").glob("*.yaml"))}
    if not path.is_file():
        if str(name) not in shipped:
            near = difflib.get_close_matches(path.stem, shipped, 3, 0.5) or shipped
            raise UserError(f"no study file {name}; studies in configs/ablation: {', '.join(near)}")
        path = shipped[str(name)]
    text = {**DEFAULTS, "name": path.stem, **resolve.read_mapping(path)}
    try:
        return _study(path, text, tuple(overrides))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _study(path: Path, text: Config, overrides: tuple[str, ...]) -> Study:
    _check_keys(text)
    factors = {key: _levels(key, values) for key, values in (text.get("factors") or {}).items()}
    variants = dict(_arms(text, factors))
    base = _base(path.parent, text["base"], overrides, {key for _, changes in variants.values() for key in changes})
    arms = {}
    for name, (levels, changes) in variants.items():
        run = {"name": f"{text['name']}.{name}", "group": text["name"], "job_type": name}
        start = merge(base, {"run": {**run, "test_weights": text["test_weights"]}})
        arms[name] = Arm(name, levels, resolve.change(start, changes, path.parent))
        _check_arm(arms[name], changes)
    baseline = _baseline(text["baseline"], factors, arms)
    study = Study(
        path=path,
        question=" ".join(text["question"].split()),
        baseline=baseline,
        mode=text.get("mode", "min" if text["metric"].endswith("loss") else "max"),
        arms=_compared(arms, baseline),
        factors={key: list(levels) for key, levels in factors.items()},
        overrides=overrides,
        **{key: text[key] for key in ("name", "metric", "margin", "test_weights", "seeds", "minutes")},
    )
    _check_values(study)
    return study


def _check_keys(text: Config) -> None:
    for key, value in text.items():
        if key not in KEYS:
            near = ", ".join(difflib.get_close_matches(str(key), KEYS, 3, 0.5) or KEYS)
            raise UserError(f"no such key {key!r}; nearest: {near}")
        if value is not None and not isinstance(value, KEYS[key]):
            raise UserError(f"{key} does not accept {value!r}")
    if lacking := [key for key in REQUIRED if not text.get(key)]:
        raise UserError(f"{lacking[0]} is missing or empty")
    if bool(text.get("arms")) == bool(text.get("factors")):
        raise UserError("give either arms or factors")


def _base(folder: Path, files: Sequence[Any], overrides: Sequence[str], varied: set[str]) -> Config:
    """Return the config that all arms start from: base.yaml, the study's base files, then the command line."""
    config = resolve.read_config(CONFIGS / "base.yaml")
    for part in files:  # a config file, or dotted keys and values
        if isinstance(part, dict):
            config = resolve.change(config, dict(resolve.flat(part)), folder)
        else:
            config = merge(config, resolve.read_config(folder / str(part)))
    for key, value in resolve.options(overrides):
        if key == "config":
            config = merge(config, resolve.read_config(Path(value)))
        elif clash := [v for v in varied if f"{key}.".startswith(f"{v}.")]:
            raise UserError(f"--{key} would apply to all arms, but they differ in {clash[0]}")
        else:
            config = resolve.change(config, {key: yaml.load(value, resolve.Loader)}, Path())
    return config


def _arms(text: Config, factors: Factors) -> Iterator[tuple[str, tuple[dict[str, str], Config]]]:
    """Yield (name, (levels, changes)) of every arm; changes by dotted key."""
    if text.get("arms"):
        for name, changes in text["arms"].items():
            if not isinstance(changes, dict | None):
                raise UserError(f"arm {name} must hold keys and values, got {changes!r}")
            yield _folder_name(str(name)), ({}, dict(resolve.flat(changes or {})))
        return
    excluded = [_level_labels(factors, part) for part in text.get("exclude") or []]
    for labels in itertools.product(*factors.values()):
        levels = dict(zip(factors, labels, strict=True))
        if not any(part.items() <= levels.items() for part in excluded):
            name = _folder_name("+".join(f"{_short(key, factors)}={label}" for key, label in levels.items()))
            yield name, (levels, {key: factors[key][label] for key, label in levels.items()})


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise UserError(f"{name!r} is not a valid directory name: use letters, digits and _ . = + -")
    return name


def _levels(key: str, values: Any) -> dict[str, Any]:
    """Return a factor's values by label: the file's labels, else the values as text that fits a directory name."""
    if isinstance(values, dict) and values:
        return {str(label): value for label, value in values.items()}
    if not isinstance(values, list) or len(values) < 2:
        raise UserError(f"factor {key} requires a list of at least two values, or LABEL: VALUE pairs")
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    labels = [re.sub(r"[^\w.=-]+", "-", text).strip("-") for text in texts]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"factor {key} has the level {twice[0]} twice")
    return dict(zip(labels, values, strict=True))


def _short(key: str, factors: Mapping[str, Any]) -> str:
    """Return the shortest end of a key that no other factor shares."""
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if sum(other.endswith(end) for other in factors) == 1), key)


def _level_labels(factors: Factors, part: Any) -> dict[str, str]:
    """Return factors and values (or labels) as factors and labels."""
    labels = {}
    for key, value in part.items() if isinstance(part, dict) else [(part, None)]:
        if key not in factors:
            raise UserError(f"{key!r} is not a factor; factors: {', '.join(factors)}")
        matches = [label for label, level in factors[key].items() if value == level or str(value) == label]
        if not matches:
            raise UserError(f"{key} has no level {value!r}; levels: {', '.join(factors[key])}")
        labels[key] = matches[0]
    return labels


def _baseline(baseline: Any, factors: Factors, arms: Mapping[str, Arm]) -> str:
    if isinstance(baseline, dict) and factors:
        levels = _level_labels(factors, baseline)
        baseline = next((arm.name for arm in arms.values() if arm.levels == levels), str(baseline))
    if not isinstance(baseline, str) or baseline not in arms:
        near = difflib.get_close_matches(str(baseline), arms, 3, 0.5) or list(arms)[:8]
        raise UserError(f"the baseline {baseline!r} is not an arm; arms: {', '.join(near)}")
    return baseline


def _check_arm(arm: Arm, changes: Config) -> None:
    """Raise UserError for keys that an arm cannot change, and for keys that the config does not accept."""
    try:
        for key in changes:
            if key.startswith(RUN_ONLY) or key in ("seed_everything", "run.test_weights"):
                raise UserError(f"an arm cannot change {key}")
        for key in (*changes, *dict(resolve.flat(arm.config, classes=True))):
            resolve.check_key(key, arm.config)
    except UserError as error:
        raise UserError(f"arm {arm.name}: {error}") from error


def _check_values(study: Study) -> None:
    if bad := [seed for seed in study.seeds if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0]:
        raise UserError(f"seeds must be integers of at least 0, got {bad[0]!r}")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"seeds contains a seed twice: {study.seeds}")
    if not re.fullmatch(r"(train|val|test)/\S+", study.metric):
        raise UserError(f"metric must be train/NAME, val/NAME or test/NAME, got {study.metric!r}")
    for key, choices in (("mode", ("max", "min")), ("test_weights", ("last", "best"))):
        if getattr(study, key) not in choices:
            raise UserError(f"{key} must be {' or '.join(choices)}, got {getattr(study, key)!r}")
    if study.margin is not None and not study.margin > 0:
        raise UserError(f"margin must be more than 0, got {study.margin}: smaller differences do not matter")
    _folder_name(study.name)
    if len(study.arms) < 2:
        raise UserError("nothing to compare the baseline with: add a second arm")


def _compared(arms: Mapping[str, Arm], baseline: str) -> dict[str, Arm]:
    """Return the arms with their changes from the baseline; raise UserError if two arms are the same."""
    complete = {name: resolve.with_defaults(arm.config) for name, arm in arms.items()}
    compared, by_changes = {}, {"[]": baseline}
    for name, arm in arms.items():
        rows = [row for row in differences(complete[baseline], complete[name]) if not row[0].startswith("run.")]
        signature = json.dumps([(key, here) for key, _, here in rows], sort_keys=True)
        if name != baseline and signature in by_changes:
            raise UserError(f"arm {name} is the same as {by_changes[signature]}: it changes nothing")
        by_changes[signature] = name
        compared[name] = replace(arm, changes=tuple(rows))
    return compared
