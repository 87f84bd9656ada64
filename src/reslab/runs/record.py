"""The life of a run's manifest.json: opened by every attempt, updated, closed with a status. No torch at import."""

import hashlib
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import getpid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from reslab.diff import differences
from reslab.errors import UserError
from reslab.files import write_text
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.runs.masking import mask_command

if TYPE_CHECKING:
    from reslab.data.identity import DataIdentity


class RunRecord:
    """The manifest of a run. Every rank has it in memory; only rank 0 `writes` it, and has locked the run directory.

    A run belongs to its directory once there is a checkpoint to resume from. Until then, a run with another config or
    other data replaces it.

    Args:
        config: The resolved config, YAML.
        argv: Arguments of `reslab fit`.
    """

    def __init__(self, folder: RunFolder, config: str, argv: Sequence[str], writes: bool) -> None:
        self.folder, self.config, self.argv, self.writes = folder, config, argv, writes
        self.values = yaml.safe_load(config)
        self.manifest: dict[str, Any] = manifests.read(folder.manifest) if folder.manifest.exists() else {}
        self.attempt: dict[str, Any] = {}  # the entry of this process in the manifest's `attempts`
        self._started = time.monotonic()

    def is_finished(self) -> bool:
        """Return whether the run is complete. Raises UserError if the directory belongs to another run."""
        finished = self.manifest.get("status") == "complete"
        if self.manifest and not self.folder.config.exists():
            raise UserError(f"{self.folder.path} has a manifest.json but no config.yaml: choose another --run.dir")
        if finished or self.folder.holds_checkpoint():
            self._refuse_other_config()
        return finished

    def open(self, data: Mapping[str, Any], identity: "DataIdentity | None", world_size: int) -> None:
        """Start an attempt at a new or unfinished run, after all checks that may refuse it.

        Args:
            data: Of the manifest: hashes, class names and image shape.
            identity: The same data in detail; None on ranks that do not write.
            world_size: Number of processes.

        Raises:
            UserError: The run to be resumed has other data or another number of processes.
        """
        changes: list[str] = []
        if self.folder.holds_checkpoint():
            changes = self._check_data(identity)
            self._check_world_size(world_size)
        elif self._config_changes or not self.manifest:
            self._begin()
        for attempt in self.manifest["attempts"]:  # a crashed attempt could not record its end
            attempt.setdefault("ended", None)
            attempt.setdefault("how", "killed")
        self.attempt = {"started": manifests.now(), "host": socket.gethostname(), "pid": getpid()}
        if changes:
            self.attempt["data_change"] = changes
        self.manifest["attempts"].append(self.attempt)
        if self.writes and identity:
            self.folder.clear_leftovers()
            if not self.folder.data.exists() or identity.differs(self.manifest.get("data", {})):
                identity.save(self.folder.data)
        self.write(status="running", data=data, environment={**manifests.environment(), "world_size": world_size})

    def _begin(self) -> None:
        """Claim the run directory for a new run."""
        if self.manifest and self.writes:
            keys = ", ".join(key for key, _, _ in self._config_changes)
            print(f"{self.folder.path} has no checkpoint: its run is replaced (changed: {keys})", flush=True)
        diff = self.folder.path / "uncommitted.diff"
        if self.writes:
            self.folder.clear()
            write_text(self.folder.config, self.config)
        self.manifest = {
            "status": "running",
            "id": secrets.token_hex(4),
            "name": self.values["run"]["name"],
            "seed": self.values["seed_everything"],
            "command": mask_command(["reslab", "fit", *self.argv]),
            "config_sha256": hashlib.sha256(self.config.encode()).hexdigest(),
            "rule": self.values["run"]["test_weights"],
            "git": manifests.git_state(Path(__file__).parent, keep=diff if self.writes else None),
            "attempts": [],
            "results": {},
            "weights_sha256": None,
            "wall_seconds": 0.0,
            "samples_per_second": None,
        }

    @cached_property
    def _config_changes(self) -> list[tuple[str, Any, Any]]:
        """Identifying keys that differ from the config in the run directory: (key, value there, value here)."""
        if not self.folder.config.exists():
            return []
        recorded = yaml.safe_load(self.folder.config.read_text(encoding="utf-8"))
        rows = differences(recorded, self.values)
        return [row for row in rows if not row[0].startswith(manifests.NOT_IDENTITY)]

    def _refuse_other_config(self) -> None:
        if self._config_changes:
            message = "holds a run with a different config: choose another --run.dir, or use the same config"
            rows = (
                f"  {key}: {old} (in the run directory) != {new} (requested)" for key, old, new in self._config_changes
            )
            raise UserError("\n".join([f"{self.folder.path} {message}", *rows]))

    def _check_data(self, identity: "DataIdentity | None") -> list[str]:
        """Return what has changed in the data since the last attempt; raise UserError unless that is allowed."""
        recorded = self.manifest.get("data")
        changes = identity.changes(recorded, self.folder.data) if identity and recorded else []
        if changes and not self.values["run"]["allow_data_change"]:
            raise UserError(
                "\n  ".join([f"the data are not those on which the run in {self.folder.path} was trained:", *changes])
                + "\nRestore the data to resume with the same bits, or choose another --run.dir to train on these. To "
                "resume on them\nanyway, which the manifest will record: --run.allow_data_change true"
            )
        return changes

    def _check_world_size(self, world_size: int) -> None:
        """Refuse to resume with another number of processes, unless that is allowed."""
        before = self.manifest.get("environment", {}).get("world_size", world_size)
        if before == world_size:
            return
        if not self.values["run"]["allow_world_size_change"]:
            raise UserError(
                f"this run was trained by {before} processes, not {world_size}: the order of the images would stay "
                f"the same, but the weights may differ in their last bits. Use {before} processes, or allow the "
                "change: --run.allow_world_size_change true"
            )
        self.manifest["elastic"] = f"resumed by {world_size} processes after {before}: bits may differ"

    def write(self, **changes: Any) -> None:
        """Update the manifest and write it to the run directory."""
        self.manifest.update(changes)
        if self.writes:
            manifests.write(self.folder.manifest, self.manifest)

    def close(self, status: str, reason: str = "") -> str:
        """Record how this attempt ended, if it began; return that in one line."""
        outcome = f"{status}: {reason}" if reason else status
        if not self.attempt:
            return outcome
        self.attempt.update(ended=manifests.now(), how=outcome)
        self.manifest["wall_seconds"] += round(time.monotonic() - self._started, 1)
        try:
            self.write(status=status)
        except OSError as error:  # on a full disk the exit status still tells how the run ended
            print(f"cannot update {self.folder.manifest}: {error}", flush=True)
        return outcome
