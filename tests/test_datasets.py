"""Data sets: what is loaded, and the messages about missing, damaged or wrong data."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from reslab.data import CIFAR10, CIFAR100, DataError, Digits, ImageData, ImageFolder, ImageNet, Imagenette, ImageSource
from reslab.data.datasets import Arrays
from reslab.data.decode import decode
from reslab.data.samplers import BatchKey
from reslab.doctor import examine
from reslab.errors import UserError


def write_image(path: Path, color: tuple[int, int, int] = (200, 30, 60), size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data root with pets/{train,val}/{cat,dog}: ten training and three validation images per class."""
    for part, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                write_image(tmp_path / "pets" / part / name / f"{i}.png", (20 * i, 100 * label, 7))
    return tmp_path


def pets(root: Path, **settings) -> ImageData:
    settings = {"batch_size": 4, "num_workers": 0, "val_split": 0.2, **settings}
    return ImageData(ImageFolder("pets", image_size=16), str(root), **settings)


def test_digits_match_scikit_learn():
    from sklearn.datasets import load_digits

    source = Digits()
    train, test = source.load(Path(), "train"), source.load(Path(), "test")
    assert (len(train), len(test)) == (1438, 359)
    pixels = np.concatenate([train.images, test.images]).reshape(1797, 64)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, np.round(load_digits().data * 255 / 16).astype(np.uint8)))
    assert (
        test.sha256 == "96b49f96ad9a8acd229742a0fb654cc9184e640737dd44d3c03e8eded1c6cddc"
    )  # fixed: these are the images that published numbers are about
    assert np.bincount(test.labels).min() >= 34
    assert abs(train.images.mean() / 255 - source.mean[0]) < 1e-4
    assert abs(train.images.std() / 255 - source.std[0]) < 1e-4


@pytest.mark.shared_data
def test_cifar10_matches_torchvision_and_its_statistics(shared_data):
    from torchvision.datasets import CIFAR10 as Theirs

    source, theirs = CIFAR10(), Theirs(str(shared_data), train=False)
    test = source.load(shared_data, "test")
    np.testing.assert_array_equal(test.images, theirs.data)
    assert test.labels.tolist() == theirs.targets
    assert source.classes(shared_data) == theirs.classes
    pixels = source.load(shared_data, "train").images.reshape(-1, 3)
    mean = pixels.mean(0) / 255
    deviation = np.sqrt((pixels.astype(np.uint16) ** 2).mean(0) / 255**2 - mean**2)
    np.testing.assert_allclose(mean, source.mean, atol=1e-4)
    np.testing.assert_allclose(deviation, source.std, atol=1e-4)


def test_cifar100_has_100_sorted_classes():
    names = CIFAR100().classes(Path())
    assert len(set(names)) == 100
    assert names == sorted(names)


def test_missing_cifar_explains_how_to_get_it(tmp_path):
    data = ImageData(CIFAR10(), str(tmp_path), download=False)
    data.prepare_data()
    with pytest.raises(DataError, match=r"data_batch_1 does not exist \(7 of 7.*--data.root.*--data.download true"):
        data.setup("fit")


def test_failed_download_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10._torchvision, "url", "file:///nowhere/cifar.tar.gz")
    with pytest.raises(DataError, match=r"the download into .* failed: .*--data.root"):
        ImageData(CIFAR10(), str(tmp_path)).prepare_data()


@pytest.mark.shared_data
def test_corrupt_cifar_file_is_named_and_not_downloaded_again(shared_data, tmp_path, monkeypatch):
    copy = tmp_path / "cifar-10-batches-py"
    copy.mkdir()
    for path in (shared_data / copy.name).iterdir():
        (copy / path.name).symlink_to(path)
    damaged = copy / "data_batch_3"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.unlink()
    damaged.write_bytes(content)
    data = ImageData(CIFAR10(), str(tmp_path))
    monkeypatch.setattr(CIFAR10._torchvision, "download", lambda self: pytest.fail("downloaded"))
    data.prepare_data()
    with pytest.raises(DataError, match=r"wrong MD5\): \S*data_batch_3\. Remove"):
        data.setup("fit")


