"""The two ways to a batch: in-memory arrays indexed a whole batch at once, and image files through workers.

Both are map-style data sets whose key is a whole batch, (epoch, indices): the sampler runs in the main
process and all randomness is a function of the key, so that no worker count can change a batch.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as tvf

from reslab.data import order
from reslab.data.augment import Augment, resized_crop_box
from reslab.data.datasets import Arrays, DataError, Files
from reslab.data.order import Ints

Key = tuple[int, Ints]


class Batch(NamedTuple):
    """A batch before and after it is finished on the device.

    Attributes:
        images: uint8 (N, H, W, C) from the loader; for the network float32 (N, C, H, W) in channels_last.
        labels: int64 (N,); -1 is padding and counts nowhere.
        indices: int64 (N,), the place in the data set; -1 is padding.
        draws: int32 (N, 5), the augmentation's parameters; (N, 0) where there is none. Integers, since
            half-precision plugins round every float of a batch.
        mix: int32 (5,) from the loader, how images are mixed; for the network float32 (), the weight of the own
            labels, the rest being that of `labels.roll(1)`; (0,) where images are not mixed.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    draws: Tensor
    mix: Tensor = torch.empty(0, dtype=torch.int32)

    def to(self, device: torch.device | str) -> "Batch":
        # Not back to the host without waiting: it would read what is not there yet.
        ahead = torch.device(device).type == "cuda"
        return Batch(*(tensor.to(device, non_blocking=ahead) for tensor in self))


class FolderBatch(NamedTuple):
    """Images of a folder for prediction: `batch` holds those of `paths`; `unreadable` says (path, reason)."""

    batch: Batch
    paths: list[str]
    unreadable: list[tuple[str, str]]


class TrainOrder(DistributedSampler[Key]):
    """Keys of this rank's micro-batches; a DistributedSampler, so that Lightning adds none of its own.

    Args:
        subset: Indices of the training samples.
        seed: Of the order.
        batch_size: Samples of one optimizer step, over all ranks: a multiple of accumulate × world.
        accumulate: Micro-batches of one optimizer step.
        world: Number of ranks.
        rank: This rank.
        position: Given the epoch's length, how many micro-batches were taken since training began, and how
            many make an epoch; None where no trainer counts them: then each iteration is the next epoch.
    """

    def __init__(
        self,
        subset: Ints,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        world: int = 1,
        rank: int = 0,
        position: Callable[[int], tuple[int, int] | None] = lambda length: None,
    ) -> None:
        self.subset, self.seed, self.batch_size = subset, seed, batch_size
        self.parts = accumulate, world, rank
        self.position = position
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.subset) // self.batch_size * self.parts[0]

    def __iter__(self) -> Iterator[Key]:
        # A generator: the position is read when the first key is wanted. A DataLoader with workers makes two.
        counted = self.position(len(self))
        if counted is None:
            counted = self.epoch * len(self), len(self)
            self.epoch += 1
        taken, an_epoch = counted
        epoch, first = divmod(taken, an_epoch)
        samples = self.subset[order.permutation(self.seed, epoch, len(self.subset))]
        for i in range(first, an_epoch):
            yield epoch, order.micro_batch(samples, i, self.batch_size, *self.parts)


class EvalOrder(DistributedSampler[Key]):
    """Keys of this rank's evaluation batches: every sample once over all ranks, -1 where none is left."""

    def __init__(self, subset: Ints, batch_size: int, world: int = 1, rank: int = 0) -> None:
        self.share = order.evaluation_share(subset, world, rank)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.share) // self.batch_size)

    def __iter__(self) -> Iterator[Key]:
        for start in range(0, len(self.share), self.batch_size):
            yield 0, self.share[start : start + self.batch_size]


class LateLoader(DataLoader[Any]):
    """A DataLoader that asks its sampler for the first key when the first batch is wanted, not earlier.

    Lightning makes the iterator before it restores a checkpoint (`estimated_stepping_batches` does so), and
    workers that fetch ahead at once would begin at the start of the run.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class Draws:
    """The parameters of every image, drawn for all n once an epoch: far cheaper than a batch at a time."""

    def __init__(self, augment: Augment, seed: int, n: int, size: int) -> None:
        self.augment, self.seed, self.n, self.size = augment, seed, n, size
        self._epoch = -1
        self._table = np.empty((0, 0), np.int32)

    def __call__(self, epoch: int, indices: Ints) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Of the images (N, k), and of the batch as a whole (m,)."""
        if epoch != self._epoch:
            self._table = self.augment.draw(self.seed, epoch, np.arange(self.n), self.size)
            self._epoch = epoch
        return self._table[indices], self.augment.draw_mix(self.seed, epoch, indices, self.size)


class ArrayBatches(Dataset[Batch]):
    """Batches of in-memory arrays; with draws for training, without to evaluate."""

    def __init__(self, arrays: Arrays, draws: Draws | None = None) -> None:
        self.arrays = arrays
        self.draws = draws or Draws(Augment(), 0, len(arrays), 0)

    def __getitem__(self, key: Key) -> Batch:
        epoch, indices = key
        images = self.arrays.images.take(indices, axis=0)  # padding, -1, takes the last image
        labels = np.where(indices < 0, -1, self.arrays.labels[indices])
        return Batch(*map(torch.from_numpy, (images, labels, indices, *self.draws(epoch, indices))))


