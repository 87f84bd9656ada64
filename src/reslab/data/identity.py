"""The identity of a run's data: its images, labels, classes and split, as hashes and as a table to compare with."""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reslab.data.datasets import Arrays
from reslab.data.files import Files
from reslab.files import replacing

NAMED = 3  # images that a message names; it counts the others


class ImageTable(NamedTuple):
    """The n images of one split. The images of arrays have no names and sizes: their keys are hashes of their content.

    Attributes:
        keys: uint64 (n,), see `Arrays.keys` and `Files.keys`.
        labels: int64 (n,).
        held_out: bool (n,): used for validation.
        sizes: int64 (n or 0,), bytes per file.
        names: uint8: the relative names of all files, concatenated.
        ends: int64 (n or 0,): where each name ends.
    """

    keys: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    sizes: npt.NDArray[np.int64]
    names: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    def name(self, i: int) -> str:
        """Return the relative name of a file, or the index of an image in memory."""
        if not len(self.ends):
            return f"index {i}"
        start = self.ends[i - 1] if i else 0
        return self.names[start : self.ends[i]].tobytes().decode(errors="replace")

    def shortened(self, rows: Sequence[int] | npt.NDArray[Any]) -> str:
        more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
        return ", ".join(self.name(i) for i in rows[:NAMED]) + more


def image_table(data: Arrays | Files, held_out: npt.NDArray[np.int64]) -> ImageTable:
    """Return the table of a data set; `held_out` holds the indices of its validation images."""
    is_held_out = np.zeros(len(data), bool)
    is_held_out[held_out] = True
    files = (data.sizes, data.names, data.ends) if isinstance(data, Files) else np.empty((3, 0), np.uint8)
    return ImageTable(data.keys, data.labels, is_held_out, *files)


@dataclass(frozen=True, eq=False)
class DataIdentity:
    """What identifies a run's data. `hashes` are kept in the manifest, and all of it in the file data.npz."""

    hashes: Mapping[str, str]  # SHA-256 of the files (or pixels) with their labels, of the split, and of the classes
    classes: Sequence[str]
    tables: Mapping[str, ImageTable]  # "training" and "test"

    def save(self, path: Path) -> None:
        tables = {f"{split}/{name}": x for split, t in self.tables.items() for name, x in t._asdict().items()}
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(file, classes=np.array(self.classes), **tables)

    @classmethod
    def load(cls, path: Path, hashes: Mapping[str, str]) -> "DataIdentity | None":
        """Read the table that belongs to recorded hashes; None if it is missing or damaged."""
        try:
            with np.load(path) as file:
                tables = {s: ImageTable(*(file[f"{s}/{name}"] for name in ImageTable._fields)) for s in SPLITS}
                return cls(hashes, file["classes"].tolist(), tables)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def differs(self, recorded: Mapping[str, str]) -> list[str]:
        """Return the names of the hashes that are not as recorded."""
        return [name for name, digest in self.hashes.items() if recorded.get(name) != digest]

    def changes(self, recorded: Mapping[str, str], table: Path) -> list[str]:
        """Return what has changed since `recorded` (hashes) and `table` (data.npz) were written, one line per kind."""
        different = self.differs(recorded)
        before = DataIdentity.load(table, recorded) if different else None
        if before is None:
            return [f"other {name}: the SHA-256 differs" for name in different]
        lines = [*_class_changes(before.classes, self.classes)]
        for split in SPLITS:
            lines += _changes(split, before, self)
        return lines or [f"other {name}: the images are the same, in another order" for name in different]


SPLITS = ("training", "test")


def identify(train: Arrays | Files, test: Arrays | Files, split: tuple[Any, Any], classes: list[str]) -> DataIdentity:
    """Return the identity of data with a (training, validation) split of `train`."""
    texts = {
        "files": train.sha256 + test.sha256,
        "split": f"{split[0].tolist()} {split[1].tolist()}",
        "classes": "\n".join(classes),
    }
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    nothing = np.empty(0, np.int64)
    return DataIdentity(hashes, classes, {"training": image_table(train, split[1]), "test": image_table(test, nothing)})


def _class_changes(before: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    for names, what in (([c for c in before if c not in now], "gone"), ([c for c in now if c not in before], "new")):
        if names:
            yield f"{_count(len(names), 'class', 'es')} {what}: {', '.join(names[:NAMED])}"
    if sorted(before) == sorted(now) and [*before] != [*now]:
        yield "the classes are in another order"


def _changes(split: str, before: DataIdentity, now: DataIdentity) -> Iterator[str]:
    old, new = before.tables[split], now.tables[split]
    gone = np.flatnonzero(~np.isin(old.keys, new.keys))
    added = np.flatnonzero(~np.isin(new.keys, old.keys))
    moved = _moved(old, gone, new, added)
    gone, added = np.setdiff1d(gone, [*moved]), np.setdiff1d(added, [*moved.values()])
    if len(gone):
        yield f"{_count(len(gone), f'{split} image')} gone: {old.shortened(gone)}"
    if len(added):
        yield f"{_count(len(added), f'{split} image')} new: {new.shortened(added)}"
    if moved:
        pairs = [f"{old.name(i)} -> {new.name(j)}" for i, j in moved.items()]
        more = f" and {len(pairs) - NAMED:,} more" if len(pairs) > NAMED else ""
        yield f"{_count(len(pairs), f'{split} image')} in another class: {', '.join(pairs[:NAMED])}{more}"
    _, i, j = np.intersect1d(old.keys, new.keys, return_indices=True)
    by_name = np.array([now.classes.index(c) if c in now.classes else -1 for c in before.classes])
    for rows, what in (
        (j[by_name[old.labels[i]] != new.labels[j]], "with another label"),
        (j[old.sizes[i] != new.sizes[j]] if len(old.sizes) and len(new.sizes) else j[:0], "of another size in bytes"),
        (j[old.held_out[i] != new.held_out[j]], "moved between training and validation"),
    ):
        if len(rows):
            yield f"{_count(len(rows), f'{split} image')} {what}: {new.shortened(np.sort(rows))}"


def _moved(old: ImageTable, gone: Any, new: ImageTable, added: Any) -> dict[int, int]:
    """Pair files that are gone with new files of the same name and size in another directory."""
    if not (len(old.sizes) and len(new.sizes)):
        return {}
    at = {(PurePosixPath(new.name(j)).name, new.sizes[j]): int(j) for j in added}
    names = ((int(i), (PurePosixPath(old.name(i)).name, old.sizes[i])) for i in gone)
    pairs = {i: at[name] for i, name in names if name in at}
    return pairs if len({*pairs.values()}) == len(pairs) else {}  # names that are not unique cannot be paired


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n:,} {noun}{plural if n != 1 else ''}"
