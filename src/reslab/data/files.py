"""Image files on disk: one walk over a directory, and the file table of a data set.

Listing a million files takes minutes on some file systems, so the table of a large directory is cached: beside it or,
if that is not writable, in the user's cache. All processes of a run share one copy, mapped into memory.

A cached table is used only if its SHA-256 matches, no directory has another modification time (adding, removing or
renaming a file changes it), and a thousand files, spread over the table, still have their sizes. A file that is
overwritten in place can go unnoticed: delete the cached table in that case.
"""

import hashlib
import json
import os
import secrets
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torchvision.datasets.folder import IMG_EXTENSIONS as IMG_EXTENSIONS

from reslab.errors import UserError

CACHE_FROM = 20_000  # files; listing fewer takes less than a second
SAMPLED = 1000  # files whose sizes are compared with a cached table
ModificationTimes = dict[str, int]  # of directories: relative name -> ns


class DataError(UserError):
    """Data are missing, damaged, or not what the config says."""

    def __init__(self, message: str) -> None:
        # An error in a DataLoader worker arrives as its whole traceback in one string: keep the message at its end.
        super().__init__(message.rpartition("DataError: ")[2].strip())


@dataclass(frozen=True, eq=False)
class Files:
    """A table of n image files below `folder`, as arrays instead of a million strings."""

    folder: Path
    names: npt.NDArray[np.uint8]  # all relative names, concatenated
    ends: npt.NDArray[np.int64]  # (n,): where each name ends
    sizes: npt.NDArray[np.int64]  # (n,), bytes
    labels: npt.NDArray[np.int64]  # (n,)
    cache: Path | None = None  # the file that the arrays are mapped from, if any

    def __len__(self) -> int:
        return len(self.ends)

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned worker gets the path of the mapped file, not its content.
        if self.cache is not None:
            return _map_cache, (self.folder, self.cache)
        return Files, (self.folder, *self.arrays().values())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"names": self.names, "ends": self.ends, "sizes": self.sizes, "labels": self.labels}

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())

    def path(self, index: int) -> Path:
        return self.folder / self.name(index)

    @cached_property
    def keys(self) -> npt.NDArray[np.uint64]:
        """One hash per image of its relative name, uint64 (n,)."""
        names = (os.fsencode(self.name(i)) for i in range(len(self)))
        return np.frombuffer(b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names), np.uint64)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of names, sizes and labels; hashing the content of a million files would take minutes."""
        digest = hashlib.sha256()
        for column in self.arrays().values():
            digest.update(column.data)
        return digest.hexdigest()


def image_names(top: Path, prefix: str = "", times: ModificationTimes | None = None) -> Iterator[str]:
    """Yield the relative names of all image files below `top / prefix` in sorted order.

    An image file has one of IMG_EXTENSIONS, in upper or lower case, and does not start with a dot. Each directory is
    listed when it is reached; only the listings of the directories on the way to the current file are in memory.
    `prefix` is "" or ends with a slash. `times` receives the modification time of every directory.

    Raises:
        DataError: A directory cannot be listed.
    """
    directory = top / prefix
    try:
        if times is not None:
            times[prefix] = directory.stat().st_mtime_ns  # before listing: a change during it must be noticed
        with os.scandir(directory) as entries:
            # With the slash, names sort as the whole relative names do: "a-.png" before "a/0.png".
            names = sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in entries)
    except OSError as error:
        raise DataError(f"{directory} cannot be listed ({error.strerror})") from error
    for name in names:
        if name.endswith("/"):
            yield from image_names(top, prefix + name, times)
        elif name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".":
            yield prefix + name


def file_table(top: Path, classes: list[str]) -> Files:
    """Return the image files in one directory per class, sorted within each; from the cache if that is valid.

    Raises:
        DataError: A class has no images, or files are empty or cannot be read.
    """
    paths = _cache_paths(top)
    for path in paths:
        if (files := _read_cache(top, path)) is not None:
            return files
    start = time.time_ns()
    files, times = _list_files(top, classes)
    # A directory modified within the last second may change again without a new modification time.
    if len(files) >= CACHE_FROM and max(times.values()) < start - 10**9:
        for path in paths:
            with suppress(OSError):
                _write_cache(files, times, path)
                return _map_cache(top, path)
    return files


def _list_files(top: Path, classes: list[str]) -> tuple[Files, ModificationTimes]:
    times = {"": top.stat().st_mtime_ns}
    names, ends, sizes, labels = bytearray(), array("q"), array("q"), array("q")
    for label, folder in enumerate(classes):
        for image in image_names(top, f"{folder}/", times):
            try:
                sizes.append(os.stat(f"{top}/{image}").st_size)  # noqa: PTH116 - pathlib takes minutes for a million files
            except OSError as error:  # such as a dangling symlink
                raise DataError(f"{top / image} cannot be read ({error.strerror}): restore or remove it") from None
            names += os.fsencode(image)
            ends.append(len(names))
            labels.append(label)
        if not labels or labels[-1] != label:
            raise DataError(f"{top / folder} contains no images ({', '.join(IMG_EXTENSIONS)}): add some or remove it")
    files = Files(top, np.frombuffer(names, np.uint8), np.array(ends), np.array(sizes), np.array(labels))
    empty = np.flatnonzero(files.sizes == 0)
    if len(empty):
        raise DataError(
            f"{len(empty)} image files are empty (0 bytes), the first is {files.path(empty[0])}: restore or remove them"
        )
    return files, times


def _cache_paths(top: Path) -> list[Path]:
    """Return the two places for a cached table: beside the directory, and in the user's cache."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "reslab")
    key = hashlib.sha256(os.fsencode(top.resolve())).hexdigest()[:16]
    return [top.parent / f".{top.name}.reslab-files", user_cache / f"{key}.reslab-files"]


def _write_cache(files: Files, times: ModificationTimes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique name, because several processes may write at once.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        save_file(files.arrays(), temporary, {"sha256": files.sha256, "folders": json.dumps(times)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _map_cache(top: Path, path: Path) -> Files:
    with safe_open(path, "pt") as file:  # torch maps the tensors into memory; numpy would copy them
        arrays = {name: file.get_tensor(name).numpy() for name in ("names", "ends", "sizes", "labels")}
    return Files(top, **arrays, cache=path)


def _read_cache(top: Path, path: Path) -> Files | None:
    with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):  # missing, damaged, another format
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        files, times = _map_cache(top, path), json.loads(metadata["folders"])
        sample = np.linspace(0, len(files) - 1, SAMPLED).astype(int)
        if (
            files.sha256 == metadata["sha256"]
            and all((top / name).stat().st_mtime_ns == ns for name, ns in times.items())
            and all(files.path(i).stat().st_size == files.sizes[i] for i in sample)
        ):
            return files
    return None
