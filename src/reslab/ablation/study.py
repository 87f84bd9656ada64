"""Study files: arms, seeds and one question. Read, resolved and checked without importing torch."""

import contextlib
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reslab import names, resolve
from reslab.ablation.study_file import Mistakes, check_keys, folder_name, read_text, seeds_of
from reslab.arguments import expand
from reslab.diff import differences
from reslab.errors import UserError
from reslab.host import CONFIGS
from reslab.resolve import Config, merge, short_key

Factors = dict[str, dict[str, Any]]  # values by label, by factor key
Variants = dict[str, tuple[dict[str, str], Config]]  # levels and changes (by dotted key) by arm
DEFAULTS = {"metric": "test/acc", "margin": None, "test": "paired", "sd": None, "test_weights": "last", "minutes": None}
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
    looks: list[int] | None  # numbers of seeds after which the study is judged; None: once, at the end
    test: Literal["paired", "pooled", "folds"]
    sd: float | None  # of the metric over seeds, if the file states it
    arms: dict[str, Arm]  # by name, in the file's order, including the baseline
    factors: dict[str, list[str]]  # level labels by factor key; empty if the file lists arms
    minutes: float | None  # expected wall time per cell, if the file states it
    overrides: tuple[str, ...]  # command-line options that apply to all arms

    @property
    def folds(self) -> int | None:
        """The number of folds, if the runs of an arm are folds of a cross-validation: seed k validates on fold k."""
        return len(self.seeds) if self.test == "folds" else None

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
        keys = ("question", "metric", "mode", "margin", "test", "sd", "test_weights", "baseline", "seeds", "looks")
        return {key: getattr(self, key) for key in (*keys, "factors")}


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
        UserError: the file is invalid; the message lists all mistakes, each with an example.
    """
    path = names.find_file("ablation", str(name))
    mistakes = Mistakes()
    study = parse_study(path, read_text(path, mistakes), overrides, mistakes)
    mistakes.raise_all(path)
    assert study is not None
    return study


def parse_study(
    path: Path, text: Config, overrides: Sequence[str] = (), mistakes: Mistakes | None = None
) -> Study | None:
    """Check the content of a study file and return the study; None if there are mistakes, which are added."""
    mistakes = Mistakes() if mistakes is None else mistakes
    text = check_keys(text, mistakes)
    of_folds = {"metric": "val/acc", "test": "folds"} if "folds" in text else {}
    text = {**DEFAULTS, **of_folds, "name": path.stem, **text}
    factors = _factors(text.get("factors") or {}, mistakes)
    variants = _variants(text, factors, mistakes)
    seeds = seeds_of(text, mistakes)
    arms = _arms(path.parent, text, variants, overrides, mistakes)
    baseline = ""
    faulty = {*map(str, text.get("arms") or ())} - {*variants}
    if "baseline" in text and variants and str(text["baseline"]) not in faulty:
        with mistakes.collect():
            baseline = _baseline(text["baseline"], factors, variants)
    if baseline in arms:
        arms = _compared(arms, baseline, mistakes)
    if mistakes.texts:
        return None
    question = text.get("question") or _question(list(arms), baseline, text["metric"])
    return Study(
        path=path,
        question=" ".join(question.split()),
        baseline=baseline,
        mode=text.get("mode", "min" if text["metric"].endswith("loss") else "max"),
        seeds=seeds,
        looks=text.get("looks"),
        arms=arms,
        factors={key: list(levels) for key, levels in factors.items()},
        overrides=tuple(overrides),
        **{key: text[key] for key in ("name", *DEFAULTS)},
    )


def _question(arms: Sequence[str], baseline: str, metric: str) -> str:
    others = [arm for arm in arms if arm != baseline]
    return f"Does {others[0] if len(others) == 1 else 'any arm'} differ from {baseline} in {metric}?"


def _factors(stated: Mapping[str, Any], mistakes: Mistakes) -> Factors:
    factors: Factors = {}
    for key, values in stated.items():
        with mistakes.collect():
            factors[str(key)] = _levels(str(key), values)
    return factors


def _arms(
    folder: Path, text: Config, variants: Variants, overrides: Sequence[str], mistakes: Mistakes
) -> dict[str, Arm]:
    """Return the valid arms, each with its resolved config."""
    arms: dict[str, Arm] = {}
    varied = {key for _, changes in variants.values() for key in changes}
    base = base_config(folder, text.get("base", []), overrides, varied, mistakes)
    of_base = set(wrong_keys(base))
    for message in sorted(of_base):
        mistakes.add(f"base: {message}")
    for name, (levels, changes) in variants.items():
        run = {"name": f"{text['name']}.{name}", "group": text["name"], "job_type": name}
        start = merge(base, {"run": {**run, "test_weights": text["test_weights"]}})
        if (
            "folds" in text
        ):  # `launch.command` sets the fold; verdicts come from validation, so the test set is not used
            start = merge(start, {"run": {"skip_test": True}, "data": {"folds": text["folds"], "fold": 0}})
        before = len(mistakes.texts)
        with mistakes.collect(f"arm {name}: "):
            arm = Arm(name, levels, resolve.change(start, changes, folder))
            for message in [
                *_forbidden(changes, "folds" in text),
                *(m for m in wrong_keys(arm.config) if m not in of_base),
            ]:
                mistakes.add(f"arm {name}: {message}")
            if len(mistakes.texts) == before:
                arms[name] = arm
    return arms


def base_config(
    folder: Path, parts: Sequence[Any], overrides: Sequence[str], varied: set[str], mistakes: Mistakes
) -> Config:
    """Return the config that all arms start from: base.yaml, the study's base files, then the command line."""
    config = resolve.read_config(CONFIGS / "base.yaml")
    for part in parts:  # a config file, or dotted keys and values
        with mistakes.collect("base: "):
            if isinstance(part, dict):
                config = resolve.change(config, dict(resolve.flat(part)), folder)
            else:
                config = merge(config, resolve.read_config(base_file(folder, part)))
    stated: list[tuple[str, str]] = []
    with mistakes.collect():
        stated += resolve.options(expand(overrides, experiment=False))
    for key, value in stated:
        with mistakes.collect(f"--{key}: "):
            config = _override(config, key, value, varied)
    return config


