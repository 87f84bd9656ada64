"""The cells of a study: an arm and a seed each, in a run folder of its own; and what has become of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from reslab.ablation.resolve import Config, Loader
from reslab.ablation.study import Study
from reslab.diff import differences
from reslab.errors import UserError
from reslab.files import write_text
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

PLAN, ARM, LOG = "plan.json", "arm.yaml", "log.txt"


@dataclass(frozen=True)
class Cell:
    """One arm with one seed.

    Attributes:
        folder: Its run folder, <out>/<arm>/seed-<seed>.
    """

    arm: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def config(self) -> Path:
        """The whole resolved config of its arm, written before the first cell runs."""
        return self.folder.parent / ARM

    @property
    def log(self) -> Path:
        """All that its attempts have printed."""
        return self.folder / LOG


Status = Literal["missing", "running", "preempted", "failed", "diverged", "complete", "unreadable", "mismatched"]


@dataclass(frozen=True)
class State:
    """What a cell's folder holds; only what is `complete` counts as a result.

    Attributes:
        status: The manifest's, or `missing`, `unreadable` (the manifest is damaged), `foreign` (the run in the folder
            has another config or seed than the study's cell).
        detail: Why, in a line.
        manifest: The run's, or {}.
    """

    cell: Cell
    status: Status
    detail: str
    manifest: Config

    @property
    def results(self) -> dict[str, float]:
        """The final metrics by name; none unless complete."""
        return self.manifest["results"] if self.status == "complete" else {}


def cells(study: Study, out: Path) -> list[Cell]:
    """All cells, a seed of every arm before the next seed: whenever it stops, the arms have been treated alike."""
    return [Cell(arm, seed, out / arm / f"seed-{seed}") for seed in study.seeds for arm in study.arms]


def states(study: Study, out: Path, configs: Mapping[str, Config] | None = None) -> list[State]:
    """What has become of every cell, in the order of `cells`.

    Args:
        study: The study.
        out: Its folder.
        configs: The resolved config of each arm; by default what the last `ablate run` wrote.
    """
    if configs is None:
        configs = {arm: read_config(out / arm / ARM) for arm in study.arms}
    return [state(study, cell, configs[cell.arm]) for cell in cells(study, out)]


def state(study: Study, cell: Cell, config: Config) -> State:
    """What has become of a cell that should have this config ({} where none was ever written)."""
    folder = RunFolder(cell.folder)
    if not folder.manifest.exists():
        return State(cell, "missing", _last_words(cell), {})
    try:
        manifest = manifests.read(folder.manifest)
        status, seed = manifest["status"], manifest["seed"]
    except (UserError, KeyError, TypeError) as error:
        detail = f"its manifest.json is damaged: remove {cell.folder} to run it again"
        return State(cell, "unreadable", f"{detail} ({type(error).__name__})", {})
    if seed != cell.seed:
        return State(cell, "mismatched", f"the run in it has seed {seed}", manifest)
    if other := _other_config(study, folder, config):
        return State(cell, "mismatched", f"the run in it has another config: {other}", manifest)
    if status == "running" and not folder.busy():
        return State(cell, "preempted", "its process is gone, killed perhaps: `ablate run` goes on with it", manifest)
    how = (manifest.get("attempts") or [{}])[-1].get("how") or ""
    return State(cell, status, "" if status == "complete" else how.partition(": ")[2], manifest)


def read_config(path: Path) -> Config:
    """A resolved config; {} where there is none."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader) if path.exists() else {}


def _other_config(study: Study, folder: RunFolder, planned: Config) -> str:
    found = read_config(folder.config)
    if not planned or not found:
        return "it has no config.yaml" if planned else ""
    # What the arms differ in counts, also where a run's identity leaves it out.
    varied = {key for arm in study.arms.values() for key, _, _ in arm.changes}
    ignored = ("seed_everything", *(key for key in manifests.NOT_IDENTITY if key not in varied))
    rows = [row for row in differences(planned, found) if not row[0].startswith(ignored)]
    return ", ".join(f"{key} is {there} there, {here} in the plan" for key, here, there in rows)


def _last_words(cell: Cell) -> str:
    """Why a cell that left no manifest did not begin: the last line of its log."""
    try:
        lines = cell.log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")


def unplanned_runs(study: Study, out: Path) -> list[str]:
    """Run folders in `out` that are no cell of the study, such as those of an arm that it has no more."""
    planned = {cell.name for cell in cells(study, out)}
    found = (manifest.parent.relative_to(out).as_posix() for manifest in out.glob("*/seed-*/manifest.json"))
    return sorted(name for name in found if name not in planned)


def seconds_per_cell(study: Study, found: Sequence[State]) -> dict[str, float | None]:
    """The wall time of a cell of each arm: measured on its finished cells, else on all, else as the study says."""
    walls = [(s.cell.arm, s.manifest["wall_seconds"]) for s in found if s.status == "complete"]
    stated = study.minutes * 60 if study.minutes else None
    overall = fmean(wall for _, wall in walls) if walls else stated
    of_arm = {arm: [wall for name, wall in walls if name == arm] for arm in study.arms}
    return {arm: fmean(own) if own else overall for arm, own in of_arm.items()}


def write_plan(study: Study, out: Path) -> None:
    """Writes plan.json: what will be run, and the hash by which it is known."""
    named = ("name", "hash", "question", "metric", "mode", "margin", "test_weights", "baseline", "seeds", "factors")
    plan: dict[str, Any] = {key: getattr(study, key) for key in named}
    plan["arms"] = {arm.name: {"levels": arm.levels, "changes": arm.changes} for arm in study.arms.values()}
    plan["cells"] = [{"arm": c.arm, "seed": c.seed, "folder": f"{c.name}"} for c in cells(study, out)]
    write_text(out / PLAN, json.dumps(plan, indent=2, default=str) + "\n")


def read_plan(out: Path) -> dict[str, Any]:
    """plan.json; {} where nothing was run yet."""
    try:
        return json.loads((out / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {out / PLAN}: {error}; `reslab ablate run` writes it anew") from error
