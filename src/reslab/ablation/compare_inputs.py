"""What `reslab compare` is given: groups of finished runs, and published numbers. No torch at import."""

import difflib
import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reslab.ablation.statistics import Mode
from reslab.ablation.wording import named
from reslab.diff import differences
from reslab.errors import UserError
from reslab.resolve import read_mapping
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

FINGERPRINT = ("files", "split", "classes")  # of the manifest's `data`


class Run(NamedTuple):
    """A finished run."""

    path: Path
    seed: int
    value: float  # of the metric
    config: dict[str, Any]
    data: dict[str, Any]  # hashes that identify the data
    commit: str | None


class Omitted(NamedTuple):
    """A run that is left out, and why; leaving out a diverged one favors its group."""

    path: Path
    reason: str
    diverged: bool = False


@dataclass
class Group:
    """Runs of one recipe, ordered by seed."""

    name: str
    runs: list[Run] = field(default_factory=list)
    omitted: list[Omitted] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        return [run.value for run in self.runs]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


class Sample(NamedTuple):
    """Size, mean and standard deviation (n - 1; None with n = 1) of the values of a group."""

    n: int
    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(len(values), float(np.mean(values)), sd)


def read_group(option: str, patterns: Sequence[str], metric: str) -> Group:
    """Read the finished runs in directories or globs; raise UserError if there are none."""
    group, paths = Group(option), dict[Path, Path]()
    for path in (path for pattern in patterns for path in _expand(option, pattern)):
        found = _runs_in(path)
        paths |= {run.resolve(): run for run in found} if isinstance(found, list) else {}
        group.omitted += [] if isinstance(found, list) else [Omitted(path, found)]
    for path in paths.values():
        read = read_run(path, metric)
        if isinstance(read, Run):
            group.runs.append(read)
        else:
            group.omitted.append(read)
    group.runs.sort(key=lambda run: run.seed)
    _omit_repeats(group)
    if not group.runs:
        raise UserError("\n  ".join([f"{option}: no finished run", *omissions(group)]))
    return group


