"""Further test sets of a run: their published layouts, the mapping of classes, and results under their own names."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reslab import runs
from reslab.cli import main
from reslab.data import CIFAR10C, CIFAR101, DataError, EvaluationSet, ImageNetA, ImageNetV2
from reslab.data.datasets import CIFAR10, Arrays, Digits
from reslab.data.test_sets import CORRUPTIONS
from reslab.further_tests import restricted_to
from reslab.metric_text import wilson
from runner import REPO, fit, manifest

Undisturbed = Callable[..., Path]
rng = np.random.default_rng(0)
NAMES = CIFAR10().classes(Path())
SMALL = 4  # images per severity


def save_pictures(folder: Path, classes: dict[str, list[Any]]) -> None:
    for name, pictures in classes.items():
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / name / f"{i}.png")


def noise(n: int = 1) -> Any:
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures of CIFAR-10's classes, with data in ROOT/pictures."""
    root = tmp_path_factory.mktemp("tiny")
    for part in ("train", "val"):
        save_pictures(root / "pictures" / part, {name: [*noise(3)] for name in NAMES})
    dataset = root / "pictures.yaml"
    dataset.write_text("class_path: ImageFolder\ninit_args: {folder: pictures, image_size: 32}")
    options = [f"--data.dataset={dataset}", f"--data.root={root}", "--data.val_split=0", "--data.num_workers=0"]
    ended = fit(root / "run", *options, "--data.batch_size=10", "--trainer.max_epochs=1", "--run.monitor=train/loss")
    assert ended.status == 0, ended.output
    return root


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run / "run", tmp_path / "run")


def evaluate(run: Path, root: Path, *sets: Path | str) -> int:
    return main(["test", str(run), *(word for name in sets for word in ("--on", str(name))), f"--data.root={root}"])


def entry(run: Path, name: str) -> dict[str, Any]:
    return manifest(run)["test_sets"][name]


