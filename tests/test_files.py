"""The table of image files: kept on disk, believed only while it is whole and its folder unchanged."""

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from reslab.data import DataError, files
from reslab.data.files import Files, file_table

CLASSES = ["cat", "dog"]


def write(path: Path, size: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def settle(top: Path) -> None:
    """Makes all folders look as if they had not changed for an hour."""
    for folder in (top, *filter(Path.is_dir, top.rglob("*"))):
        before = folder.stat().st_mtime - 3600
        os.utime(folder, (before, before))


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pets/train with ten files in each of two classes, some in a deeper folder; tables of any size are kept."""
    monkeypatch.setattr(files, "CACHE_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    top = tmp_path / "pets" / "train"
    for name in CLASSES:
        for i in range(10):
            write(top / name / ("young" if i > 6 else "") / f"größe {i}.JPEG", size=i + 1)
    settle(top)
    return top


def rows(table: Files) -> list[tuple[str, int, int]]:
    return [(table.name(i), int(table.sizes[i]), int(table.labels[i])) for i in range(len(table))]


def listings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Collects the folders that are listed from now on."""
    seen: list[Path] = []
    listed = files._list_files
    monkeypatch.setattr(files, "_list_files", lambda top, classes: seen.append(top) or listed(top, classes))
    return seen


def test_a_kept_table_is_the_listed_one(top, monkeypatch):
    seen = listings(monkeypatch)
    first, second = file_table(top, CLASSES), file_table(top, CLASSES)
    assert seen == [top]
    expected = [(f"{c}/{d}größe {i}.JPEG", i + 1, n) for n, c in enumerate(CLASSES) for d, i in _places_of_ten()]
    assert rows(first) == rows(second) == expected
    assert first.sha256 == second.sha256
    assert second.path(0) == top / "cat/größe 0.JPEG"


def _places_of_ten() -> list[tuple[str, int]]:
    return [("", i) for i in range(7)] + [("young/", i) for i in range(7, 10)]


def test_small_folders_are_listed_every_time_and_leave_nothing_behind(top, monkeypatch):
    monkeypatch.setattr(files, "CACHE_FROM", 21)
    seen = listings(monkeypatch)
    file_table(top, CLASSES), file_table(top, CLASSES)
    assert seen == [top, top]
    assert [path.name for path in top.parent.iterdir()] == ["train"]


CHANGES = {
    "added": lambda top: write(top / "cat" / "new.jpg"),
    "added deep down": lambda top: write(top / "dog" / "young" / "new.jpg"),
    "removed": lambda top: (top / "dog" / "größe 1.JPEG").unlink(),
    "renamed": lambda top: (top / "dog" / "größe 1.JPEG").rename(top / "dog" / "size 1.JPEG"),
    "folder removed": lambda top: [path.unlink() for path in (top / "cat/young").iterdir()],
    "overwritten": lambda top: write(top / "cat" / "größe 4.JPEG", size=99),
    "folder added": lambda top: write(top / "cow" / "new.jpg"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(top, monkeypatch, change):
    file_table(top, CLASSES)
    CHANGES[change](top)
    seen = listings(monkeypatch)
    classes = sorted(path.name for path in top.iterdir())
    changed = file_table(top, classes)
    assert seen == [top]
    monkeypatch.setattr(files, "CACHE_FROM", 10**6)
    for place in files._cache_paths(top):
        place.unlink(missing_ok=True)
    assert rows(changed) == rows(file_table(top, classes))


DAMAGE = {
    "cut": lambda content: content[:-7],
    "empty": lambda content: b"",
    "another file": lambda content: b"PK\x03\x04" + bytes(500),
    "one bit": lambda content: content[:-3] + bytes([content[-3] ^ 4]) + content[-2:],
    "no state": lambda content: content.replace(b'"folders"', b'"folderz"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_made_again(top, monkeypatch, damage):
    whole = rows(file_table(top, CLASSES))
    place = files._cache_paths(top)[0]
    place.write_bytes(DAMAGE[damage](place.read_bytes()))
    seen = listings(monkeypatch)
    assert rows(file_table(top, CLASSES)) == rows(file_table(top, CLASSES)) == whole
    assert seen == [top]


def test_a_folder_that_changes_right_now_is_not_trusted_to_stay(top, monkeypatch):
    write(top / "cat" / "new.jpg")
    seen = listings(monkeypatch)
    file_table(top, CLASSES), file_table(top, CLASSES)
    assert seen == [top, top]


def test_where_the_data_may_not_be_written_the_users_cache_keeps_the_table(top, tmp_path, monkeypatch):
    files._cache_paths(top)[0].mkdir()  # in the way of the table, as missing permissions are (but for root)
    seen = listings(monkeypatch)
    assert rows(file_table(top, CLASSES)) == rows(file_table(top, CLASSES))
    assert seen == [top]
    assert len([*(tmp_path / "cache" / "reslab").iterdir()]) == 1


def test_a_process_is_given_the_kept_tables_name_not_its_content(top, monkeypatch):
    kept = file_table(top, CLASSES)
    assert len(pickle.dumps(kept)) < 500
    assert rows(pickle.loads(pickle.dumps(kept))) == rows(kept)
    monkeypatch.setattr(files, "CACHE_FROM", 21)
    files._cache_paths(top)[0].unlink()
    assert rows(pickle.loads(pickle.dumps(file_table(top, CLASSES)))) == rows(kept)


def _keep_often(table: Files, folders: files.ModificationTimes, place: Path) -> None:
    for _ in range(30):
        files._write_cache(table, folders, place)


def test_several_processes_may_keep_a_table_at_once(top):
    table, folders = files._list_files(top, CLASSES)
    place = files._cache_paths(top)[0]
    files._write_cache(table, folders, place)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_keep_often, args=(table, folders, place)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = files._read_cache(top, place)
        assert found is not None and rows(found) == rows(table)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert sorted(path.name for path in top.parent.iterdir()) == [place.name, "train"]


def test_a_link_to_nowhere_is_named(top):
    (top / "cat" / "lost.jpg").symlink_to(top / "nowhere.jpg")
    with pytest.raises(DataError, match=r"cat/lost\.jpg cannot be read \(No such file"):
        file_table(top, CLASSES)
