"""The data are part of a run's identity: on other data a run is neither resumed, verified, reproduced nor compared."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reslab.data.datasets import Arrays
from reslab.data.identity import DataIdentity, identify
from runner import DIGITS, SHORT, TRAINING, Ended, Fault, manifest, reslab, traces

CLASSES = ("cat", "dog", "fox")
FILES = [
    "--data.dataset.class_path=ImageFolder", "--data.dataset.init_args.folder=.", "--data.dataset.mean=[0.3]",
    "--data.dataset.std=[0.4]", "--data.dataset.image_size=8", "--data.batch_size=8", "--data.val_split=6",
    "--data.num_workers=0",
]  # fmt: skip


def fit(folder: Path, root: Path, *options: str, **kwargs: Any) -> Ended:
    return reslab("fit", *DIGITS, *SHORT, *FILES, f"--data.root={root}", "--run.dir", folder, *options, **kwargs)


def draw_digits(top: Path) -> Path:
    """{train,val}/{cat,dog,fox}: 20 and 4 pictures each."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    for label, name in enumerate(CLASSES):
        for i, image in enumerate(pixels[labels == label][:24]):
            file = top / ("train" if i < 20 else "val") / name / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype(np.uint8).reshape(8, 8)).save(file)
    return top


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_digits(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    ended = fit(folder, pictures)
    assert ended.status == 0, ended.output
    return folder


@pytest.fixture(scope="module")
def stopped(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert fit(folder, pictures, fault=Fault(TRAINING, "terminate", 8)).status == 75
    return folder


def remove_three(root: Path) -> None:
    for i in range(3):
        (root / f"train/dog/{i:02}.png").unlink()


def move_one(root: Path) -> None:
    (root / "train/cat/05.png").rename(root / "train/dog/05b.png")
    (root / "train/dog/05b.png").rename(root / "train/fox/cat05.png")


def move_under_its_name(root: Path) -> None:
    (root / "train/cat/05.png").rename(root / "train/cat/x05.png")
    shutil.copy(root / "train/cat/x05.png", root / "train/dog/x05.png")


def add_one(root: Path) -> None:
    shutil.copy(root / "val/fox/20.png", root / "train/fox/99.png")


def replace_one(root: Path) -> None:
    with (root / "train/fox/07.png").open("ab") as file:
        file.write(b"more")


def remove_test_image(root: Path) -> None:
    (root / "val/cat/21.png").unlink()


def rename_class(root: Path) -> None:
    for part in ("train", "val"):
        (root / part / "fox").rename(root / part / "fax")


def add_class(root: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(root / part / "fox", root / part / "ant")


CHANGES: dict[Callable[[Path], None], str] = {
    remove_three: "3 training images gone: dog/00.png, dog/01.png, dog/02.png",
    move_one: "1 training image gone: cat/05.png",
    move_under_its_name: "1 training image gone: cat/05.png",
    add_one: "1 training image new: fox/99.png",
    replace_one: "1 training image of another size in bytes: fox/07.png",
    remove_test_image: "1 test image gone: cat/21.png",
    rename_class: "1 class gone: fox",
    add_class: "1 class new: ant",
}


@pytest.fixture
def changed_pictures(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_stopped_run_refuses_other_data_and_stays_as_it_is(
    stopped: Path, changed_pictures: Path, change: Callable[[Path], None]
) -> None:
    change(changed_pictures)
    before = contents(stopped)
    ended = fit(stopped, changed_pictures)
    assert ended.status == 2 and "Traceback" not in ended.output
    assert CHANGES[change] in ended.output and "--run.allow_data_change true" in ended.output
    assert ended.output.count(CHANGES[change]) == 1, "one message"
    assert contents(stopped) == before


def test_run_resumes_on_restored_data_with_the_same_bits(
    stopped: Path, finished: Path, pictures: Path, changed_pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    remove_three(changed_pictures)
    assert fit(folder, changed_pictures).status == 2
    ended = fit(folder, pictures)  # another root: the same data
    assert ended.status == 0 and "resuming at step 8" in ended.output
    assert traces(folder) == traces(finished)


def test_allowed_change_is_recorded_and_fails_verification(
    stopped: Path, changed_pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    remove_three(changed_pictures)
    assert fit(folder, changed_pictures, "--run.allow_data_change=true").status == 0
    first, second = manifest(folder)["attempts"]
    assert "data_change" not in first and second["data_change"][0] == CHANGES[remove_three]
    ended = reslab("verify", folder, f"--data.root={changed_pictures}")
    assert ended.status == 1 and "data: constant" in ended.output and CHANGES[remove_three] in ended.output


@pytest.mark.parametrize("change", [remove_three, rename_class, replace_one], ids=lambda change: change.__name__)
def test_verify_and_reproduce_name_the_data(
    finished: Path, changed_pictures: Path, change: Callable[[Path], None]
) -> None:
    change(changed_pictures)
    options = [finished, f"--data.root={changed_pictures}"]
    for command, status in (("verify", 1), ("reproduce", 2)):
        ended = reslab(command, *options)
        assert ended.status == status and "Traceback" not in ended.output
        assert CHANGES[change] in ended.output
    assert not finished.with_name(f"{finished.name}-reproduced").exists(), "nothing was run"


def test_evaluation_on_other_data_says_so(finished: Path, pictures: Path, changed_pictures: Path) -> None:
    remove_test_image(changed_pictures)
    ended = reslab("test", finished, f"--data.root={changed_pictures}")
    assert ended.status == 0
    assert f"note: the data are not those of the run: {CHANGES[remove_test_image]}" in ended.output
    assert "note:" not in reslab("test", finished, f"--data.root={pictures}").output


def test_run_without_a_checkpoint_starts_anew_on_other_data(changed_pictures: Path, tmp_path: Path) -> None:
    ended = fit(tmp_path / "run", changed_pictures, fault=Fault(TRAINING, "die", 2))
    assert ended.status == -signal.SIGKILL
    remove_three(changed_pictures)
    assert fit(tmp_path / "run", changed_pictures).status == 0
    assert reslab("verify", tmp_path / "run", f"--data.root={changed_pictures}").status == 0


@pytest.mark.slow
def test_study_refuses_finished_cells_on_other_data(changed_pictures: Path, tmp_path: Path) -> None:
    dataset = {"folder": ".", "mean": [0.3], "std": [0.4], "image_size": 8}
    base = {
        "data.dataset": {"class_path": "ImageFolder", "init_args": dataset},
        **{"data.batch_size": 8, "data.val_split": 6, "data.root": str(changed_pictures)},
        **{"trainer.max_epochs": 1, "trainer.accelerator": "cpu"},
    }
    text = {"name": "demo", "question": "?", "base": [DIGITS[1], base], "seeds": [0], "baseline": "a"}
    arms = {"a": {}, "b": {"model.optimizer.init_args.lr": 0.2}}
    study = tmp_path / "demo.yaml"
    study.write_text(yaml.safe_dump({**text, "arms": arms}))
    words = ["ablate", "run", study, "--out", tmp_path / "out"]
    ended = reslab(*words)
    assert ended.status == 0, ended.output
    remove_three(changed_pictures)
    study.write_text(yaml.safe_dump({**text, "arms": arms, "seeds": [0, 1]}))
    before = contents(tmp_path / "out")
    ended = reslab(*words)
    assert ended.status == 2 and "Traceback" not in ended.output
    assert f"a/seed-0: the run has other data (files, split): {CHANGES[remove_three]}" in ended.output
    assert contents(tmp_path / "out") == before
    # A cell that ran while the data were different does not enter the report.
    plan = json.loads((tmp_path / "out/plan.jsonl").read_text())
    plan["data"]["a"]["files"] = "0" * 64
    (tmp_path / "out/plan.jsonl").write_text(json.dumps(plan) + "\n")
    study.write_text(yaml.safe_dump({**text, "arms": arms}))
    assert reslab("ablate", "report", *words[2:]).status == 0
    cells = json.loads((tmp_path / "out/report.json").read_text())["cells"]
    assert (cells["complete"], cells["mismatched"]) == (1, 1)


def identity_of(images: dict[int, int], held_out: set[int]) -> DataIdentity:
    """The identity of images that show their number, with their labels; some are held out for validation."""
    pixels = np.array([[[[n % 256]], [[n // 256]]] for n in images], np.uint8).reshape(-1, 2, 1, 1)
    data = Arrays(pixels, np.array([*images.values()], np.int64))
    rows = np.array([n in held_out for n in images])
    return identify(data, data, (np.flatnonzero(~rows), np.flatnonzero(rows)), ["a", "b", "c"])


@given(data=st.data())
def test_every_change_of_arrays_is_counted(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    numbers = data.draw(st.lists(st.integers(0, 5000), min_size=8, max_size=20, unique=True))
    images = {n: data.draw(st.integers(0, 2)) for n in numbers}
    held_out = {*numbers[::3]}
    gone = data.draw(st.sets(st.sampled_from(numbers), max_size=5))
    new = data.draw(st.sets(st.integers(5001, 6000), max_size=4))
    kept = [n for n in numbers if n not in gone]
    relabelled = data.draw(st.sets(st.sampled_from(kept), max_size=3))
    moved = data.draw(st.sets(st.sampled_from(kept), max_size=3))
    changed = {n: (images[n] + (n in relabelled)) % 3 for n in kept} | dict.fromkeys(new, 0)
    path = tmp_path_factory.mktemp("table") / "data.npz"
    before = identity_of(images, held_out)
    before.save(path)
    lines = identity_of(changed, held_out ^ moved).changes(before.hashes, path)
    kinds = {"gone": gone, "new": new, "with another label": relabelled}
    for what, rows in {**kinds, "moved between training and validation": moved}.items():
        counted = [int(line.split()[0]) for line in lines if f"training image{'s' * (len(rows) > 1)} {what}" in line]
        assert counted == ([len(rows)] if rows else []), lines
    if not (gone or new or relabelled or moved):
        assert not lines


def test_without_its_table_the_hashes_still_tell(tmp_path: Path) -> None:
    before, now = identity_of({1: 0, 2: 1}, set()), identity_of({1: 0, 3: 1}, set())
    assert now.changes(before.hashes, tmp_path / "missing.npz") == ["other files: the SHA-256 differs"]
    (tmp_path / "damaged.npz").write_bytes(b"PK\3\4")
    assert now.changes(before.hashes, tmp_path / "damaged.npz") == ["other files: the SHA-256 differs"]


def test_order_alone_is_a_change(tmp_path: Path) -> None:
    before, now = identity_of({1: 0, 2: 1}, set()), identity_of({2: 1, 1: 0}, set())
    before.save(tmp_path / "data.npz")
    assert now.changes(before.hashes, tmp_path / "data.npz") == [
        "other files: the images are the same, in another order"
    ]
