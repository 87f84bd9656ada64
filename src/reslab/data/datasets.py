"""Where images come from: digits, CIFAR-10/100, and directories of image files (ImageNet, Imagenette, your own).

An `ImageSource` describes a data set and loads it into memory (`Arrays`) or as a table of its files (`Files`).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torchvision.datasets as tvd
from torchvision.datasets.utils import check_integrity

from reslab.data.files import DataError, Files, Walk, file_table
from reslab.data.order import hold_out
from reslab.errors import UserError

Split = Literal["train", "test"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set in memory: images uint8 (n, H, W, C), labels int64 (n,); other integers are accepted as labels.

    Raises:
        DataError: The images or labels have another type or shape, or their numbers differ.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        images, labels = _as_array(self.images, "images"), _as_array(self.labels, "labels")
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DataError(
                f"images must be uint8 (n, H, W, C), got {images.dtype} {images.shape}: {_how_to_convert(images)}"
            )
        if labels.ndim != 1:
            raise DataError(
                f"labels must have shape (n,), got {labels.shape}: use labels.argmax(1) if they are one-hot"
            )
        if labels.dtype.kind not in "iu":
            raise DataError(
                f"labels must be integers, got {labels.dtype}: each is the position of its class in `classes`, "
                "convert them with .astype(np.int64)"
            )
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images have {len(labels)} labels: give one label per image")
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(repr((self.images.shape, self.images.dtype.str)).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    @cached_property
    def keys(self) -> npt.NDArray[np.uint64]:
        """Hash of each image's shape and pixels, uint64 (n,): equal for exact duplicates."""
        shape = hashlib.blake2b(repr(self.images.shape[1:]).encode(), digest_size=8)
        pixels = np.ascontiguousarray(self.images).reshape(len(self), -1)
        return np.frombuffer(b"".join([_digest(shape.copy(), image) for image in pixels]), "<u8")

    @property
    def pictures(self) -> npt.NDArray[np.uint64]:
        """Equal for two images with the same content, see `Files.pictures`."""
        return self.keys

    def describe(self, index: int) -> str:
        return f"image {index}"


def _digest(digest: "hashlib.blake2b", image: npt.NDArray[np.uint8]) -> bytes:
    digest.update(image.data)
    return digest.digest()


def _as_array(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"{name} must form one array: {error}") from None


def _how_to_convert(images: npt.NDArray[Any]) -> str:
    """Return the code that makes uint8 (n, H, W, C) of other images."""
    if images.dtype.kind == "f":
        return "multiply images in [0, 1] by 255 and convert with .astype(np.uint8)"
    if images.dtype == np.uint16:
        return "keep the upper 8 bits of 16 with (images >> 8).astype(np.uint8)"
    if images.dtype != np.uint8:
        return "convert images in 0 to 255 with .astype(np.uint8)"
    return "add the channel of grey images with images[..., None]" if images.ndim == 3 else "reshape them"