def test_image_folder_loads_files_by_class(folder):
    (folder / "pets/train/cat/notes.txt").write_text("no image")
    (folder / "pets/train/cat/._0.png").write_bytes(b"macOS")
    write_image(folder / "pets/train/dog/deeper/größe.jpg")
    data = pets(folder)
    data.setup()
    assert data.class_names == ["cat", "dog"]
    assert data.image_shape == (3, 16, 16)
    assert np.bincount(data.train_data.labels).tolist() == [10, 11]
    names = [data.train_data.path(i).relative_to(folder / "pets/train").as_posix() for i in (0, 10, 20)]
    assert names == ["cat/0.png", "dog/0.png", "dog/deeper/größe.jpg"]
    assert len(data.test_data) == 6


def test_missing_directory_explains_the_expected_layout(tmp_path):
    with pytest.raises(DataError, match=r"pets/train does not exist.*\{train,val\}/<class>/.*--data.root"):
        _ = pets(tmp_path).num_classes


def test_differing_class_directories_are_listed(folder):
    (folder / "pets/val/dog").rename(folder / "pets/val/dogs")
    with pytest.raises(DataError, match=r"Only in train: dog\. Only in val: dogs\."):
        pets(folder).setup("fit")


def test_empty_class_directory_is_named(folder):
    (folder / "pets/train/fish").mkdir()
    (folder / "pets/val/fish").mkdir()
    with pytest.raises(DataError, match=r"pets/train/fish contains no images"):
        pets(folder).setup("fit")


def test_empty_file_is_named_before_the_first_step(folder):
    (folder / "pets/train/dog/4.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 image files are empty .*pets/train/dog/4\.png"):
        pets(folder).setup("fit")


def test_flat_imagenet_val_directory_gets_a_script_that_sorts_it(tmp_path, monkeypatch):
    for name in ("n01440764", "n01443537"):
        write_image(tmp_path / "imagenet/train" / name / "a.JPEG")
    for i in (1, 2):
        write_image(tmp_path / f"imagenet/val/ILSVRC2012_val_0000000{i}.JPEG")
    with pytest.raises(DataError, match=r"val has no class directories.*\n.*devkit_t12") as raised:
        ImageData(ImageNet(), str(tmp_path), batch_size=1).setup("fit")
    code = str(raised.value).split("<<'END'\n")[1].removesuffix("END")

    from torchvision.datasets import imagenet

    monkeypatch.setattr(imagenet, "parse_devkit_archive", lambda root: None)  # the devkit requires a login
    monkeypatch.setattr(imagenet, "load_meta_file", lambda root: ({}, ["n01443537", "n01440764"]))
    exec(code, {})
    ImageData(ImageNet(), str(tmp_path), batch_size=1, val_split=0).setup("fit")
    assert (tmp_path / "imagenet/val/n01443537/ILSVRC2012_val_00000001.JPEG").exists()


def test_missing_imagenet_explains_what_to_download(tmp_path):
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar.*image-net\.org"):
        ImageData(ImageNet(), str(tmp_path)).setup("fit")


def test_other_data_set_than_imagenette_is_rejected(folder):
    with pytest.raises(DataError, match=r"is not Imagenette: missing n01440764.*unknown cat, dog"):
        ImageData(Imagenette(folder="pets"), str(folder)).setup("fit")


class Mislabelled(Digits):
    def classes(self, root: Path) -> list[str]:
        return list("012345678")


class Own(ImageSource):
    """A user's data set: returns or raises what it was given."""

    mean, std = (0.5,), (0.5,)
    image_size = resize = 4

    def __init__(self, load: Any = None, classes: Any = ("a", "b"), prepare: Any = None) -> None:
        self._load, self._classes, self._prepare = load, classes, prepare

    def classes(self, root: Path) -> Any:
        return self._classes(root) if callable(self._classes) else self._classes

    def load(self, root: Path, split: str) -> Any:
        return self._load() if callable(self._load) else self._load

    def prepare(self, root: Path, download: bool) -> None:
        if self._prepare:
            self._prepare()