def base_file(folder: Path, name: str) -> Path:
    """Return the config file that a study in `folder` names: relative to it, to the repository, or an experiment."""
    for path in (folder / name, CONFIGS.parent / name):
        if path.is_file():
            return path
    experiments = names.files("experiment")
    if name in experiments:
        return experiments[name]
    with contextlib.suppress(UserError):
        return names.find_stacked(name)
    near = difflib.get_close_matches(Path(name).stem, experiments, 3, 0.5) or experiments
    raise UserError(f"no config file {folder / name}; nearest experiments: {', '.join(near)}")


def _override(config: Config, key: str, value: str, varied: set[str]) -> Config:
    if key == "config":
        return merge(config, resolve.read_config(Path(value)))
    if clash := [v for v in varied if f"{short_key(key)}.".startswith(f"{short_key(v)}.")]:
        raise UserError(f"it would apply to all arms, but they differ in {clash[0]}")
    changed = resolve.set_option(config, key, value)
    resolve.check_key(resolve.full_key(key, changed), changed)
    return changed


def _variants(text: Config, factors: Factors, mistakes: Mistakes) -> Variants:
    """Return levels and changes of every arm by name."""
    variants: Variants = {}
    for name, changes in (text.get("arms") or {}).items():
        with mistakes.collect():
            if not isinstance(changes, dict | None):
                example = f"{name}: {{model.optimizer.lr: 0.2}}"
                raise UserError(f"arm {name} must hold keys and values: {example} (got {changes!r})")
            variants[folder_name(str(name))] = {}, dict(resolve.flat(changes or {}))
    excluded: list[dict[str, str]] = []
    for part in (text.get("exclude") or []) if factors else []:
        with mistakes.collect("exclude: "):
            excluded.append(_level_labels(factors, part))
    for labels in itertools.product(*factors.values()) if factors else ():
        levels = dict(zip(factors, labels, strict=True))
        if not any(part.items() <= levels.items() for part in excluded):
            with mistakes.collect():
                name = folder_name("+".join(f"{_short(key, factors)}={label}" for key, label in levels.items()))
                variants[name] = levels, {key: factors[key][label] for key, label in levels.items()}
    if (text.get("arms") or factors) and len(text.get("arms") or variants) < 2:
        mistakes.add("nothing to compare the baseline with: add a second arm")
    return variants


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
    labels, keys = {}, {short_key(key): key for key in factors}
    for stated, value in part.items() if isinstance(part, dict) else [(part, None)]:
        key = keys.get(short_key(str(stated)))
        if key is None:
            raise UserError(f"{stated!r} is not a factor; factors: {', '.join(factors)}")
        matches = [label for label, level in factors[key].items() if value == level or str(value) == label]
        if not matches:
            raise UserError(f"{key} has no level {value!r}; levels: {', '.join(factors[key])}")
        labels[key] = matches[0]
    return labels


def _baseline(baseline: Any, factors: Factors, variants: Variants) -> str:
    if isinstance(baseline, dict) and factors:
        levels_of_baseline = _level_labels(factors, baseline)
        baseline = next((name for name, (levels, _) in variants.items() if levels == levels_of_baseline), baseline)
    if str(baseline) not in variants:
        near = difflib.get_close_matches(str(baseline), variants, 3, 0.5) or list(variants)[:8]
        raise UserError(f"the baseline {baseline!r} is not an arm; arms: {', '.join(near)}")
    return str(baseline)


def _forbidden(changes: Config, folds: bool) -> Iterator[str]:
    """Yield a message for every key that an arm cannot change; in a study over folds, also those of the split."""
    of_folds = ("data.fold", "data.folds", "data.split_seed", "run.skip_test") if folds else ()
    for key in changes:
        if key.startswith(RUN_ONLY) or key in ("seed_everything", "run.test_weights", *of_folds):
            yield f"an arm cannot change {key}"


def wrong_keys(config: Config) -> Iterator[str]:
    """Yield a message for every key that the classes of a config do not accept."""
    for key in dict(resolve.flat(config, classes=True)):
        try:
            resolve.check_key(key, config)
        except UserError as error:
            yield str(error)


def _compared(arms: Mapping[str, Arm], baseline: str, mistakes: Mistakes) -> dict[str, Arm]:
    """Return the arms with their changes from the baseline; two arms that are the same are a mistake."""
    complete = {name: resolve.with_defaults(arm.config) for name, arm in arms.items()}
    compared, by_changes = {}, {"[]": baseline}
    for name, arm in arms.items():
        rows = [row for row in differences(complete[baseline], complete[name]) if not row[0].startswith(RUN_ONLY)]
        signature = json.dumps([(key, here) for key, _, here in rows], sort_keys=True, default=str)
        if name != baseline and signature in by_changes:
            mistakes.add(f"arm {name} is the same as {by_changes[signature]}: it changes nothing")
        by_changes[signature] = name
        compared[name] = replace(arm, changes=tuple(rows))
    return compared
