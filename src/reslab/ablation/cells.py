"""Cells of a study: one run directory per arm and seed, and their states."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import yaml

from reslab.ablation.plan_log import read_plan
from reslab.ablation.study import Study
from reslab.diff import differences
from reslab.errors import UserError
from reslab.resolve import Config, Loader
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

ARM, LOG = "arm.yaml", "log.txt"


@dataclass(frozen=True)
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path  # run directory, <out>/<arm>/seed-<seed>

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def config(self) -> Path:
        """The arm's resolved config, written before the first cell runs."""
        return self.folder.parent / ARM

    @property
    def log(self) -> Path:
        """Output of all attempts."""
        return self.folder / LOG


Status = Literal[
    "missing", "interrupted", "running", "preempted", "failed", "diverged", "complete", "unreadable", "mismatched",
    "not needed",
]  # fmt: skip
NOT_BEGUN = "it was stopped before it began to train; `ablate run` starts it again"
FINAL = ("complete", "unreadable", "mismatched")  # cells that are not run


@dataclass(frozen=True)
class State:
    """State of a cell's run directory; only `complete` cells have results."""

    cell: Cell
    # Of the manifest, or `missing`, `interrupted`, `unreadable` (damaged), or `mismatched` (other config or seed).
    status: Status
    detail: str  # the reason, in one line
    manifest: Config  # or {}


def cells(study: Study, out: Path) -> list[Cell]:
    """Return all cells, ordered by seed first: if the study stops early, all arms have about the same seeds."""
    return [Cell(arm, seed, out / arm / f"seed-{seed}") for seed in study.seeds for arm in study.arms]


def states(
    study: Study, out: Path, configs: Mapping[str, Config] | None = None, data: Mapping[str, Config] | None = None
) -> list[State]:
    """Return the state of every cell.

    `configs` holds each arm's resolved config, `data` the hashes that identify its data; default: as recorded by the
    last `ablate run`.
    """
    if configs is None:
        configs = {arm: read_config(out / arm / ARM) for arm in study.arms}
    if data is None:
        data = {}
        with contextlib.suppress(UserError):  # a damaged plan log, which the report states
            data = read_plan(out).get("data", {})
    return [state(study, cell, configs[cell.arm], data.get(cell.arm)) for cell in cells(study, out)]


def state(study: Study, cell: Cell, config: Config, data: Config | None = None) -> State:
    """Return the state of a cell that should have this config ({} if none was written yet) and data (None: any)."""
    folder = RunFolder(cell.folder)
    if not folder.manifest.exists():
        line = _last_line(cell)
        stopped = line == "KeyboardInterrupt" or line.startswith("reslab: interrupted")
        return State(cell, "interrupted", NOT_BEGUN, {}) if stopped else State(cell, "missing", line, {})
    try:
        manifest = manifests.read(folder.manifest)
        status, seed = manifest["status"], manifest["seed"]
    except (UserError, KeyError, TypeError) as error:
        detail = f"manifest.json is damaged: remove {cell.folder} to run the cell again"
        return State(cell, "unreadable", f"{detail} ({type(error).__name__})", {})
    if seed != cell.seed:
        return State(cell, "mismatched", f"the run has seed {seed}", manifest)
    if other := _other_config(study, folder, config):
        return State(cell, "mismatched", f"the run has another config: {other}", manifest)
    if data and (status == "complete" or folder.holds_checkpoint()):
        recorded = manifest.get("data", {})
        if names := [name for name in data if name in recorded and recorded[name] != data[name]]:
            return State(cell, "mismatched", f"the run has other data ({', '.join(names)})", manifest)
    if status == "running" and not folder.busy():
        return State(cell, "preempted", "its process was killed; `ablate run` resumes it", manifest)
    how = (manifest.get("attempts") or [{}])[-1].get("how") or ""
    return State(cell, status, "" if status == "complete" else how.partition(": ")[2], manifest)


def read_config(path: Path) -> Config:
    """Return a resolved config; {} if there is none."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader) if path.exists() else {}


def _other_config(study: Study, folder: RunFolder, planned: Config) -> str:
    actual = read_config(folder.config)
    if not planned or not actual:
        return "it has no config.yaml" if planned else ""
    # Keys in which the arms differ count even if they are not part of a run's identity.
    varied = {key for arm in study.arms.values() for key, _, _ in arm.changes}
    ignored = ("seed_everything", *(key for key in manifests.NOT_IDENTITY if key not in varied))
    rows = [row for row in differences(planned, actual) if not row[0].startswith(ignored)]
    return ", ".join(f"{key} is {there} in the run, {here} in the plan" for key, here, there in rows)


def _last_line(cell: Cell) -> str:
    """Return the last line of a cell's log: why it did not start, if it left no manifest."""
    try:
        return cell.log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
    except OSError:
        return ""


def unplanned_runs(study: Study, out: Path) -> list[str]:
    """Return run directories in `out` that are not cells of the study, such as those of a removed arm."""
    planned = {cell.name for cell in cells(study, out)}
    runs = (manifest.parent.relative_to(out).as_posix() for manifest in out.glob("*/seed-*/manifest.json"))
    return sorted(name for name in runs if name not in planned)


def seconds_per_cell(study: Study, current: Sequence[State]) -> dict[str, float | None]:
    """Return the mean wall time per cell of each arm: of its finished cells, else of all, else as stated."""
    walls = [(s.cell.arm, s.manifest["wall_seconds"]) for s in current if s.status == "complete"]
    stated = study.minutes * 60 if study.minutes else None
    overall = fmean(wall for _, wall in walls) if walls else stated
    of_arm = {arm: [wall for name, wall in walls if name == arm] for arm in study.arms}
    return {arm: fmean(seconds) if seconds else overall for arm, seconds in of_arm.items()}