class ImageSource(ABC):
    """A data set: the classes and statistics of its images, and how to load them.

    Subclass it to train on your own data. Split, order, augmentation and loaders come with `ImageData`:

        class Sketches(ImageSource):
            mean, std = (0.9,), (0.2,)  # one channel
            image_size = resize = 64

            def classes(self, root):
                return ["cat", "dog"]

            def load(self, root, split):
                with np.load(root / f"sketches-{split}.npz") as file:
                    return Arrays(file["images"], file["labels"])

    and name the class in a config: `data: {dataset: {class_path: my_module.Sketches}}`. Arguments of `__init__` become
    config keys under `init_args`. For image files, `load` returns a table: `file_table(directory, classes)` if there is
    one directory per class.

    Attributes:
        mean: Mean of each channel over the training images, in [0, 1]; one value for grey images, three for RGB.
        std: Standard deviation of each channel, likewise.
        image_size: Height and width of the network's input.
        resize: Length of the shorter side before the central crop to `image_size`; only for image files.
        apply_exif_orientation: Rotate images as their EXIF orientation says; only for image files.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize: int
    apply_exif_orientation: bool = True

    @abstractmethod
    def classes(self, root: Path) -> list[str]:
        """Return the names of the classes in the order of their labels, without loading images from the data root."""

    @abstractmethod
    def load(self, root: Path, split: Split) -> Arrays | Files:
        """Return a split ("test" is for the final result); raise a DataError if files are missing or damaged."""

    def prepare(self, root: Path, download: bool) -> None:  # noqa: B027 - optional
        """Download missing data if `download` is set; called once per machine, before `load`."""


class Digits(ImageSource):
    """The 1,797 handwritten digits of scikit-learn's load_digits, part of reslab: 8×8, 17 levels of grey.

    There is no official split: a fixed, stratified fifth (359 images) is the test set. Source: Alpaydin & Kaynak 1998,
    "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (CC BY 4.0), test part.
    """

    mean, std = (0.3051,), (0.3756,)
    image_size = resize = 8

    def classes(self, root: Path) -> list[str]:
        return [str(digit) for digit in range(10)]

    def load(self, root: Path, split: Split) -> Arrays:
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            levels, labels = file["images"], file["labels"].astype(np.int64)
        images = np.round(levels.astype(np.float64) * 255 / 16).astype(np.uint8)[..., None]
        train, test = hold_out(np.arange(len(labels)), labels, 359, seed=0)
        part = train if split == "train" else test
        return Arrays(images[part], labels[part])


class CIFAR10(ImageSource):
    """CIFAR-10 (Krizhevsky 2009) in ROOT/cifar-10-batches-py: 50,000 + 10,000 images, 32×32 RGB; 170 MB to download."""

    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    image_size = resize = 32
    _torchvision: type[tvd.CIFAR10] = tvd.CIFAR10
    _names = "airplane automobile bird cat deer dog frog horse ship truck"

    def classes(self, root: Path) -> list[str]:
        return self._names.split()

    def _files(self, root: Path) -> dict[Path, str]:
        source = self._torchvision
        listed = [*source.train_list, *source.test_list, [source.meta["filename"], source.meta["md5"]]]
        return {root / source.base_folder / name: md5 for name, md5 in listed}

    def prepare(self, root: Path, download: bool) -> None:
        if download and not any(path.exists() for path in self._files(root)):
            _download(lambda: self._torchvision(str(root), download=True), root)

    def load(self, root: Path, split: Split) -> Arrays:
        files, folder = self._files(root), self._torchvision.base_folder
        missing = [path for path in files if not path.exists()]
        if missing:
            raise DataError(
                f"{missing[0]} does not exist ({len(missing)} of {len(files)} files missing). "
                f"Set --data.root or $RESLAB_DATA to the directory that contains {folder}, "
                f"or remove what is left of it and download {self._torchvision.url} with --data.download true"
            )
        try:
            data = self._torchvision(str(root), train=split == "train")
        except RuntimeError:
            damaged = [str(path) for path, md5 in files.items() if not check_integrity(str(path), md5)]
            raise DataError(
                f"damaged (wrong MD5): {', '.join(damaged)}. "
                f"Remove {root / folder} and download it again with --data.download true"
            ) from None
        except OSError as error:
            raise DataError(f"{root / folder} cannot be read: {error}") from error
        return Arrays(np.ascontiguousarray(data.data), np.array(data.targets, np.int64))


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009) in ROOT/cifar-100-python: sizes as CIFAR-10, 100 classes."""

    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    _torchvision = tvd.CIFAR100
    _names = (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
        "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
        "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark "
        "shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone "
        "television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    )


class ImageFolder(ImageSource):
    """Image files in one directory per class: ROOT/FOLDER/TRAIN/<class>/ and ROOT/FOLDER/TEST/<class>/.

    Hidden files and directories are skipped; `reslab doctor` reports what is skipped or ignored. For evaluation, the
    shorter side is resized to image_size × 256/224 and the centre is cropped, as in torchvision's
    reference. Statistics default to ImageNet's.

    Args:
        folder: Directory of the data set, relative to the data root or absolute.
        train: Its subdirectory of training images.
        test: Its subdirectory of test images.
        image_size: Side of the network's input images.
        mean: Mean of each channel, in [0, 1]; a single value makes the images grey.
        std: Standard deviation of each channel.
        apply_exif_orientation: Rotate images as their EXIF orientation says, unlike torchvision's ImageFolder.
    """

    def __init__(
        self,
        folder: str,
        train: str = "train",
        test: str = "val",
        image_size: int = 224,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        apply_exif_orientation: bool = True,
    ) -> None:
        if len(mean) != len(std) or len(mean) not in (1, 3):
            raise UserError("mean and std must have one value each (grey images) or three each (RGB)")
        self.folder, self.train, self.test = folder, train, test
        self.image_size, self.resize = image_size, round(image_size * 256 / 224)
        self.mean, self.std, self.apply_exif_orientation = tuple(mean), tuple(std), apply_exif_orientation

    def classes(self, root: Path) -> list[str]:
        return self._class_folders(root, "train")[1]

    def load(self, root: Path, split: Split) -> Files:
        top, folders = self._class_folders(root, split)
        train, test = set(self._class_folders(root, "train")[1]), set(folders)
        if split == "test" and train != test:
            raise DataError(
                f"the class directories in {root / self.folder / self.train} and in {self.test} differ. "
                f"Only in {self.train}: {shorten(train - test)}. Only in {self.test}: {shorten(test - train)}. "
                "Both must have one directory per class, with the same names"
            )
        return file_table(top, folders)

    def _class_folders(self, root: Path, split: Split) -> tuple[Path, list[str]]:
        top = root / self.folder / (self.train if split == "train" else self.test)
        if not top.is_dir():
            raise DataError(f"{top} does not exist. {self._remedy(root, top)}")
        folders = Walk(top).directories()
        if not folders:
            raise DataError(f"{top} has no class directories. {self._remedy(root, top)}")
        return top, folders

    def _remedy(self, root: Path, top: Path) -> str:
        return (
            f"Put the images into {root / self.folder}/{{{self.train},{self.test}}}/<class>/, "
            "or set --data.root, $RESLAB_DATA or the data set's `folder`"
        )


class Imagenette(ImageFolder):
    """Imagenette 2 (Howard 2019): ten easy classes of ImageNet, 9,469 training and 3,925 validation images.

    Args:
        size: Which archive: a shorter side of 160 or 320 pixels, or full size.
        folder: Directory relative to the data root (default: the name of the archive).
        image_size: Side of the network's input images.
    """

    _names = {
        "n01440764": "tench",
        "n02102040": "English springer",
        "n02979186": "cassette player",
        "n03000684": "chain saw",
        "n03028079": "church",
        "n03394916": "French horn",
        "n03417042": "garbage truck",
        "n03425413": "gas pump",
        "n03445777": "golf ball",
        "n03888257": "parachute",
    }

    def __init__(
        self, size: Literal["160px", "320px", "full"] = "160px", folder: str | None = None, image_size: int = 128
    ) -> None:
        self.size = size
        self.archive = {"160px": "imagenette2-160", "320px": "imagenette2-320", "full": "imagenette2"}[size]
        super().__init__(folder or self.archive, image_size=image_size, apply_exif_orientation=False)

    def classes(self, root: Path) -> list[str]:
        return list(self._names.values())

    def load(self, root: Path, split: Split) -> Files:
        expected, folders = set(self._names), set(self._class_folders(root, split)[1])
        if folders != expected:
            raise DataError(
                f"{root / self.folder} is not Imagenette: missing {shorten(expected - folders)}, "
                f"unknown {shorten(folders - expected)}. For other classes use reslab.data.ImageFolder"
            )
        return super().load(root, split)

    def prepare(self, root: Path, download: bool) -> None:
        if download and self.folder == self.archive and not (root / self.folder).exists():
            _download(lambda: tvd.Imagenette(str(root), size=self.size, download=True), root)


_HOW_TO_SORT_IMAGENET = """Its images must be sorted into class directories.
Put ILSVRC2012_devkit_t12.tar.gz (https://image-net.org), which lists their classes, into {root} and run
python - <<'END'
from pathlib import Path
from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive
parse_devkit_archive("{root}")
for wnid, image in zip(load_meta_file("{root}")[1], sorted(Path("{top}").glob("*.JPEG")), strict=True):
    folder = image.parent / wnid
    folder.mkdir(exist_ok=True)
    image.rename(folder / image.name)
END"""


class ImageNet(ImageFolder):
    """ImageNet-1k (ILSVRC 2012) in class directories, ROOT/imagenet/{train,val}/<wnid>/; val is the test set.

    EXIF orientation is ignored, as in torchvision's reference, so that accuracies are comparable.
    """

    def __init__(
        self, folder: str = "imagenet", train: str = "train", test: str = "val", image_size: int = 224
    ) -> None:
        super().__init__(folder, train, test, image_size, apply_exif_orientation=False)

    def _remedy(self, root: Path, top: Path) -> str:
        folder = root / self.folder
        if top.is_dir() and top.name == self.test:
            return _HOW_TO_SORT_IMAGENET.format(top=top, root=folder)
        return (
            "Download ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from "
            f"https://image-net.org (login required) into {folder} and unpack them with\n"
            '  python -c "from torchvision.datasets import ImageNet; '
            f"[ImageNet('{folder}', split) for split in ('train', 'val')]\"\n"
            f"or set --data.root or $RESLAB_DATA to the directory that contains {self.folder}"
        )


def shorten(names: set[str]) -> str:
    """Join the first ten names, sorted, and count the others."""
    text = ", ".join(sorted(names)[:10]) or "none"
    return f"{text} and {len(names) - 10} more" if len(names) > 10 else text


def _download(download: Callable[[], object], root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        download()
    except (OSError, RuntimeError) as error:  # no network, disk full, wrong hash
        raise DataError(
            f"the download into {root} failed: {error}. Try again, or download the data on another machine and "
            "set --data.root or $RESLAB_DATA"
        ) from error
