"""Data sets of test images only, for `reslab test RUN --on NAME`: corrupted, re-collected and unusual images."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from reslab.data.datasets import CIFAR10, CIFAR100, Arrays, ImageSource, Split, shorten
from reslab.data.files import DataError, Files, Walk, file_table

Part = tuple[str, Arrays | Files]

NOISE = "gaussian_noise shot_noise impulse_noise "
BLUR = "defocus_blur glass_blur motion_blur zoom_blur "
WEATHER = "snow frost fog brightness "
DIGITAL = "contrast elastic_transform pixelate jpeg_compression"
CORRUPTIONS = (NOISE + BLUR + WEATHER + DIGITAL).split()  # of the benchmark; a mean over others is not comparable
EXTRA_CORRUPTIONS = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # for validation
SEVERITIES = 5


class EvaluationSet(ImageSource):
    """A data set of test images only, in one or several parts; each part is evaluated separately.

    Any other ImageSource may be a further test set too: its test images are one part. Subclass this one for a set that
    has no training images, or whose parts have separate results::

        class Weather(EvaluationSet):
            def classes(self, root):
                return ["car", "bus"]

            def parts(self, root):
                for weather in ("rain", "snow"):
                    yield weather, Arrays(np.load(root / f"{weather}.npy"), np.load(root / "labels.npy"))

    Attributes:
        published_images: Number of images of the published set, if it is always the same.
    """

    mean, std = (0.0,), (1.0,)  # not used: images are normalized, resized and cropped as those of the run
    image_size = resize = 0
    published_images: int | None = None

    @abstractmethod
    def parts(self, root: Path) -> Iterator[Part]:
        """Yield the parts by name; a set with only one part names it ""."""

    def all_parts(self, root: Path) -> dict[str, Arrays | Files]:
        """Return all parts. Arrays that are mapped into memory and tables of files take little of it."""
        return dict(self.parts(root))

    def classes_in(self, root: Path, run_classes: Sequence[str]) -> list[str]:
        """Return the names of this set's classes among those of a run; by default they have the same names."""
        return self.classes(root)

    def summary(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """Return further results, by the accuracies of all parts."""
        return {}

    def load(self, root: Path, split: Split) -> Arrays:
        raise DataError(f"{type(self).__name__} has test images only: use it with `reslab test RUN --on`")


class CIFAR10C(EvaluationSet):
    """CIFAR-10-C (Hendrycks & Dietterich 2019): CIFAR-10's test images with 15 corruptions at 5 severities.

    Files: ROOT/FOLDER/<corruption>.npy, uint8 (50000, 32, 32, 3), the 10,000 test images at severity 1 first, and
    labels.npy (50000,). The parts are called <corruption>/<severity>. mCE is the mean error over all 15 corruptions and
    5 severities, not normalized by another network's errors, as in AugMix (Hendrycks et al. 2020, section 4.1).

    Args:
        folder: Directory relative to the data root or absolute (default: the name of the archive).
        corruptions: Which ones (default: the 15 of the benchmark; 4 others are meant for validation). With fewer than
            the 15 there is no mCE.
    """

    archive, url = "CIFAR-10-C", "https://zenodo.org/records/2535967"
    images_per_severity = 10_000
    _cifar: type[CIFAR10] = CIFAR10

    def __init__(self, folder: str | None = None, corruptions: list[str] | None = None) -> None:
        self.folder, self.corruptions = folder or self.archive, corruptions or list(CORRUPTIONS)
        if unknown := {*self.corruptions} - {*CORRUPTIONS, *EXTRA_CORRUPTIONS}:
            known = ", ".join((*CORRUPTIONS, *EXTRA_CORRUPTIONS))
            raise ValueError(f"corruptions: there is no {shorten(unknown)}; there are {known}")
        self.published_images = SEVERITIES * self.images_per_severity * len({*self.corruptions})

    def classes(self, root: Path) -> list[str]:
        return self._cifar().classes(root)

    def parts(self, root: Path) -> Iterator[Part]:
        top, n = root / self.folder, self.images_per_severity
        labels = self._read(top / "labels.npy", (SEVERITIES * n,))
        for corruption in dict.fromkeys(self.corruptions):
            images = self._read(top / f"{corruption}.npy", (SEVERITIES * n, 32, 32, 3))
            for i in range(SEVERITIES):
                rows = slice(i * n, (i + 1) * n)
                yield f"{corruption}/{i + 1}", Arrays(images[rows], labels[rows])

    def _read(self, path: Path, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        remedy = f"Unpack {self.archive}.tar from {self.url} into the data root ($RESLAB_DATA or --data.root)"
        return read_array(path, shape, remedy)

    def summary(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        by_corruption = {name: [*_starting_with(f"{name}/", accuracies)] for name in self.corruptions}
        means = {f"test/acc/{name}": float(np.mean(values)) for name, values in by_corruption.items()}
        if not {*CORRUPTIONS} <= {*by_corruption}:
            return means
        return {"test/mCE": 1 - float(np.mean([by_corruption[name] for name in CORRUPTIONS])), **means}


class CIFAR100C(CIFAR10C):
    """CIFAR-100-C (Hendrycks & Dietterich 2019): as CIFAR-10-C, of CIFAR-100's test images."""

    archive, url = "CIFAR-100-C", "https://zenodo.org/records/3555552"
    _cifar = CIFAR100


class CIFAR101(EvaluationSet):
    """CIFAR-10.1 (Recht et al. 2018): new test images for CIFAR-10, collected as the original ones were.

    Files: ROOT/FOLDER/cifar10.1_<version>_data.npy, uint8 (n, 32, 32, 3), and cifar10.1_<version>_labels.npy.

    Args:
        version: v6, 2,000 images with the same number per class (the authors' recommendation), or v4, 2,021 images.
        folder: Directory relative to the data root or absolute.
    """

    sizes = {"v4": 2021, "v6": 2000}

    def __init__(self, version: Literal["v4", "v6"] = "v6", folder: str = "cifar-10.1") -> None:
        self.version, self.folder = version, folder
        self.published_images = self.sizes[version]

    def classes(self, root: Path) -> list[str]:
        return CIFAR10().classes(root)

    def parts(self, root: Path) -> Iterator[Part]:
        n, stem = self.sizes[self.version], root / self.folder / f"cifar10.1_{self.version}"
        remedy = f"Download {stem.name}_data.npy and {stem.name}_labels.npy from " + (
            f"https://github.com/modestyachts/CIFAR-10.1/tree/master/datasets into {stem.parent}"
        )
        images = read_array(stem.with_name(f"{stem.name}_data.npy"), (n, 32, 32, 3), remedy)
        yield "", Arrays(images, read_array(stem.with_name(f"{stem.name}_labels.npy"), (n,), remedy))


class ImageNetSet(EvaluationSet):
    """Image files in one directory per class, ROOT/FOLDER/<class>/, of ImageNet's classes.

    Args:
        folder: Directory relative to the data root or absolute (default: the name in the archive).
    """

    archive: str
    url: str
    num_classes: int
    apply_exif_orientation = False  # as for ImageNet

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder or self.archive

    def classes(self, root: Path) -> list[str]:
        top = root / self.folder
        remedy = f"Unpack {self.url} into the data root ($RESLAB_DATA or --data.root)"
        if not top.is_dir():
            raise DataError(f"{top} does not exist. {remedy}")
        names = Walk(top).directories()
        if len(names) != self.num_classes:
            raise DataError(f"{top} has {len(names)} class directories instead of {self.num_classes}. {remedy}")
        return names

    def parts(self, root: Path) -> Iterator[Part]:
        yield "", file_table(root / self.folder, self.classes(root))


class ImageNetA(ImageNetSet):
    """ImageNet-A (Hendrycks et al. 2021, arXiv:1907.07174): 7,500 natural images of 200 classes that fool ResNet-50."""

    archive, url = "imagenet-a", "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar"
    num_classes, published_images = 200, 7500


class ImageNetR(ImageNetSet):
    """ImageNet-R (Hendrycks et al. 2021, arXiv:2006.16241): 30,000 renditions (art, toys, ...) of 200 classes."""

    archive, url = "imagenet-r", "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"
    num_classes, published_images = 200, 30_000


class ImageNetV2(ImageNetSet):
    """ImageNet-V2 (Recht et al. 2019), matched frequency: 10,000 new images, ten per class.

    The directories are called 0 to 999: the position of the class among ImageNet's, sorted by WordNet id.
    """

    archive = "imagenetv2-matched-frequency-format-val"
    url = "https://huggingface.co/datasets/vaishaal/ImageNetV2 (imagenetv2-matched-frequency.tar.gz)"
    num_classes, published_images = 1000, 10_000

    def classes(self, root: Path) -> list[str]:
        names = super().classes(root)
        if unknown := {*names} - {*map(str, range(self.num_classes))}:
            raise DataError(f"the class directories in {root / self.folder} must be 0 to 999, got {shorten(unknown)}")
        return sorted(names, key=int)

    def classes_in(self, root: Path, run_classes: Sequence[str]) -> list[str]:
        self.classes(root)
        is_imagenet = len(run_classes) == self.num_classes and [*run_classes] == sorted(run_classes)
        if not (is_imagenet and all(name[:1] == "n" and name[1:].isdigit() for name in run_classes)):
            raise DataError(
                f"ImageNet-V2 numbers ImageNet's {self.num_classes} classes in the order of their WordNet ids, such as "
                f"n01440764; the run's {len(run_classes)} classes are not these: {shorten({*run_classes})}"
            )
        return [*run_classes]


def read_array(path: Path, shape: tuple[int, ...], remedy: str) -> npt.NDArray[Any]:
    """Map a .npy file into memory; raise a DataError if it is missing, damaged, or has another shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. {remedy}") from None
    except (OSError, ValueError, EOFError) as error:  # cut off, or no .npy file
        raise DataError(f"{path} cannot be read ({error}). {remedy}") from None
    if array.shape != shape:
        raise DataError(f"{path} must have the shape {shape}, got {array.shape}. {remedy}")
    return array


def _starting_with(prefix: str, accuracies: Mapping[str, float]) -> Iterator[float]:
    return (value for name, value in accuracies.items() if name.startswith(prefix))