GREY = np.arange(8 * 4 * 4, dtype=np.uint8).reshape(8, 4, 4, 1)
LABELS = np.arange(8) % 2
INVALID: dict[str, tuple[Any, Any, str]] = {
    "float": (
        GREY / 255,
        LABELS,
        r"uint8 \(n, H, W, C\), got float64 \(8, 4, 4, 1\): multiply .*\.astype\(np\.uint8\)",
    ),
    "float32 without channels": (
        np.float32(GREY[..., 0]),
        LABELS,
        r"got float32 \(8, 4, 4\): multiply images in \[0, 1\]",
    ),
    "uint16": (GREY.astype(np.uint16), LABELS, r"got uint16 .*: keep the upper 8 bits .*images >> 8"),
    "int64": (GREY.astype(np.int64), LABELS, r"got int64 .*: convert images in 0 to 255"),
    "no channels": (GREY[..., 0], LABELS, r"got uint8 \(8, 4, 4\): add the channel .*images\[\.\.\., None\]"),
    "flat": (GREY.reshape(8, 16), LABELS, r"got uint8 \(8, 16\): reshape"),
    "ragged": ([GREY[0], GREY[0, :2]], [0, 1], "images must form one array"),
    "none": (None, LABELS, r"got object \(\)"),
    "more images": (GREY, LABELS[:5], "8 images have 5 labels"),
    "more labels": (GREY[:3], LABELS, "3 images have 8 labels"),
    "float labels": (GREY, LABELS / 1.0, r"labels must be integers, got float64.*\.astype\(np\.int64\)"),
    "names": (GREY, ["a", "b"] * 4, "labels must be integers, got <U1: each is the position of its class"),
    "one-hot": (GREY, np.eye(8, dtype=int), r"labels must have shape \(n,\), got \(8, 8\): use labels\.argmax\(1\)"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_arrays_are_rejected_with_what_to_do(kind):
    images, labels, message = INVALID[kind]
    with pytest.raises(DataError, match=message):
        ImageData(Own(lambda: Arrays(images, labels)), batch_size=2).setup("fit")


READ_ONLY = GREY.copy()
READ_ONLY.flags.writeable = False
VALID: dict[str, tuple[Any, Any]] = {
    "list of labels": (GREY, LABELS.tolist()),
    "uint8 labels": (GREY, LABELS.astype(np.uint8)),
    "tensors": (torch.from_numpy(GREY), torch.from_numpy(LABELS)),
    "read-only": (READ_ONLY, LABELS),
    "not contiguous": (np.asfortranarray(GREY), np.repeat(LABELS, 2)[::2]),
    "reversed twice": (np.ascontiguousarray(GREY[::-1])[::-1], LABELS),
}


@pytest.mark.parametrize("kind", VALID)
def test_arrays_of_any_layout_and_integer_labels_are_equal(kind):
    arrays, reference = Arrays(*VALID[kind]), Arrays(GREY, LABELS)
    assert arrays.labels.dtype == np.int64
    assert arrays.sha256 == reference.sha256
    assert np.array_equal(arrays.keys, reference.keys)
    data = ImageData(Own(arrays), batch_size=4, val_split=2)
    data.setup("fit")
    assert torch.equal(next(iter(data.test_dataloader())).images, torch.from_numpy(GREY[:4]))


def test_channels_must_match_the_mean():
    colour = Arrays(GREY.repeat(3, -1), LABELS)
    with pytest.raises(DataError, match=r"Own has training images of 3 channels, .* a mean of 1 values"):
        ImageData(Own(colour), batch_size=2).setup("test")


@pytest.mark.parametrize("data", [None, (GREY, LABELS), {"images": GREY}, "x.npz"])
def test_load_must_return_arrays_or_files(data):
    with pytest.raises(DataError, match=rf"Own\.load must return .*Arrays or .*Files .*got {type(data).__name__}"):
        ImageData(Own(data), batch_size=2).setup("fit")


def fail(error: Exception) -> Any:
    def call(*arguments: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize("method", ["prepare", "load", "classes"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("images"), "failed: KeyError: 'images'"),
        (OSError("first line\nNetwork is unreachable"), "failed: OSError: Network is unreachable$"),
        (ZeroDivisionError(), "failed: ZeroDivisionError"),
        (FileNotFoundError(2, "No such file", "x.npz"), "failed: FileNotFoundError: .*'x.npz'"),
    ],
)
def test_any_failure_of_a_data_set_names_its_class_and_method(method, error, message):
    data = ImageData(Own(**{"load": Arrays(GREY, LABELS), method: fail(error)}), batch_size=2)
    with pytest.raises(DataError, match=rf"^Own\.{method} {message}"):
        data.prepare_data()
        data.setup("fit")


def test_messages_of_a_data_set_are_kept():
    for error in (DataError("mount the disk"), UserError("mount the disk")):
        with pytest.raises(type(error), match=r"^mount the disk$"):
            ImageData(Own(fail(error)), batch_size=2).setup("fit")


@pytest.mark.parametrize("classes", [[], None, [1, 2], "ab"[:0]])
def test_classes_must_be_names(classes):
    with pytest.raises(DataError, match=r"Own\.classes must return a list of names"):
        _ = ImageData(Own(classes=classes)).class_names


def test_class_names_that_are_not_utf8_are_rejected(folder):
    for part in ("train", "val"):
        write_image(folder / "pets" / part / os.fsdecode(b"caf\xe9") / "1.png")
    with pytest.raises(DataError, match=r"class name caf\\xe9 is not valid UTF-8: rename"):
        _ = pets(folder).num_classes


@pytest.mark.parametrize("name", [b"caf\xe9.png", b".caf\xe9.png", b"1.caf\xe9"])
def test_notes_and_errors_about_names_that_are_not_utf8_can_be_printed(folder, name):
    path = folder / "pets/train/cat" / os.fsdecode(name)
    path.write_bytes(b"no image")
    path.with_name(os.fsdecode(b"z" + name)).symlink_to(path)
    (folder / "pets/val/cat" / os.fsdecode(b"z" + name)).symlink_to(path)
    data = pets(folder, batch_size=20, val_split=0)
    for line in data.notes():
        line.encode()
    assert str(DataError(f"{path} cannot be read")).isascii()


def test_hidden_directories_are_no_classes_and_hold_no_images(folder):
    for name in ("cat/.ipynb_checkpoints/0-checkpoint.png", ".trash/0.png", "__MACOSX/cat/0.png", "dog/.git/0.png"):
        write_image(folder / "pets/train" / name)
    data = pets(folder)
    data.setup("fit")
    assert data.class_names == ["cat", "dog"]
    assert len(data.train_data) == 20
    assert data.notes() == ["training data: hidden images and directories skipped: 4, such as .trash"]


def test_images_that_are_in_two_classes_or_splits_are_noted(folder):
    train, test = folder / "pets/train", folder / "pets/val"
    assert pets(folder).notes() == []
    (train / "dog/link.png").symlink_to(train / "cat/3.png")
    (train / "dog/hard.png").hardlink_to(train / "cat/4.png")
    (train / "cat/again.png").hardlink_to(train / "cat/5.png")  # one class: no contradiction
    (test / "cat/seen.png").symlink_to(train / "cat/0.png")
    (test / "dog/1.gif").write_bytes(b"")
    first, second, third = pets(folder).notes()
    assert first == f"training data: images in several classes: 2, such as {train}/cat/3.png and {train}/dog/link.png"
    assert second.startswith("test data: other files ignored: 1 .gif (image types: .jpg")
    assert third == f"test images that are also training images: 1, such as {train}/cat/0.png and {test}/cat/seen.png"


@pytest.mark.parametrize(
    ("train", "test", "note"),
    [
        ("train", "train", "training and test data are the same directory"),
        ("train", "link", "training and test data are the same directory"),
        ("train", "train/cat", "the directory of test data is inside that of training data: .*train/cat"),
        ("train/cat", "train", "the directory of training data is inside that of test data: .*train/cat"),
    ],
)
def test_training_and_test_data_in_one_directory_are_noted(tmp_path, train, test, note):
    (tmp_path / "link").symlink_to(tmp_path / "train")
    write_image(tmp_path / "train/cat/cat/1.png")
    data = ImageData(ImageFolder(str(tmp_path), train, test, image_size=8), batch_size=1, val_split=0)
    (line,) = data.notes()
    assert re.match(note, line)


def test_arrays_with_the_same_image_twice_are_noted():
    train, test = GREY.copy(), GREY + 100
    assert ImageData(Own(iter([Arrays(train, LABELS), Arrays(test, LABELS)]).__next__)).notes() == []
    train[5], test[3] = train[0], train[7]
    data = ImageData(Own(iter([Arrays(train, LABELS), Arrays(test, LABELS)]).__next__))
    assert data.notes() == [
        "training data: images in several classes: 1, such as image 0 and image 5",
        "test images that are also training images: 1, such as image 7 and image 3",
    ]


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_removing_or_adding_a_file_moves_no_other_one(folder, fraction):
    def sides(data: ImageData) -> dict[str, bool]:
        return {data.train_data.name(i): k == 1 for k, part in enumerate(data.split) for i in part}

    before = sides(pets(folder, val_split=fraction))
    assert 0 < sum(before.values()) < 20
    (folder / "pets/train/cat/2.png").unlink()
    write_image(folder / "pets/train/cat/-1.png")
    write_image(folder / "pets/train/cat/deeper/1.png")
    after = sides(pets(folder, val_split=fraction))
    assert {name: side for name, side in after.items() if name in before} == {
        name: side for name, side in before.items() if name != "cat/2.png"
    }


def test_removing_an_image_of_an_array_moves_no_other_one():
    images = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 1), dtype=np.uint8)
    images[60] = images[10]

    def held_out(rows: np.ndarray) -> set[int]:
        data = ImageData(Own(Arrays(images[rows], np.arange(200)[rows] % 2)), val_split=0.2)
        return {int(rows[i]) for i in data.split[1]}

    before = held_out(np.arange(200))
    assert 20 < len(before) < 60
    assert (10 in before) == (60 in before)
    for removed in (0, 77, 199):
        assert held_out(np.delete(np.arange(200), removed)[::-1]) == before - {removed}


