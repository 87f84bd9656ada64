"""Batches: map-style datasets that return a whole batch for a key (see `samplers`), from memory or from files."""

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from reslab.data import order
from reslab.data.augment import Augment
from reslab.data.datasets import Arrays
from reslab.data.decode import RandomCrop, as_data_error, decode, resize_and_crop
from reslab.data.files import DataError, Files
from reslab.data.samplers import BatchKey

PREFETCH_FACTOR = 2  # batches that each worker loads in advance


class Batch(NamedTuple):
    """A batch, before and after it is augmented and normalised on the device.

    Attributes:
        images: uint8 (N, H, W, C) from the loader; float32 (N, C, H, W) in channels_last for the network.
        labels: int64 (N,); -1 for padding, which metrics ignore.
        indices: int64 (N,), positions in the data set; -1 for padding.
        augment_params: int32 (N, 9 or 0), see `Augment.params`. Integers, because Lightning's half-precision plugins
            round every float tensor of a batch.
        mix: From the loader, int32 (5 or 0,), see `Augment.mix_params`. For the network, the mixup lambda, float32 ():
            the weight of `labels`; `swap_pairs(labels)` have the weight 1 - lambda.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    augment_params: Tensor
    mix: Tensor = torch.empty(0, dtype=torch.int32)

    def to(self, device: torch.device | str) -> "Batch":
        # Only copies to a GPU may be asynchronous: the host would read memory that is not yet written.
        to_gpu = torch.device(device).type == "cuda"
        return Batch(*(tensor.to(device, non_blocking=to_gpu) for tensor in self))


class FolderBatch(NamedTuple):
    """Images of a directory for prediction: `batch` holds the images at `paths`; `unreadable` are (path, reason)."""

    batch: Batch
    paths: list[str]
    unreadable: list[tuple[str, str]]


class ArrayBatches(Dataset[Batch]):
    """Batches of in-memory arrays, with augmentation parameters in training. Index i + n × copy is image i of n.

    Args:
        with_images: Without images, LazyLoader adds them from the copy of all images on the device.
    """

    def __init__(self, arrays: Arrays, augment: Augment | None = None, seed: int = 0, with_images: bool = True) -> None:
        self.arrays, self.augment, self.seed, self.with_images = arrays, augment or Augment(), seed, with_images
        self._epoch, self._table = -1, np.empty((0, 0), np.int32)

    def __getitem__(self, key: BatchKey) -> Batch:
        indices, epoch, step = key
        rows = indices % len(self.arrays)
        images = torch.empty(0, dtype=torch.uint8)
        if self.with_images:
            images = torch.from_numpy(self.arrays.images.take(rows, axis=0))  # padding (-1) takes the last image
            self.augment.transform(images, self.seed, epoch, indices)
        labels, positions = (np.where(indices < 0, -1, x) for x in (self.arrays.labels[rows], rows))
        params = self._params(epoch)[indices]
        mix_params = self.augment.mix_params(self.seed, epoch, step, self.arrays.images.shape[1])
        return Batch(images, *map(torch.from_numpy, (labels, positions, params, mix_params)))

    def without_images(self) -> "ArrayBatches":
        return ArrayBatches(self.arrays, self.augment, self.seed, with_images=False)

    def _params(self, epoch: int) -> npt.NDArray[np.int32]:
        """Return the augmentation parameters of all images: once per epoch is far cheaper than for each batch."""
        if epoch != self._epoch:
            indices = np.arange(len(self.arrays) * self.augment.repeats)
            self._table = self.augment.params(self.seed, epoch, indices, self.arrays.images.shape[1])
            self._epoch = epoch
        return self._table


@dataclass(eq=False, repr=False)
class FileBatches(Dataset[Batch]):
    """Batches of image files, each decoded and cropped or resized to one size. Index i + n × copy is file i of n.

    Requires LazyLoader: workers reuse the memory of their images.

    Args:
        channels, apply_exif_orientation: See `decode_bytes`.
        sizes: Side of the images in each epoch; the last one applies to all later epochs.
        resize: Length of the shorter side before the central crop of evaluation.
        augment: For training: random resized crops, and the parameters of the other augmentations. None for evaluation.
        scaled_decode: See ResizeConfig.
    """

    files: Files
    channels: int
    apply_exif_orientation: bool
    sizes: tuple[int, ...]
    resize: int
    augment: Augment | None = None
    seed: int = 0
    scaled_decode: float | None = None

    def __post_init__(self) -> None:
        view = self.channels, self.apply_exif_orientation
        self._crop = RandomCrop(*view, self.augment, self.scaled_decode) if self.augment else None
        self._buffers = deque([torch.empty(0, dtype=torch.uint8)] * (PREFETCH_FACTOR + 1))

    def __getitem__(self, key: BatchKey) -> Batch:
        indices, epoch, step = key
        size = self.sizes[min(epoch, len(self.sizes) - 1)]
        augment = self.augment or Augment()
        params = augment.params(self.seed, epoch, indices, size)
        mix_params = augment.mix_params(self.seed, epoch, step, size)
        crops = order.uniforms(self.seed, epoch, indices, 22, order.RESIZED_CROP)
        images = self._uninitialised((len(indices), size, size, self.channels))
        rows = np.where(indices < 0, -1, indices % len(self.files))
        for out, row, u in zip(images, rows, crops, strict=True):
            if row < 0:  # padding
                out.zero_()
            else:
                out.copy_(self._load(self.files.path(row), u, size).permute(1, 2, 0))
        augment.transform(images, self.seed, epoch, indices)
        labels = np.where(rows < 0, -1, self.files.labels[rows])
        return Batch(images, *map(torch.from_numpy, (labels, rows, params, mix_params)))

    def _uninitialised(self, shape: tuple[int, ...]) -> Tensor:
        """Return uint8 memory for a batch; in a worker it is shared with the main process, and the oldest is reused.

        Touching the pages of new memory is slow. Reuse is safe, because a worker is at most PREFETCH_FACTOR batches
        ahead of the batch that the main process is copying, see LazyLoader.
        """
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        size, buffer = math.prod(shape), self._buffers.popleft()
        if buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8).share_memory_()
        self._buffers.append(buffer)
        return buffer[:size].view(shape)

    def _load(self, path: Path, u: npt.NDArray[np.float32], size: int) -> Tensor:
        if self._crop is None:
            return resize_and_crop(decode(path, self.channels, self.apply_exif_orientation), self.resize, size)
        with as_data_error(path):
            return self._crop(path.read_bytes(), u, size)


@dataclass(eq=False, repr=False)
class FolderBatches(Dataset[FolderBatch]):
    """Batches of unlabelled image files, preprocessed as in evaluation; the keys are those of FolderOrder."""

    folder: Path
    channels: int
    apply_exif_orientation: bool
    size: int
    resize: int
    skip_unreadable: bool

    def __getitem__(self, key: tuple[int, list[str]]) -> FolderBatch:
        first, names = key
        images = torch.empty((len(names), self.size, self.size, self.channels), dtype=torch.uint8)
        readable, unreadable = [], []
        for i, name in enumerate(names):
            try:
                image = decode(self.folder / name, self.channels, self.apply_exif_orientation)
            except DataError as error:
                if not self.skip_unreadable:
                    raise
                unreadable.append((name, str(error)))
            else:
                images[i] = resize_and_crop(image, self.resize, self.size).permute(1, 2, 0)
                readable.append(i)
        rows = torch.tensor(readable, dtype=torch.int64)
        no_params = torch.empty((len(rows), 0), dtype=torch.int32)
        batch = Batch(images[rows], torch.full_like(rows, -1), first + rows, no_params)
        return FolderBatch(batch, [names[i] for i in readable], unreadable)
