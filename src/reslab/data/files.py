"""The table of a folder's image files: four arrays that all processes share, kept on disk where there are many files.

A folder of a million files takes minutes to list on some file systems. Its table is therefore written beside it (or,
where that is not allowed, into the user's cache), and later mapped into memory: the processes of a run, loader workers
among them, share one copy. It is believed only if it is whole (its SHA-256) and its folder is as it was: no folder in
it has another modification time, which every file added, removed or renamed changes, and a thousand files, spread over
all, have the sizes noted. What this cannot see are single files overwritten in place: remove the table then.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torchvision.datasets.folder import IMG_EXTENSIONS

from reslab.errors import UserError

KEPT_FROM = 20_000  # files; fewer are listed in less than a second, every time
SAMPLED = 1000
Folders = dict[str, int]  # relative name: modification time in ns


class DataError(UserError):
    """Data that are missing, damaged or not what the config says."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker's error arrives as its traceback in one string: keep the message at its end.
        super().__init__(message.rpartition("DataError: ")[2].strip())


class Files:
    """A table of image files: arrays instead of a million strings.

    Args:
        folder: What the names are relative to.
        names: All relative names, one after the other: uint8.
        ends: Where each of the n names ends, int64 (n,).
        sizes: Bytes of each file, int64 (n,).
        labels: Class of each file, int64 (n,).
        kept: The file that the arrays are mapped from.
    """

    def __init__(
        self,
        folder: Path,
        names: npt.NDArray[np.uint8],
        ends: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        kept: Path | None = None,
    ) -> None:
        self.folder, self.names, self.ends, self.sizes, self.labels = folder, names, ends, sizes, labels
        self.kept = kept

    def __len__(self) -> int:
        return len(self.ends)

    def __reduce__(self) -> tuple[Any, ...]:
        # To a worker that is not forked goes the name of the mapped file, not its content.
        if self.kept is not None:
            return _mapped, (self.folder, self.kept)
        return Files, (self.folder, *self.arrays().values())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"names": self.names, "ends": self.ends, "sizes": self.sizes, "labels": self.labels}

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())

    def path(self, index: int) -> Path:
        return self.folder / self.name(index)

    @cached_property
    def sha256(self) -> str:
        """Of names, sizes and labels; the bytes of a million files would take minutes to read."""
        digest = hashlib.sha256()
        for array in self.arrays().values():
            digest.update(array.data)
        return digest.hexdigest()


def labelled(top: Path, classes: list[str]) -> Files:
    """The files in one folder a class, sorted within each; from the table on disk where there is a valid one.

    Raises:
        DataError: a class has no image, or files are empty.
    """
    places = _places(top)
    for place in places:
        if (files := _valid(top, place)) is not None:
            return files
    began = time.time_ns()
    files, folders = _listed(top, classes)
    # A folder changed this very moment may change again within the same tick of the clock.
    if len(files) >= KEPT_FROM and max(folders.values()) < began - 10**9:
        for place in places:
            with suppress(OSError):
                _keep(files, folders, place)
                return _mapped(top, place)
    return files


def _listed(top: Path, classes: list[str]) -> tuple[Files, Folders]:
    folders = {"": top.stat().st_mtime_ns}
    files = _table(top, ((label, _of_class(top, name, folders)) for label, name in enumerate(classes)))
    empty = np.flatnonzero(files.sizes == 0)
    if len(empty):
        raise DataError(
            f"{len(empty)} image files are empty (0 bytes), the first is {files.path(empty[0])}: restore or remove them"
        )
    return files, folders


def _of_class(top: Path, name: str, folders: Folders) -> list[tuple[str, int]]:
    if found := sorted(_below(str(top / name), f"{name}/", folders)):
        return found
    raise DataError(f"{top / name} holds no image ({', '.join(IMG_EXTENSIONS)}): add some or remove it")


def _below(folder: str, prefix: str, folders: Folders) -> Iterator[tuple[str, int]]:
    """Name and size of every image file below a folder; hidden files are not images. Notes the folders."""
    folders[prefix] = os.stat(folder).st_mtime_ns  # noqa: PTH116 - a million of them: pathlib takes minutes
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _below(entry.path, f"{prefix}{entry.name}/", folders)
            elif entry.name.lower().endswith(IMG_EXTENSIONS) and entry.name[0] != ".":
                yield prefix + entry.name, _size(entry)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError as error:  # a link to nowhere
        raise DataError(f"{entry.path} cannot be read ({error.strerror}): restore or remove it") from None


def _table(folder: Path, groups: Iterable[tuple[int, list[tuple[str, int]]]]) -> Files:
    blobs: list[bytes] = []
    columns: list[npt.NDArray[np.int64]] = [np.empty((3, 0), np.int64)]  # length of the name, size, label
    for label, found in groups:
        encoded = [os.fsencode(name) for name, _ in found]
        blobs.append(b"".join(encoded))
        columns.append(np.array([[len(name), size, label] for name, (_, size) in zip(encoded, found, strict=True)]).T)
    lengths, sizes, labels = np.ascontiguousarray(np.concatenate(columns, axis=1))
    return Files(folder, np.frombuffer(b"".join(blobs), np.uint8), np.cumsum(lengths), sizes, labels)


def _places(top: Path) -> list[Path]:
    """Where a folder's table may lie: beside it, or in the cache of a user who may not write there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "reslab")
    key = hashlib.sha256(os.fsencode(top.resolve())).hexdigest()[:16]
    return [top.parent / f".{top.name}.reslab-files", cache / f"{key}.reslab-files"]


def _keep(files: Files, folders: Folders, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, as several processes may write at once; a crash's half file would fail its SHA-256.
    descriptor, part = tempfile.mkstemp(dir=place.parent, prefix=f"{place.name}.")
    os.close(descriptor)
    try:
        save_file(files.arrays(), part, {"sha256": files.sha256, "folders": json.dumps(folders)})
        Path(part).chmod(0o644)
        Path(part).replace(place)
    finally:
        Path(part).unlink(missing_ok=True)


def _mapped(top: Path, place: Path) -> Files:
    with safe_open(place, "pt") as file:  # torch maps the tensors; numpy's would be copies
        arrays = {name: file.get_tensor(name).numpy() for name in ("names", "ends", "sizes", "labels")}
    return Files(top, **arrays, kept=place)


def _valid(top: Path, place: Path) -> Files | None:
    with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):  # missing, damaged, of another format
        with safe_open(place, "np") as file:
            said = file.metadata()
        files = _mapped(top, place)
        if files.sha256 == said["sha256"] and _unchanged(files, json.loads(said["folders"])):
            return files
    return None


def _unchanged(files: Files, folders: Folders) -> bool:
    some = np.linspace(0, len(files) - 1, SAMPLED).astype(int)
    return all((files.folder / name).stat().st_mtime_ns == at for name, at in folders.items()) and all(
        files.path(i).stat().st_size == files.sizes[i] for i in some
    )