def test_doctor_prints_what_is_odd_about_the_data(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "pets/train/cat/film.gif").write_bytes(b"GIF")
    configs = Path(__file__).resolve().parents[1] / "configs"
    arguments = ["--config", str(configs / "experiment/imagenette_resnet18.yaml"), f"--data.root={folder}"]
    arguments += [f"--data.dataset={configs / 'data/imagefolder.yaml'}", "--data.dataset.init_args.folder=pets"]
    assert examine([*arguments, "--data.batch_size=4"]) == 0
    assert "\n          training data: other files ignored: 1 .gif" in capsys.readouterr().out


def test_labels_outside_the_classes_are_an_error():
    with pytest.raises(DataError, match=r"\d+ training labels are outside 0 to 8 \(9 classes\), the first is 9"):
        ImageData(Mislabelled()).setup("fit")


def test_existing_data_are_not_downloaded(folder, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Imagenette", lambda *a, **k: pytest.fail("downloaded"))
    (folder / "imagenette2-160").mkdir()
    ImageData(Imagenette(), str(folder)).prepare_data()


@pytest.mark.parametrize(("damage", "workers"), [("truncated", 0), ("no image", 1)])
def test_unreadable_image_is_named_with_its_path(folder, workers, damage):
    path = write_image(folder / "pets/train/cat/bad.jpg", size=(400, 400))
    path.write_bytes(path.read_bytes()[:2000] if damage == "truncated" else b"<html>not found</html>")
    data = pets(folder, num_workers=workers, batch_size=21, val_split=0)
    data.setup("fit")
    with pytest.raises(DataError) as raised:
        next(iter(data.train_dataloader()))
    assert str(raised.value).startswith(str(path))
    assert str(raised.value).endswith("restore or remove it")


def test_decode_handles_all_kinds_of_image_files(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:2, :3] = (250, 10, 60)
    image = Image.fromarray(pixels)
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    for name, picture in {
        "rgb.png": image,
        "rgba.png": image.convert("RGBA"),
        "palette.gif": image.quantize(),
        "bitmap.bmp": image,
        "scan.tiff": image,
        "web.webp": image,
    }.items():
        picture.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert torch.equal(decode(tmp_path / name, 3), expected), name
    (tmp_path / "rgb.png").rename(tmp_path / "really_a_png.jpg")  # ImageNet contains one of these
    assert torch.equal(decode(tmp_path / "really_a_png.jpg", 3), expected)

    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)  # and some of these
    assert (decode(tmp_path / "cmyk.jpg", 3).int() - expected).abs().float().mean() < 30
    assert torch.equal(decode(tmp_path / "bitmap.bmp", 1), tvf.pil_to_tensor(image.convert("L")))
    sixteen_bits = np.array([[0, 0x80FF, 0xFFFF]], np.uint16)
    Image.fromarray(sixteen_bits).save(tmp_path / "deep.png")
    for channels in (1, 3):
        assert decode(tmp_path / "deep.png", channels).tolist() == [[[0, 0x80, 0xFF]]] * channels

    exif = Image.Exif()
    exif[0x0112] = 6  # taken with a rotated camera: rotate by 90° to see it upright
    for name in ("rotated.jpg", "rotated.png", "rotated.webp"):
        image.resize((60, 40)).save(tmp_path / name, exif=exif)
        assert decode(tmp_path / name, 3).shape == (3, 60, 40)