def decode(path: Path, channels: int) -> Tensor:
    """The image at a path, upright by its EXIF entry: uint8 (C, H, W), grey for one channel, RGB for three.

    Raises:
        DataError: it cannot be read, with its path and the reason.
    """
    try:
        data = path.read_bytes()
        if data.startswith((b"\xff\xd8\xff", b"\x89PNG")):
            mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
            with suppress(RuntimeError):  # damaged, or a rare kind: PIL reads it, or says what is wrong
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                image = decode_image(encoded, mode, apply_exif_orientation=True)
                return tvf.to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        return tvf.pil_to_tensor(upright.convert("RGB" if channels == 3 else "L"))
    except UnidentifiedImageError:
        raise DataError(f"{path} is no image that can be read: restore or remove it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({error}): restore or remove it") from None


def resize_and_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Evaluation's view: the shorter side to `resize`, antialiased, then the centre (C, size, size)."""
    return tvf.center_crop(tvf.resize(image, [resize], antialias=True), [size, size])


class FileBatches(Dataset[Batch]):
    """Batches of image files, decoded and cut to size one by one.

    Args:
        files: The table of files.
        channels: 1 or 3.
        size: Side of the images made.
        resize: Length of the shorter side before evaluation's central crop.
        augment: For training: random resized crops, and draws of what is done in the batch; None to evaluate.
        seed: Of the augmentation.
    """

    def __init__(
        self,
        files: Files,
        channels: int,
        size: int,
        resize: int,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.files, self.channels, self.size, self.resize = files, channels, size, resize
        self.augment, self.seed = augment, seed

    def __getitem__(self, key: Key) -> Batch:
        epoch, indices = key
        augment = self.augment or Augment()
        draws = augment.draw(self.seed, epoch, indices, self.size)
        mix = augment.draw_mix(self.seed, epoch, indices, self.size)
        boxes = np.empty((len(indices), 0), np.float32)
        if self.augment is not None:
            boxes = order.uniforms(self.seed, epoch, indices, 22, order.RESIZED_CROP)
        images = torch.zeros((len(indices), self.size, self.size, self.channels), dtype=torch.uint8)
        for out, index, box in zip(images, indices, boxes, strict=True):
            if index >= 0:  # else padding: black
                image = decode(self.files.path(index), self.channels)
                out.copy_(self._fit(image, box).permute(1, 2, 0))
        labels = np.where(indices < 0, -1, self.files.labels[indices])
        return Batch(images, *map(torch.from_numpy, (labels, indices, draws, mix)))

    def _fit(self, image: Tensor, box: npt.NDArray[np.float32]) -> Tensor:
        if self.augment is None:
            return resize_and_crop(image, self.resize, self.size)
        height, width = image.shape[-2:]
        top, left, h, w = resized_crop_box(box, height, width, self.augment.scale, self.augment.ratio)
        return tvf.resized_crop(image, top, left, h, w, [self.size, self.size], antialias=True)


class FolderOrder:
    """Keys of the batches of a folder: how many images came before, and the names of the next ones, sorted."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        names = image_paths(self.folder)
        count = 0
        while some := list(islice(names, self.batch_size)):
            yield count, some
            count += len(some)
        if not count:
            raise DataError(f"{self.folder} holds no image files ({', '.join(IMG_EXTENSIONS)})")


def image_paths(folder: Path, prefix: str = "") -> Iterator[str]:
    """Relative names of the image files below a folder, in the order of all names sorted."""
    try:
        with os.scandir(folder / prefix) as entries:
            found = sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in entries)
    except OSError as error:
        raise DataError(f"{folder / prefix} cannot be listed ({error.strerror})") from error
    for name in found:
        if name.endswith("/"):
            yield from image_paths(folder, prefix + name)
        elif name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".":
            yield prefix + name


class FolderBatches(Dataset[FolderBatch]):
    """Image files without labels, seen as in evaluation; a key is one of FolderOrder's."""

    def __init__(self, folder: Path, channels: int, size: int, resize: int, skip_unreadable: bool) -> None:
        self.folder = folder
        self.channels, self.size, self.resize = channels, size, resize
        self.skip_unreadable = skip_unreadable

    def __getitem__(self, key: tuple[int, list[str]]) -> FolderBatch:
        first, names = key
        images, indices, unreadable = [], [], []
        for index, name in enumerate(names):
            try:
                image = decode(self.folder / name, self.channels)
            except DataError as error:
                if not self.skip_unreadable:
                    raise
                unreadable.append((name, str(error)))
                continue
            images.append(resize_and_crop(image, self.resize, self.size).permute(1, 2, 0))
            indices.append(index)
        none = torch.empty((0, self.size, self.size, self.channels), dtype=torch.uint8)
        labels = torch.full((len(indices),), -1)
        draws = torch.empty((len(indices), 0), dtype=torch.int32)
        places = first + torch.tensor(indices, dtype=torch.int64)
        batch = Batch(torch.stack(images) if images else none, labels, places, draws)
        return FolderBatch(batch, [names[i] for i in indices], unreadable)