def _expand(option: str, pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    matches = glob.glob(f"{path}/", recursive=True)  # noqa: PTH207 (an absolute pattern, or one with ..)
    if found := [path] if path.exists() else sorted(map(Path, matches)):
        return found
    parent = next(folder for folder in path.parents if folder.is_dir())
    missing, *rest = path.relative_to(parent).parts
    there = sorted(folder.name for folder in parent.iterdir() if folder.is_dir())
    near = [str(parent.joinpath(name, *rest)) for name in difflib.get_close_matches(missing, there, 1)]
    hint = f"did you mean {near[0]}?" if near else f"{parent} holds {named(there) or 'no directory'}"
    raise UserError(f"{option}: {pattern} does not exist: {hint}")


def _runs_in(path: Path) -> list[Path] | str:
    """Return the run directory, or the run directories in a directory; if there are none, the reason."""
    path = path.parent if path.name == "manifest.json" else path
    if not path.is_dir():
        return "not a run directory"
    if RunFolder(path).manifest.exists():
        return [path]
    runs = sorted({*(manifest.parent for manifest in path.glob("*/manifest.json")), *path.glob("seed-*/")})
    groups = sorted({str(manifest.parent.parent) for manifest in path.glob("*/*/manifest.json")})
    if not runs and groups:
        return f"it holds several groups of runs: name one of them ({named(groups)})"
    return runs or "it holds no run"


def read_run(path: Path, metric: str) -> Run | Omitted:
    """Read a finished run that logged the metric; anything else is omitted with the reason."""
    folder = RunFolder(path)
    if not folder.manifest.exists():
        return Omitted(path, "not started: it has no manifest.json")
    try:
        manifest = manifests.read(folder.manifest)
        status, seed, results = manifest["status"], int(manifest["seed"]), dict(manifest.get("results") or {})
        if status != "complete":
            return Omitted(path, f"unfinished: its status is {status}", diverged=status == "diverged")
        data, commit = manifest.get("data") or {}, (manifest.get("git") or {}).get("sha")
        identity, logged = {name: data.get(name) for name in FINGERPRINT}, sorted(results)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        return Omitted(path, f"its manifest.json is damaged ({type(error).__name__})")
    if metric not in results:
        near = difflib.get_close_matches(metric, logged, len(logged) or 1, 0) or ["nothing"]
        return Omitted(path, f"it does not log {metric}; it logs {', '.join(near)}")
    value = results[metric]
    if not isinstance(value, int | float) or not math.isfinite(value):
        return Omitted(path, f"its {metric} is not finite", diverged=True)
    try:
        return Run(path, seed, float(value), read_mapping(folder.config), identity, commit)
    except (UserError, UnicodeDecodeError) as error:
        return Omitted(path, f"its config.yaml is damaged: {error}")


def _omit_repeats(group: Group) -> None:
    """Leave out runs with the seed, config and data of an earlier one: an exact repeat is not a further sample."""
    kept: list[Run] = []
    for run in group.runs:
        same = [x for x in kept if (x.seed, x.data) == (run.seed, run.data) and not config_differences(x, run)]
        if same:
            group.omitted.append(Omitted(run.path, f"it repeats {same[0].path}: same seed and config"))
        else:
            kept.append(run)
    group.runs = kept


def config_differences(there: Run, here: Run) -> list[tuple[str, Any, Any]]:
    """Return the config keys in which two runs differ, apart from the seed and from where they were executed."""
    ignored = (*manifests.NOT_IDENTITY, "seed_everything", "run.name")
    return [row for row in differences(there.config, here.config) if not row[0].startswith(ignored)]


def omissions(group: Group) -> list[str]:
    """Return one line per reason for which runs were left out."""
    by_reason: dict[str, list[str]] = {}
    for run in group.omitted:
        by_reason.setdefault(run.reason, []).append(str(run.path))
    return [f"{named(paths)}: {reason}" for reason, paths in by_reason.items()]


def read_published(
    option: str, text: str, sd_text: str | None, n: int | None, values: Sequence[float], accuracy: bool, mode: Mode
) -> tuple[Sample, str]:
    """Return a published result in the unit of the runs' `values`, and a sentence that says how it was read.

    Where the values are shares in [0, 1] of which more is better, or accuracies in percent, the number is a percentage
    or a share; it is refused if it could be either. Other numbers are taken as they are.
    """
    number, percent = _number(option, text)
    error, mean = option == "--published-error", float(np.mean(values))
    scale = 1 if are_shares(values, mode) else 100 if accuracy and min(values) >= 0 and max(values) <= 100 else None
    if scale is None:
        if error or percent:
            raise UserError(f"{option} {text}: the runs' metric ({mean:.6g} on average) is not a share in [0, 1]")
        note = f"{text} is taken as it is: the runs' metric is {mean:.6g} on average."
        return Sample(n or 1, number, None if sd_text is None else _spread(sd_text, 1)), note
    average = mean / scale
    percent = percent or _is_percent(option, text, number, 1 - average if error else average)
    share = number / 100 if percent else number
    if not 0 <= share <= 1:
        raise UserError(f"{option} must be between 0 and 100 %, got {text}")
    share = 1 - share if error else share
    sd = None if sd_text is None else scale * _share_spread(sd_text, percent)
    note = (
        f"{text} is taken as {'a percentage' if percent else 'a share'}{' of errors' * error}, so the published value "
    )
    note += f"is {100 * share:.6g} %{'' if sd is None else f' with an sd of {100 * sd / scale:.3g} points'}"
    return Sample(n or 1, scale * share, sd), f"{note}; the runs have {100 * average:.2f} % on average."


def are_shares(values: Sequence[float], mode: Mode) -> bool:
    """Return whether a metric is logged as a share in [0, 1] of which more is better."""
    return mode == "max" and all(0 <= value <= 1 for value in values)


def _number(option: str, text: str) -> tuple[float, bool]:
    """Return the number, and whether it is marked as a percentage."""
    stripped = text.strip()
    try:
        number = float(stripped.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{option} must be a number such as 91.25, 91.25% or 0.9125; got {text!r}")
    return number, stripped.endswith("%")


def _is_percent(option: str, text: str, number: float, near: float) -> bool:
    """Return whether a number without a sign is a percentage; refuse one that may be either."""
    if number > 1:
        return True
    if number == 1 or number > 10 * near:  # as a percentage, it is nearer to the runs
        raise UserError(f"{option} {text} is ambiguous: write {number:g}% or {100 * number:g}%")
    return False


def _share_spread(text: str, percent: bool) -> float:
    """Return a published sd as a share; without a sign it is on the scale of the published value."""
    marked = _number("--published-sd", text)[1]
    sd = _spread(text, 100 if percent or marked else 1)
    if not marked and not 5e-5 <= sd <= 0.1:
        number, scale = _spread(text, 1), "in points" if percent else "as a share"
        raise UserError(f"--published-sd {text} is implausible {scale}: write {number:g}% or {100 * number:g}%")
    return sd


def _spread(text: str, divisor: float) -> float:
    sd = _number("--published-sd", text)[0]
    if sd <= 0:
        raise UserError(f"--published-sd must be positive, got {text}")
    return sd / divisor