def predictions(run: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(run / f"predictions-{name}.npz") as file:
        return dict(file)


# Published layouts


@pytest.fixture
def corrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-10-C: 15 corruptions, 5 × SMALL images."""
    monkeypatch.setattr(CIFAR10C, "images_per_severity", SMALL)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for corruption in CORRUPTIONS:
        np.save(folder / f"{corruption}.npy", noise(5 * SMALL))
    np.save(folder / "labels.npy", np.tile(np.arange(SMALL, dtype=np.uint8), 5))
    return folder


def test_cifar10_c_by_corruption_and_severity_with_mce(run: Path, corrupted: Path) -> None:
    before = manifest(run)
    assert evaluate(run, corrupted.parent, "cifar10_c") == 0
    after, recorded = manifest(run), entry(run, "cifar10_c")
    assert after["results"] == before["results"] and after["weights_sha256"] == before["weights_sha256"]
    assert [*recorded["parts"]] == [f"{name}/{i}" for name in CORRUPTIONS for i in range(1, 6)]
    accuracy = np.array([part["test/acc"] for part in recorded["parts"].values()]).reshape(15, 5)
    results = recorded["results"]
    assert results["test/mCE"] == pytest.approx(1 - accuracy.mean())
    assert results["test/acc"] == pytest.approx(accuracy.mean())
    assert results["test/acc/fog"] == pytest.approx(accuracy[CORRUPTIONS.index("fog")].mean())
    assert (recorded["images"], recorded["classes"]) == (15 * 5 * SMALL, 10)
    rows = predictions(run, "cifar10_c")
    right = (rows["label"] == rows["prediction"]).reshape(15, 5, SMALL)
    assert np.allclose(right.mean(2), accuracy) and len(rows["parts"]) == 75
    assert (rows["part"] == np.repeat(np.arange(75), SMALL)).all()


def test_mce_needs_all_corruptions(run: Path, corrupted: Path, tmp_path: Path) -> None:
    leaf = tmp_path / "fog.yaml"
    leaf.write_text("class_path: CIFAR10C\ninit_args: {corruptions: [fog, snow]}")
    assert evaluate(run, corrupted.parent, leaf) == 0
    assert {*entry(run, "fog")["results"]} >= {"test/acc", "test/acc/fog", "test/acc/snow"}
    assert "test/mCE" not in entry(run, "fog")["results"]


def test_severity_one_comes_first(corrupted: Path) -> None:
    images = np.load(corrupted / "fog.npy")
    parts = CIFAR10C(corruptions=["fog"]).all_parts(corrupted.parent)
    for i, part in enumerate(parts.values()):
        assert (part.images == images[i * SMALL : (i + 1) * SMALL]).all()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing corruption": (lambda folder: (folder / "fog.npy").unlink(), r"fog\.npy does not exist.*zenodo"),
    "missing labels": (lambda folder: (folder / "labels.npy").unlink(), r"labels\.npy does not exist"),
    "cut off": (lambda folder: (folder / "fog.npy").write_bytes(b"\x93NUMPY"), r"fog\.npy cannot be read"),
    "no array": (lambda folder: (folder / "fog.npy").write_bytes(b""), r"fog\.npy cannot be read"),
    "too few images": (lambda folder: np.save(folder / "fog.npy", noise(7)), r"fog\.npy must have the shape \(20, 32"),
    "channels first": (lambda folder: np.save(folder / "fog.npy", np.zeros((20, 3, 32, 32), np.uint8)), "got"),
    "too few labels": (lambda folder: np.save(folder / "labels.npy", np.zeros(4, int)), r"shape \(20,\), got \(4,\)"),
    "floats": (lambda folder: np.save(folder / "fog.npy", np.zeros((20, 32, 32, 3))), "images must be uint8"),
    "labels": (lambda folder: np.save(folder / "labels.npy", np.full(20, 10)), "labels are outside 0 to 9"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_set_is_one_message_before_any_evaluation(
    run: Path, corrupted: Path, damage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    harm, message = DAMAGE[damage]
    harm(corrupted)
    monkeypatch.setattr("lightning.pytorch.Trainer.test", lambda *args, **kwargs: pytest.fail("evaluated"))
    assert evaluate(run, corrupted.parent, "cifar10_c") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error, error
    assert "test_sets" not in manifest(run)


def test_unknown_corruption_is_reported_with_all_names() -> None:
    with pytest.raises(ValueError, match=r"there is no fogg; there are gaussian_noise, .* speckle_noise"):
        CIFAR10C(corruptions=["fogg"])


@pytest.mark.parametrize(("version", "n"), [("v6", 2000), ("v4", 2021)])
def test_cifar10_1_versions(tmp_path: Path, version: Any, n: int) -> None:
    (tmp_path / "cifar-10.1").mkdir()
    np.save(tmp_path / f"cifar-10.1/cifar10.1_{version}_data.npy", np.zeros((n, 32, 32, 3), np.uint8))
    np.save(tmp_path / f"cifar-10.1/cifar10.1_{version}_labels.npy", np.arange(n, dtype=np.int32) % 10)
    assert len(CIFAR101(version).all_parts(tmp_path)[""]) == n
    with pytest.raises(DataError, match=r"cifar10\.1_v\d_data\.npy does not exist\. Download .*github"):
        CIFAR101("v4" if version == "v6" else "v6").all_parts(tmp_path)


WNIDS = [f"n{i:08}" for i in range(1000)]


def test_imagenet_v2_counts_classes_by_number_not_by_name(tmp_path: Path) -> None:
    top = tmp_path / ImageNetV2.archive
    save_pictures(top, {str(i): [noise()[0, :1, :1]] for i in range(1000)})
    source = ImageNetV2()
    files = source.all_parts(tmp_path)[""]
    assert [files.name(i) for i in (2, 10, 999)] == ["2/0.png", "10/0.png", "999/0.png"]
    assert (files.labels == np.arange(1000)).all()
    assert source.classes_in(tmp_path, WNIDS) == WNIDS
    for classes in (WNIDS[:999], WNIDS[::-1], [str(i) for i in range(1000)]):
        with pytest.raises(DataError, match="in the order of their WordNet ids"):
            source.classes_in(tmp_path, classes)
    (top / "7").rename(top / "seven")
    with pytest.raises(DataError, match="must be 0 to 999, got seven"):
        source.classes(tmp_path)


def test_incomplete_imagenet_a_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imagenet-a does not exist\. Unpack https"):
        ImageNetA().classes(tmp_path)
    save_pictures(tmp_path / "imagenet-a", {name: [] for name in WNIDS[:199]})
    with pytest.raises(DataError, match="has 199 class directories instead of 200"):
        ImageNetA().classes(tmp_path)


def test_set_of_test_images_cannot_be_trained_on(tmp_path: Path) -> None:
    ended = fit(tmp_path / "run", "--data.dataset=CIFAR10C")
    assert ended.status == 2 and "CIFAR10C has test images only: use it with `reslab test RUN --on`" in ended.output


# Classes


def test_subset_of_classes_restricts_predictions_to_them(run: Path, tmp_path: Path) -> None:
    subset = ["ship", "cat", "dog"]
    save_pictures(tmp_path / "new/val", {name: [*noise(4)] for name in subset})
    leaf = tmp_path / "new.yaml"
    leaf.write_text("class_path: ImageFolder\ninit_args: {folder: new}")
    assert evaluate(run, tmp_path, leaf) == 0
    rows, recorded = predictions(run, "new"), entry(run, "new")
    expected = [NAMES.index(name) for name in sorted(subset)]
    assert [*dict.fromkeys(rows["label"])] == expected and {*rows["prediction"]} <= {*expected}
    assert recorded["classes"] == 3 and "test/acc5" not in recorded["results"]
    assert recorded["results"]["test/acc"] == pytest.approx((rows["label"] == rows["prediction"]).mean())
    assert np.isfinite(recorded["results"]["test/loss"])


class Reversed(EvaluationSet):
    """The digits' test images with the classes in another order."""

    def classes(self, root: Path) -> list[str]:
        return [str(digit) for digit in reversed(range(10))]

    def parts(self, root: Path) -> Iterator[tuple[str, Any]]:
        data = Digits().load(root, "test")
        yield "", Arrays(data.images, 9 - data.labels)


def test_other_order_of_classes_gives_the_same_results(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    monkeypatch.setattr("reslab.further_tests.read_source", lambda path: ({"class_path": path.stem}, Reversed()))
    leaf = tmp_path / "reversed.yaml"
    leaf.touch()
    assert evaluate(run, tmp_path, leaf) == 0
    tested = {name: value for name, value in manifest(run)["results"].items() if name.startswith("test/")}
    assert entry(run, "reversed")["results"] == tested


def test_unknown_classes_are_refused_with_the_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, run, "digits") == 2
    error = capsys.readouterr().err
    assert "the run does not know 10 of the 10 classes of digits: 0, 1, 2" in error and "Only the run has: air" in error


@pytest.mark.parametrize("shape", [(1, 16, 16, 3), (1, 32, 32, 1)])
def test_arrays_of_another_size_are_refused(
    run: Path, tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(CIFAR101, "parts", lambda *args: iter([("", Arrays(np.zeros(shape, np.uint8), [0]))]))
    assert evaluate(run, tmp_path, "cifar10_1") == 2
    assert f"images of shape {shape[1:]}, the run's network has inputs of (32, 32, 3)" in capsys.readouterr().err


def test_restricted_network_is_restored() -> None:
    net, images = torch.nn.Linear(3, 4), torch.ones(2, 3)
    with restricted_to(net, np.array([3, 1])):
        logits = net(images)
    assert logits.isinf().tolist() == [[True, False, True, False]] * 2
    assert net(images).isfinite().all() and torch.equal(net(images)[:, 1::2], logits[:, 1::2])


# Records


def test_several_sets_are_recorded_under_their_names_with_their_identity(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    copy = tmp_path / "mine.yaml"
    copy.write_text("class_path: Digits")
    before = manifest(run)
    assert evaluate(run, tmp_path, "digits", copy) == 0
    sets = manifest(run)["test_sets"]
    assert [*sets] == ["digits", "mine"] and sets["digits"]["data"] == sets["mine"]["data"]
    assert sets["mine"]["results"]["test/acc"] == before["results"]["test/acc"]
    assert sets["mine"]["dataset"] == {"class_path": "reslab.data.Digits"}
    assert sets["mine"]["weights_sha256"] == before["weights_sha256"]
    assert {name: value for name, value in manifest(run).items() if name != "test_sets"} == before
    assert "mine: test/loss" in capsys.readouterr().out
    assert main(["verify", str(run)]) == 0


def test_results_are_in_the_report_and_in_the_list_of_runs(run: Path, corrupted: Path, tmp_path: Path) -> None:
    before = (run / "report.html").read_text()
    save_pictures(tmp_path / "new" / "val", {name: [*noise(2)] for name in NAMES})
    (tmp_path / "new.yaml").write_text("class_path: ImageFolder\ninit_args: {folder: new, image_size: 32}")
    assert evaluate(run, tmp_path, "cifar10_c", tmp_path / "new.yaml") == 0
    rows = re.findall(r"<tr>(.*?)</tr>", (run / "report.html").read_text().partition("<h2>Further test sets</h2>")[2])
    cells = [[*map(unescape, re.findall(r"<t[dh][^>]*>(.*?)</t", row))] for row in rows]
    corrupt, new = entry(run, "cifar10_c")["results"], entry(run, "new")["results"]
    low, high = wilson(round(20 * new["test/acc"]), 20)
    assert cells[1:4] == [
        ["cifar10_c", "300", "test accuracy", f"{100 * corrupt['test/acc']:.2f} %", ""],  # copies: no interval
        ["cifar10_c", "300", "test mCE", f"{corrupt['test/mCE']:.4f}", ""],
        ["new", "20", "test accuracy", f"{100 * new['test/acc']:.2f} %", f"{100 * low:.2f} % to {100 * high:.2f} %"],
    ]
    assert "Further test sets" not in before
    [listed] = runs.table(run).to_dict("records")
    assert listed["cifar10_c/mCE"] == corrupt["test/mCE"] and listed["new/acc"] == new["test/acc"]
    assert listed["test/acc"] == manifest(run)["results"]["test/acc"]


def unfinished(run: Path) -> list[str]:
    (run / "manifest.json").write_text(json.dumps({**manifest(run), "status": "running"}))
    return ["--on", "digits"]


def other_weights(run: Path) -> list[str]:
    (run / "manifest.json").write_text(json.dumps({**manifest(run), "weights_sha256": "0" * 64}))
    return ["--on", "digits"]


def named_like_a_split(run: Path) -> list[str]:
    return ["--on", str(shutil.copy(REPO / "configs/data/digits.yaml", run.parent / "val.yaml"))]


REFUSED: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda run: ["--on", "digit"], "--on digit: no such file or data set: did you mean digits"),
    (lambda run: ["--on", "digits", "--on", "digits"], "two test sets called digits"),
    (named_like_a_split, "val is the name of the results of the run itself"),
    (unfinished, "is not finished"),
    (other_weights, "does not hold the weights that the run tested"),
]


@pytest.mark.parametrize(("prepare", "message"), REFUSED)
def test_wrong_use_is_one_message(
    undisturbed: Undisturbed, tmp_path: Path, prepare: Callable[[Path], list[str]], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    assert main(["test", str(run), *prepare(run)]) == 2
    assert message in capsys.readouterr().err
