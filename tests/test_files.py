"""The file table: cached on disk, used only while it is undamaged and its directory unchanged."""

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from reslab.data import DataError, files
from reslab.data.files import Files, Skipped, Walk, file_table

CLASSES = ["cat", "dog"]


def write(path: Path, size: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def age(top: Path) -> None:
    """Set all modification times of directories back by an hour."""
    for folder in (top, *filter(Path.is_dir, top.rglob("*"))):
        before = folder.stat().st_mtime - 3600
        os.utime(folder, (before, before))


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pets/train with ten files in each of two classes, some in a subdirectory; tables of any size are cached."""
    monkeypatch.setattr(files, "CACHE_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    top = tmp_path / "pets" / "train"
    for name in CLASSES:
        for i in range(10):
            write(top / name / ("young" if i > 6 else "") / f"größe {i}.JPEG", size=i + 1)
    age(top)
    return top


def rows(table: Files) -> list[tuple[str, int, int]]:
    return [(table.name(i), int(table.sizes[i]), int(table.labels[i])) for i in range(len(table))]


def listings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that receives the directories listed from now on."""
    listed: list[Path] = []
    original = files._list_files
    monkeypatch.setattr(files, "_list_files", lambda top, classes: listed.append(top) or original(top, classes))
    return listed


def test_cached_table_equals_the_listed_one(top, monkeypatch):
    listed = listings(monkeypatch)
    first, second = file_table(top, CLASSES), file_table(top, CLASSES)
    assert listed == [top]
    expected = [
        (f"{c}/{d}größe {i}.JPEG", i + 1, n) for n, c in enumerate(CLASSES) for d, i in _subdirectories_of_ten()
    ]
    assert rows(first) == rows(second) == expected
    assert first.sha256 == second.sha256
    assert second.path(0) == top / "cat/größe 0.JPEG"


def _subdirectories_of_ten() -> list[tuple[str, int]]:
    return [("", i) for i in range(7)] + [("young/", i) for i in range(7, 10)]


def test_small_directories_are_not_cached(top, monkeypatch):
    monkeypatch.setattr(files, "CACHE_FROM", 21)
    listed = listings(monkeypatch)
    file_table(top, CLASSES), file_table(top, CLASSES)
    assert listed == [top, top]
    assert [path.name for path in top.parent.iterdir()] == ["train"]


CHANGES = {
    "added": lambda top: write(top / "cat" / "new.jpg"),
    "added deep down": lambda top: write(top / "dog" / "young" / "new.jpg"),
    "removed": lambda top: (top / "dog" / "größe 1.JPEG").unlink(),
    "renamed": lambda top: (top / "dog" / "größe 1.JPEG").rename(top / "dog" / "size 1.JPEG"),
    "directory emptied": lambda top: [path.unlink() for path in (top / "cat/young").iterdir()],
    "overwritten": lambda top: write(top / "cat" / "größe 4.JPEG", size=99),
    "directory added": lambda top: write(top / "cow" / "new.jpg"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(top, monkeypatch, change):
    file_table(top, CLASSES)
    CHANGES[change](top)
    listed = listings(monkeypatch)
    classes = sorted(path.name for path in top.iterdir())
    changed = file_table(top, classes)
    assert listed == [top]
    monkeypatch.setattr(files, "CACHE_FROM", 10**6)
    for path in files._cache_paths(top):
        path.unlink(missing_ok=True)
    assert rows(changed) == rows(file_table(top, classes))


DAMAGE = {
    "cut": lambda content: content[:-7],
    "empty": lambda content: b"",
    "another file": lambda content: b"PK\x03\x04" + bytes(500),
    "one bit": lambda content: content[:-3] + bytes([content[-3] ^ 4]) + content[-2:],
    "an identity": lambda content: content[:-100] + bytes([content[-100] ^ 4]) + content[-99:],
    "another version": lambda content: content.replace(b'"skipped"', b'"skippen"'),
    "no state": lambda content: content.replace(b'"folders"', b'"folderz"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_replaced(top, monkeypatch, damage):
    expected = rows(file_table(top, CLASSES))
    path = files._cache_paths(top)[0]
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    listed = listings(monkeypatch)
    assert rows(file_table(top, CLASSES)) == rows(file_table(top, CLASSES)) == expected
    assert listed == [top]


def test_cache_of_an_earlier_version_is_replaced(top, monkeypatch):
    expected = file_table(top, CLASSES)
    columns = {name: expected.arrays()[name] for name in ("names", "ends", "sizes", "labels")}
    path = files._cache_paths(top)[0]
    metadata = {"sha256": expected.sha256, "folders": "{}"}
    save_file(columns, path, metadata)
    listed = listings(monkeypatch)
    assert np.array_equal(file_table(top, CLASSES).keys, expected.keys)
    assert np.array_equal(file_table(top, CLASSES).pictures, expected.pictures)
    assert listed == [top]


def test_directory_modified_within_the_last_second_is_not_cached(top, monkeypatch):
    write(top / "cat" / "new.jpg")
    listed = listings(monkeypatch)
    file_table(top, CLASSES), file_table(top, CLASSES)
    assert listed == [top, top]


def test_user_cache_is_used_beside_unwritable_data(top, tmp_path, monkeypatch):
    files._cache_paths(top)[0].mkdir()  # blocks the file as missing permissions would, also for root
    listed = listings(monkeypatch)
    assert rows(file_table(top, CLASSES)) == rows(file_table(top, CLASSES))
    assert listed == [top]
    assert len([*(tmp_path / "cache" / "reslab").iterdir()]) == 1


def test_cached_table_is_pickled_as_a_path(top, monkeypatch):
    cached = file_table(top, CLASSES)
    assert len(pickle.dumps(cached)) < 500
    assert rows(pickle.loads(pickle.dumps(cached))) == rows(cached)
    monkeypatch.setattr(files, "CACHE_FROM", 21)
    files._cache_paths(top)[0].unlink()
    assert rows(pickle.loads(pickle.dumps(file_table(top, CLASSES)))) == rows(cached)


def _write_often(table: Files, times: files.ModificationTimes, path: Path) -> None:
    for _ in range(30):
        files._write_cache(table, times, path)


def test_several_processes_can_write_a_cache_at_once(top):
    table, times = files._list_files(top, CLASSES)
    path = files._cache_paths(top)[0]
    files._write_cache(table, times, path)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(table, times, path)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        cached = files._read_cache(top, path)
        assert cached is not None and rows(cached) == rows(table)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert sorted(file.name for file in top.parent.iterdir()) == [path.name, "train"]


def test_images_are_sorted_depth_first_without_hidden_ones(tmp_path):
    names = ["a-.png", "a/0.JPG", "a/b/1.png", "a/b-.png", "a0.png", "Z.webp"]
    hidden = [".3.png", ".thumbnails/2.png", "__MACOSX/a/0.JPG", "a/._0.jpg", "a/@eaDir/0.JPG/thumb.jpg"]
    ignored = ["a/notes.txt", "b.gif", "c.HEIC", "d.heic", "png", ".hidden.txt", ".git/config"]
    for name in [*names, *hidden, *ignored]:
        write(tmp_path / name)
    walk = Walk(tmp_path)
    assert list(walk.images()) == sorted(names)
    assert walk.times == {name: (tmp_path / name).stat().st_mtime_ns for name in ("", "a/", "a/b/")}
    assert walk.skipped == Skipped(5, ".3.png", types={".txt": 1, ".gif": 1, ".heic": 2, "": 1})
    assert list(Walk(tmp_path).images("a/b/")) == ["a/b/1.png"]
    with pytest.raises(DataError, match=r"nowhere cannot be listed \(No such file"):
        next(Walk(tmp_path / "nowhere").images())


LOOPS = {
    "parent": ("cat/loop", ".."),
    "itself": ("cat/loop", "."),
    "grandparent": ("cat/young/loop", "../.."),
    "far above": ("cat/loop", "../../.."),
    "root": ("cat/loop", "/"),
    "no target": ("cat/loop", "loop"),
    "no target, image": ("cat/loop.jpg", "loop.jpg"),
    "class": ("cow", ".."),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loop_of_links_is_named(top, loop):
    link, target = LOOPS[loop]
    (top / link).symlink_to(target)
    for walk in (lambda: list(Walk(top).images()), lambda: file_table(top, Walk(top).directories())):
        with pytest.raises(
            DataError, match=rf"{link}/? (is a symbolic link to a dir|cannot be listed \(Too many levels)"
        ):
            walk()


def test_links_to_other_directories_are_followed(top):
    (top / "cow").symlink_to(top.parent / "cows")
    write(top.parent / "cows" / "1.jpg")
    (top / "cat" / "more").symlink_to(top / "dog")
    table = file_table(top, [*CLASSES, "cow"])
    assert np.bincount(table.labels).tolist() == [20, 10, 1]


def test_skipped_files_are_counted_also_by_a_cached_table(top, monkeypatch):
    for name in (
        ".DS_Store",
        "0.jpg",
        "cat/.ipynb_checkpoints/1.jpg",
        "cat/.1.jpg",
        "cat/1.gif",
        "dog/a/2.GIF",
        "cow/1.jpg",
    ):
        write(top / name)
    age(top)
    listed = listings(monkeypatch)
    first, second = file_table(top, CLASSES), file_table(top, CLASSES)
    assert listed == [top]
    assert len(first) == 20
    assert first.skipped == second.skipped == Skipped(2, "cat/.1.jpg", 2, "0.jpg", {".gif": 2})
    assert first.skipped.notes()[:2] == [
        "hidden images and directories skipped: 2, such as cat/.1.jpg",
        "images and directories outside of the classes: 2, such as 0.jpg",
    ]
    assert first.skipped.notes()[2].startswith("other files ignored: 2 .gif (image types: .jpg, ")


def test_class_with_ignored_types_only_names_them(top):
    write(top / "cow" / "1.heic")
    with pytest.raises(DataError, match=r"cow contains no images .*; other files ignored: 1 \.heic"):
        file_table(top, [*CLASSES, "cow"])


def test_keys_depend_on_the_relative_name_only(top, tmp_path):
    table = file_table(top, CLASSES)
    assert np.array_equal(table.keys, file_table(top, CLASSES).keys)
    moved = top.rename(tmp_path / "elsewhere")
    write(moved / "cat" / "new.jpg")
    age(moved)
    keys = dict(zip(map(Files.name, [table] * 20, range(20)), table.keys.tolist(), strict=True))
    other = file_table(moved, CLASSES)
    assert {name: key for i, key in enumerate(other.keys.tolist()) if (name := other.name(i)) in keys} == keys
    assert len({*other.keys.tolist()}) == 21
    assert (
        keys["cat/größe 0.JPEG"] == 9505742868478164715
    )  # fixed: a change moves images between training and validation


def test_file_names_that_are_not_utf8_are_read(top):
    name = os.fsdecode(b"cat/caf\xe9.jpg")
    write(top / name)
    names = [row[0] for row in rows(file_table(top, CLASSES))]
    assert name in names


def test_dangling_symlink_is_named(top):
    (top / "cat" / "lost.jpg").symlink_to(top / "nowhere.jpg")
    with pytest.raises(DataError, match=r"cat/lost\.jpg cannot be read \(No such file"):
        file_table(top, CLASSES)
