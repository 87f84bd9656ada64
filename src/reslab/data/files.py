"""Image files on disk: one walk over a directory tree, and the file table of a data set.

The walk reads files with one of IMG_EXTENSIONS, in upper or lower case. It skips whatever is hidden (its name starts
with a dot, or it is one of SYSTEM_DIRECTORIES), and records what it skips and the types of files that it ignores.

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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
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
DEVICE = np.uint64(0x9E3779B97F4A7C15)  # see Files.pictures
Identity = tuple[int, int]  # device and inode of a directory
ModificationTimes = dict[str, int]  # of directories: relative name -> ns
SYSTEM_DIRECTORIES = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # macOS archives, Synology thumbnails, Windows
COLUMNS = ("names", "ends", "sizes", "labels", "keys", "pictures")  # of Files
IMAGE_TYPES = ", ".join(IMG_EXTENSIONS)


class DataError(UserError):
    """Data are missing, damaged, or not what the config says."""

    def __init__(self, message: str) -> None:
        # An error in a DataLoader worker arrives as its whole traceback in one string: keep the message at its end.
        super().__init__(printable(message.rpartition("DataError: ")[2].strip()))


def printable(text: str) -> str:
    """Return text that can be encoded as UTF-8: bytes of a file name that are not UTF-8 are written as \\xe9."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace").decode()


@dataclass
class Skipped:
    """What a walk skipped or ignored, with the name of the first one of each kind."""

    hidden: int = 0  # image files, and directories that contain some
    first_hidden: str = ""
    outside: int = 0  # image files and directories beside those of the classes
    first_outside: str = ""
    types: dict[str, int] = field(default_factory=dict)  # number of files that are no images, by lower-case extension

    def notes(self) -> list[str]:
        """Return a line for each kind of skipped files."""
        lines = []
        if self.hidden:
            lines.append(f"hidden images and directories skipped: {self.hidden:,}, such as {self.first_hidden}")
        if self.outside:
            lines.append(
                f"images and directories outside of the classes: {self.outside:,}, such as {self.first_outside}"
            )
        if self.types:
            types = (f"{count:,} {kind or 'without an extension'}" for kind, count in sorted(self.types.items()))
            lines.append(f"other files ignored: {', '.join(types)} (image types: {IMAGE_TYPES})")
        return lines