@pytest.mark.shared_data
def test_evaluation_of_files_matches_torchvision_reference_preprocessing(shared_data):
    data = ImageData(ImageFolder("imagenette-subset"), str(shared_data), batch_size=8, num_workers=0)
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())))
    reference = v2.Compose(
        [
            v2.Resize(256, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.dataset.mean, data.dataset.std),
        ]
    )
    for index, image in zip(batch.indices, batch.images, strict=True):
        theirs = reference(decode(data.test_data.path(index), 3))
        torch.testing.assert_close(image, theirs, rtol=0, atol=1e-6)


@pytest.mark.shared_data
def test_imagenette_trains_on_random_crops(shared_data):
    data = ImageData(Imagenette(folder="imagenette-subset"), str(shared_data), batch_size=8, num_workers=0)
    data.setup("fit")
    assert data.class_names[:2] == ["tench", "English springer"]
    assert (len(data.train_data), len(data.test_data)) == (2000, 500)
    loader = data.train_dataloader()
    first, second = (next(iter(loader)) for _ in range(2))  # two epochs
    assert first.images.shape == (8, 128, 128, 3)
    batches = loader.dataset
    same_key = batches[BatchKey(first.indices.numpy())]
    assert torch.equal(same_key.images, first.images)
    assert not torch.equal(batches[BatchKey(first.indices.numpy(), epoch=1)].images, first.images)
    assert not torch.equal(first.indices, second.indices)


def test_fingerprint_distinguishes_data_split_and_classes(folder):
    original = pets(folder).identity().hashes
    assert original == pets(folder, seed=3).identity().hashes
    other_split = pets(folder, split_seed=1).identity().hashes
    assert {key for key in original if original[key] != other_split[key]} == {"split"}
    write_image(folder / "pets/train/cat/0.png", size=(41, 30))
    other_file = pets(folder).identity().hashes
    assert {key for key in original if original[key] != other_file[key]} == {"files"}
    for part in ("train", "val"):
        (folder / "pets" / part / "dog").rename(folder / "pets" / part / "dogs")
    assert pets(folder).identity().hashes["classes"] != original["classes"]


def test_pickle_with_the_name_of_a_cifar_file_is_never_loaded(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    top = tmp_path / "cifar-10-batches-py"
    top.mkdir()
    for path in CIFAR10()._files(tmp_path):
        path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError, match="wrong MD5"):
        CIFAR10().load(tmp_path, "train")
    assert not (tmp_path / "executed").exists()
