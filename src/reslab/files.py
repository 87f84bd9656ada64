"""Atomic file writes (temporary file, fsync, rename) and SHA-256 of files."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from reslab.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory, and rename it to `path` on success.

    File and directory are fsynced in that order, so after a crash at any moment `path` is the old file or the
    complete new one. On an error the old file stays and the temporary file is removed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_directory(path.parent)


def check_output(path: Path) -> None:
    """Create the directory of an output file, and raise a UserError if the file cannot be written there."""
    probe = path.parent / f".{path.name}.test"  # as long as the name in `replacing`
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        problem = "it is a directory; give the name of a file in it" if path.is_dir() else "it is not a regular file"
        if not path.exists() or path.is_file():
            return
    except OSError as error:
        problem = error.strerror or str(error)
    raise UserError(f"cannot write {path}: {problem}")


def sync_directory(path: Path) -> None:
    """Write a directory's entries to disk, so that a new or renamed file in it survives a crash."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