@dataclass(frozen=True, eq=False)
class Files:
    """A table of n image files below `folder`, as arrays instead of a million strings."""

    folder: Path
    names: npt.NDArray[np.uint8]  # all relative names, concatenated
    ends: npt.NDArray[np.int64]  # (n,): where each name ends
    sizes: npt.NDArray[np.int64]  # (n,), bytes
    labels: npt.NDArray[np.int64]  # (n,)
    keys: npt.NDArray[np.uint64]  # (n,), hashes of the names: the identities of the images in the data set
    pictures: npt.NDArray[np.uint64]  # (n,), from device and inode: equal if two names are links to one file
    skipped: Skipped
    cache: Path | None = None  # the file that the arrays are mapped from, if any

    def __len__(self) -> int:
        return len(self.ends)

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned worker gets the path of the mapped file, not its content.
        if self.cache is not None:
            return _map_cache, (self.folder, self.cache)
        return Files, (self.folder, *self.arrays().values(), self.skipped)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {name: getattr(self, name) for name in COLUMNS}

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())

    def path(self, index: int) -> Path:
        return self.folder / self.name(index)

    def describe(self, index: int) -> str:
        return str(self.path(index))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of names, sizes and labels; hashing the content of a million files would take minutes."""
        return _digest(self, COLUMNS[:4])


def _digest(files: Files, columns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(getattr(files, column).data)
    return digest.hexdigest()


class Walk:
    """A walk over the image files below a directory.

    Attributes:
        times: Modification times in ns of the directories listed so far, by relative name.
        skipped: What was skipped so far.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self.times: dict[str, int] = {}
        self.skipped = Skipped()

    def images(self, prefix: str = "", above: frozenset[Identity] = frozenset()) -> Iterator[str]:
        """Yield the relative names of all image files below `top / prefix` in sorted order.

        Each directory is listed when it is reached; only the listings of the directories on the way to the current file
        are in memory. `prefix` is "" or ends with a slash; `above` are the directories that contain it.

        Raises:
            DataError: A directory cannot be listed, or links form a loop.
        """
        names, above = self._list(prefix, above or self._above(prefix))
        for name in names:
            if name.endswith("/"):
                yield from self.images(prefix + name, above)
            else:
                yield prefix + name

    def directories(self) -> list[str]:
        """Return the sorted names of the directories in `top`."""
        return [name[:-1] for name in self._list("", self._above(""))[0] if name.endswith("/")]

    def record_outside(self, classes: list[str]) -> None:
        """Record the image files and directories in `top` that belong to no class."""
        inside = {name.partition("/")[0] + "/" for name in classes}
        outside = [name for name in self._list("", self._above(""))[0] if name not in inside]
        self.skipped.outside, self.skipped.first_outside = len(outside), min(outside, default="")

    def _above(self, prefix: str) -> frozenset[Identity]:
        top = Path(os.path.realpath(self.top))
        with suppress(OSError):
            return frozenset(_identity(path.stat()) for path in (*top.parents, *([top] if prefix else [])))
        return frozenset()

    def _list(self, prefix: str, above: frozenset[Identity]) -> tuple[list[str], frozenset[Identity]]:
        """Return the sorted names to visit in a directory, directories with a slash, and `above` with itself."""
        directory, names = self.top / prefix, list[str]()
        try:
            status = directory.stat()  # before listing: a change during it must be noticed
            if _identity(status) in above:
                raise DataError(f"{directory} is a symbolic link to a directory that contains it: remove the link")
            self.times[prefix] = status.st_mtime_ns
            with os.scandir(directory) as entries:
                for entry in entries:
                    name, is_directory = entry.name, entry.is_dir()
                    if name[0] == "." or name in SYSTEM_DIRECTORIES:
                        self._record_hidden(prefix + name, entry.path if is_directory else None)
                    elif is_directory:
                        names.append(name + "/")  # so that names sort as the whole relative names do: "a-" before "a/0"
                    elif name.lower().endswith(IMG_EXTENSIONS):
                        names.append(name)
                    else:
                        kind = os.path.splitext(name)[1].lower()  # noqa: PTH122 - there may be a million
                        self.skipped.types[kind] = self.skipped.types.get(kind, 0) + 1
        except OSError as error:
            raise DataError(f"{error.filename or directory} cannot be listed ({error.strerror})") from error
        return sorted(names), above | {_identity(status)}

    def _record_hidden(self, name: str, directory: str | None) -> None:
        if name.lower().endswith(IMG_EXTENSIONS) if directory is None else _contains_images(directory):
            self.skipped.hidden += 1
            self.skipped.first_hidden = min(self.skipped.first_hidden or name, name)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _contains_images(directory: str) -> bool:
    return any(name.lower().endswith(IMG_EXTENSIONS) for _, _, names in os.walk(directory) for name in names)


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
    walk = Walk(top)
    walk.record_outside(classes)
    names, keys = bytearray(), bytearray()
    lengths, counts, numbers = array("q"), array("q"), (array("q"), array("Q"), array("Q"))
    for folder in classes:
        images = [os.fsencode(image) for image in walk.images(f"{folder}/")]
        if not images:
            ignored = "; ".join(["", *walk.skipped.notes()])
            raise DataError(f"{top / folder} contains no images ({IMAGE_TYPES}): add some or remove it{ignored}")
        names += b"".join(images)
        keys += b"".join([blake2b(image, digest_size=8).digest() for image in images])
        lengths.extend(map(len, images))
        counts.append(len(images))
        _stat(top, images, *numbers)
    sizes, inodes, devices = map(np.array, numbers)
    labels = np.repeat(np.arange(len(classes)), counts)
    columns = np.cumsum(lengths), sizes, labels, np.frombuffer(keys, "<u8"), inodes ^ devices * DEVICE
    files = Files(top, np.frombuffer(names, np.uint8), *columns, walk.skipped)
    empty = np.flatnonzero(files.sizes == 0)
    if len(empty):
        raise DataError(
            f"{len(empty)} image files are empty (0 bytes), the first is {files.path(empty[0])}: restore or remove them"
        )
    return files, walk.times


def _stat(top: Path, names: list[bytes], sizes: "array[int]", inodes: "array[int]", devices: "array[int]") -> None:
    """Append the size, inode and device of each file; a loop without pathlib, which takes minutes for a million."""
    directory = os.open(top, os.O_RDONLY)
    try:
        for name in names:
            status = os.stat(name, dir_fd=directory)
            sizes.append(status.st_size)
            inodes.append(status.st_ino)
            devices.append(status.st_dev)
    except OSError as error:  # such as a dangling symlink
        raise DataError(f"{top / os.fsdecode(name)} cannot be read ({error.strerror}): restore or remove it") from None
    finally:
        os.close(directory)


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
        metadata = {"sha256": files.sha256, "identities": _digest(files, COLUMNS[4:])}
        metadata |= {"folders": json.dumps(times), "skipped": json.dumps(asdict(files.skipped))}
        save_file(files.arrays(), temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _map_cache(top: Path, path: Path) -> Files:
    with safe_open(path, "pt") as file:  # torch maps the tensors into memory; numpy would copy them
        arrays = {name: file.get_tensor(name).numpy() for name in COLUMNS}
        skipped = Skipped(**json.loads(file.metadata()["skipped"]))
    return Files(top, **arrays, skipped=skipped, cache=path)


def _read_cache(top: Path, path: Path) -> Files | None:
    with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):  # missing, damaged, another format
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        files, times = _map_cache(top, path), json.loads(metadata["folders"])
        sample = np.linspace(0, len(files) - 1, SAMPLED).astype(int)
        if (
            files.sha256 == metadata["sha256"]
            and _digest(files, COLUMNS[4:]) == metadata["identities"]
            and all((top / name).stat().st_mtime_ns == ns for name, ns in times.items())
            and all(files.path(i).stat().st_size == files.sizes[i] for i in sample)
        ):
            return files
    return None
