"""The run directory: its layout, and the lock that keeps two runs from sharing one."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from reslab.errors import UserError
from reslab.files import write_text
from reslab.runs.manifest import now

try:
    import fcntl
except ImportError as error:
    raise UserError("Linux and macOS are supported; on Windows, use WSL 2 (this Python has no module fcntl)") from error

MIN_FREE_BYTES = 64 * 2**20
_held: set[Path] = set()  # lock files locked by this process


class RunFolder:
    """Paths in a run directory, which need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.csv"
        self.data = self.path / "data.npz"  # see reslab.data.identity
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights.safetensors"
        self.predictions = self.path / "predictions.npz"
        self.figures = self.path / "figures"
        self.report = self.path / "report.html"

    @classmethod
    def existing(cls, path: str | Path) -> "RunFolder":
        """Return the run directory of a run that was started; raise UserError if it is not one."""
        folder = cls(path)
        if not folder.manifest.exists():
            raise UserError(f"{path} is not a run directory: it has no manifest.json (`reslab fit` creates runs)")
        return folder

    def probe(self) -> None:
        """Create the run directory and check that a run can write there; raise UserError with the cause."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "probe", "probe")
            (self.path / "probe").unlink()
        except OSError as error:
            raise UserError(f"cannot write to the run directory {self.path}: {error.strerror or error}") from error
        if (free := shutil.disk_usage(self.path).free) < MIN_FREE_BYTES:
            space = f"only {free / 2**20:.0f} MiB are free for the run directory {self.path}"
            raise UserError(f"{space}: free some space, or choose another --run.dir")

    def holds_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from, or one that was, before it was damaged."""
        return any(self.checkpoints.glob("last.ckpt*")) or any(self.checkpoints.glob("previous.ckpt*"))

    def clear(self) -> None:
        """Remove what a run without a checkpoint to resume from has left; the manifest first, which makes it a run."""
        self.manifest.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for path in (self.config, self.data, self.metrics, self.path / "uncommitted.diff"):
            path.unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        """Remove half-written files of a killed attempt, and failure notes of its ranks."""
        for pattern in (".*.part", "*/.*.part", ".failed-*"):
            for path in self.path.glob(pattern):
                path.unlink()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Create and lock the run directory; remove it again if no run was started in it."""
        created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.probe()
        try:
            with self.lock():
                yield
        finally:
            if created and not self.manifest.exists():
                self.clear_leftovers()
                (self.path / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    for path in created:
                        path.rmdir()

    def busy(self) -> bool:
        """Whether a process holds the lock: this one, or another one as far as the file may be read."""
        path = self.path / ".lock"
        if path.resolve() in _held:  # closing the file would release this process's lock
            return True
        if not path.is_file():
            return False
        with path.open("rb") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run directory for this process; raise UserError naming the process that holds it.

        The kernel releases a record lock when its process ends, however it ends, and no fork inherits it: a lock
        file left behind by a dead run blocks nobody.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = json.loads(file.read() or "{}")  # empty for a moment at the start of a run
                process = f"pid {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
                raise UserError(f"{self.path} is in use by another run: {process}") from error
            file.truncate(0)
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": now()}, file)
            file.flush()
            _held.add(path := Path(file.name).resolve())
            try:
                yield
            finally:
                _held.remove(path)
