"""The life of a run's manifest.json: opened by every attempt, updated, closed with a status. No torch at import."""

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from reslab.diff import differences
from reslab.errors import UserError
from reslab.files import write_text
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.runs.masking import mask_command


class RunRecord:
    """The manifest of a run. Every rank has it in memory; only rank 0 `writes` it, and has locked the run directory."""

    def __init__(self, folder: RunFolder, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.manifest: dict[str, Any] = {}
        self.attempt: dict[str, Any] = {}  # the entry of this process in the manifest's `attempts`
        self._started = time.monotonic()

    def open(self, config: str, argv: Sequence[str]) -> bool:
        """Start an attempt at a new or unfinished run; return False if the run is finished.

        `config` is YAML, `argv` the arguments of `reslab fit`. Raises UserError if the run has another configuration.
        """
        if self.folder.manifest.exists():
            self.manifest = manifests.read(self.folder.manifest)
            self._refuse_other_config(config)
            if self.manifest["status"] == "complete":
                print(f"{self.folder.path} holds a finished run: nothing to do. Report: {self.folder.report}")
                return False
            for attempt in self.manifest["attempts"]:  # a crashed attempt could not record its end
                attempt.setdefault("ended", None)
                attempt.setdefault("how", "killed")
        else:
            self.manifest = self._new_manifest(config, argv)
            if self.writes:
                write_text(self.folder.config, config)
        self.attempt = {"started": manifests.now(), "host": socket.gethostname(), "pid": os.getpid()}
        self.manifest["attempts"].append(self.attempt)
        if self.writes:
            self.folder.clear_leftovers()
        self.write(status="running")
        return True

    def _new_manifest(self, config: str, argv: Sequence[str]) -> dict[str, Any]:
        values, diff = yaml.safe_load(config), self.folder.path / "uncommitted.diff"
        return {
            "status": "running",
            "id": secrets.token_hex(4),
            "name": values["run"]["name"],
            "seed": values["seed_everything"],
            "command": mask_command(["reslab", "fit", *argv]),
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "rule": values["run"]["test_weights"],
            "git": manifests.git_state(Path(__file__).parent, keep=diff if self.writes else None),
            "attempts": [],
            "results": {},
            "weights_sha256": None,
            "wall_seconds": 0.0,
            "samples_per_second": None,
        }

    def _refuse_other_config(self, config: str) -> None:
        if not self.folder.config.exists():
            raise UserError(f"{self.folder.path} has a manifest.json but no config.yaml: choose another --run.dir")
        recorded = yaml.safe_load(self.folder.config.read_text(encoding="utf-8"))
        rows = [
            f"  {key}: {old} (in the run directory) != {new} (requested)"
            for key, old, new in differences(recorded, yaml.safe_load(config))
            if not key.startswith(manifests.NOT_IDENTITY)
        ]
        if rows:
            message = "holds a run with a different config: choose another --run.dir, or use the same config"
            raise UserError("\n".join([f"{self.folder.path} {message}", *rows]))

    def note_environment(self, world_size: int, resumed: bool, allow_world_size_change: bool) -> None:
        """Record software, hardware and world size; refuse to resume with another world size unless allowed."""
        before = self.manifest.get("environment", {}).get("world_size", world_size)
        if resumed and before != world_size:
            if not allow_world_size_change:
                raise UserError(
                    f"this run was trained by {before} processes, not {world_size}: the order of the images would stay "
                    f"the same, but the weights may differ in their last bits. Use {before} processes, or allow the "
                    "change: --run.allow_world_size_change true"
                )
            self.manifest["elastic"] = f"resumed by {world_size} processes after {before}: bits may differ"
        self.write(environment={**manifests.environment(), "world_size": world_size})

    def write(self, **changes: Any) -> None:
        """Update the manifest and write it to the run directory."""
        self.manifest.update(changes)
        if self.writes:
            manifests.write(self.folder.manifest, self.manifest)

    def close(self, status: str, reason: str = "") -> None:
        """Record how this attempt ended, and print it unless the run is complete."""
        outcome = f"{status}: {reason}" if reason else status
        self.attempt.update(ended=manifests.now(), how=outcome)
        self.manifest["wall_seconds"] += round(time.monotonic() - self._started, 1)
        if status != "complete" and self.writes:
            print(outcome, flush=True)
        try:
            self.write(status=status)
        except OSError as error:  # on a full disk the exit status still tells how the run ended
            print(f"cannot update {self.folder.manifest}: {error}", flush=True)
