"""A run's folder: its layout, and the lock that keeps two runs out of one folder."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from reslab.errors import UserError
from reslab.files import write_text

MIN_FREE_BYTES = 64 * 2**20


class RunFolder:
    """The paths of a run's folder.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights.safetensors"
        self.predictions = self.path / "predictions.npz"
        self.figures = self.path / "figures"
        self.report = self.path / "report.html"

    @classmethod
    def existing(cls, path: str | Path) -> "RunFolder":
        """The folder of a run that was started; raises UserError where there is none."""
        folder = cls(path)
        if not folder.manifest.exists():
            raise UserError(f"{path} is no run folder: it has no manifest.json (runs are made by `reslab fit`)")
        return folder

    def probe(self) -> None:
        """Makes the folder and tries what a run will do in it; raises UserError with the cause."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "probe", "probe")
            (self.path / "probe").unlink()
        except OSError as error:
            raise UserError(f"cannot write in the run folder {self.path}: {error.strerror or error}") from error
        free = shutil.disk_usage(self.path).free
        if free < MIN_FREE_BYTES:
            room = f"only {free / 2**20:.0f} MiB are free for the run folder {self.path}"
            raise UserError(f"{room}: make room, or give another --run.dir")

    def clear_leftovers(self) -> None:
        """Removes what a killed run left half written, and the notes of processes that failed."""
        for pattern in (".*.part", "*/.*.part", ".failed-*"):
            for path in self.path.glob(pattern):
                path.unlink()

    def busy(self) -> bool:
        """Whether a process holds the folder."""
        if not (self.path / ".lock").exists():
            return False
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; raises UserError saying who has it.

        A record lock is the kernel's: it ends with its process, however that ends, and no fork inherits it. So
        a lock file that a dead run left behind holds nobody up.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise UserError(f"{self.path} is in use by another run: {_holder(file.read())}") from error
            file.truncate(0)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, file)
            file.flush()
            yield


def _holder(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError):
        lock = json.loads(text)
        return f"pid {lock['pid']} on {lock['host']}, since {lock['since']}"
    return "its lock file does not say whose"
