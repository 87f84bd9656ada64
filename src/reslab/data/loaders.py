"""The two ways to a batch: in-memory arrays indexed a whole batch at once, and image files through workers.

Both are map-style data sets whose key is a whole batch, see BatchKey: the sampler runs in the main
process and all randomness is a function of the key, so that no worker count can change a batch.
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from reslab.data import order
from reslab.data.augment import Augment
from reslab.data.datasets import Arrays
from reslab.data.decode import RandomCrop, decode, named, resize_and_crop
from reslab.data.files import DataError, Files
from reslab.data.order import Ints

PREFETCH_FACTOR = 2  # batches that each loader process makes before they are wanted


class BatchKey(NamedTuple):
    """What a batch is a function of: the indices of its images, the epoch, and the optimizer step in that."""

    indices: Ints
    epoch: int = 0
    step: int = 0


class Batch(NamedTuple):
    """A batch before and after it is finished on the device.

    Attributes:
        images: uint8 (N, H, W, C) from the loader; for the network float32 (N, C, H, W) in channels_last.
        labels: int64 (N,); -1 is padding and counts nowhere.
        indices: int64 (N,), the place in the data set; -1 is padding.
        augment_params: int32 (N, 9), the augmentation's parameters; (N, 0) where there is none. Integers, since
            half-precision plugins round every float of a batch.
        mix: int32 (5,) from the loader, how images are mixed; for the network float32 (), the weight of the own
            labels, the rest being that of `swap_pairs(labels)`; (0,) where images are not mixed.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    augment_params: Tensor
    mix: Tensor = torch.empty(0, dtype=torch.int32)

    def to(self, device: torch.device | str) -> "Batch":
        # Not back to the host without waiting: it would read what is not there yet.
        ahead = torch.device(device).type == "cuda"
        return Batch(*(tensor.to(device, non_blocking=ahead) for tensor in self))

    def copy_from_shared(self) -> "Batch":
        """With images that no loader process writes over; those that were pinned are copies already."""
        return self._replace(images=self.images.clone()) if self.images.is_shared() else self


class FolderBatch(NamedTuple):
    """Images of a folder for prediction: `batch` holds those of `paths`; `unreadable` says (path, reason)."""

    batch: Batch
    paths: list[str]
    unreadable: list[tuple[str, str]]


class TrainOrder(DistributedSampler[BatchKey]):
    """Keys of this rank's micro-batches; a DistributedSampler, so that Lightning adds none of its own.

    Args:
        subset: Indices of the training samples.
        seed: Of the order.
        batch_size: Samples of one optimizer step, over all ranks: a multiple of accumulate × world.
        accumulate: Micro-batches of one optimizer step.
        world: Number of ranks.
        rank: This rank.
        repeats: How often a sample comes in an epoch.
        n: Samples of the whole data set; see `order.repeat`, where samples repeat.
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
        repeats: int = 1,
        n: int = 0,
        position: Callable[[int], tuple[int, int] | None] = lambda length: None,
    ) -> None:
        self.subset, self.seed, self.batch_size = subset, seed, batch_size
        self.parts = accumulate, world, rank
        self.repeats, self.n = repeats, n
        self.position = position
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.subset) // self.batch_size * self.parts[0]

    def __iter__(self) -> Iterator[BatchKey]:
        # A generator: the position is read when the first key is wanted. A DataLoader with workers makes two.
        counted = self.position(len(self))
        if counted is None:
            counted = self.epoch * len(self), len(self)
            self.epoch += 1
        taken, an_epoch = counted
        epoch, first = divmod(taken, an_epoch)
        samples = self.subset[order.permutation(self.seed, epoch, len(self.subset))]
        if self.repeats > 1:
            samples = order.repeat(samples, self.repeats, self.batch_size, self.n)
        for i in range(first, an_epoch):
            indices = order.micro_batch(samples, i, self.batch_size, *self.parts)
            yield BatchKey(indices, epoch, step=i // self.parts[0])


class EvalOrder(DistributedSampler[BatchKey]):
    """Keys of this rank's evaluation batches: every sample once over all ranks, -1 where none is left."""

    def __init__(self, subset: Ints, batch_size: int, world: int = 1, rank: int = 0) -> None:
        self.share = order.evaluation_share(subset, world, rank)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.share) // self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        for start in range(0, len(self.share), self.batch_size):
            yield BatchKey(self.share[start : start + self.batch_size])


class LazyLoader(DataLoader[Any]):
    """A DataLoader that asks its sampler for the first key when the first batch is wanted, not earlier.

    Lightning makes the iterator before it restores a checkpoint (`estimated_stepping_batches` does so), and
    workers that fetch ahead at once would begin at the start of the run.

    Images of FileBatches are copied as they come. A loader process is sent its next key when a batch of its is fetched,
    so while that is copied, this process writes the PREFETCH_FACTOR batches after it and no others.

    Args:
        device: Where its batches are used; to a CUDA device they are copied one batch ahead.
        options: Of DataLoader.
    """

    def __init__(self, *args: Any, device: torch.device | None = None, **options: Any) -> None:
        self.device = device
        super().__init__(*args, **options, prefetch_factor=PREFETCH_FACTOR if options.get("num_workers") else None)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches: Iterator[Any] = super().__iter__()
        if isinstance(self.dataset, FileBatches):
            batches = map(Batch.copy_from_shared, batches)
        yield from batches if self.device is None or self.device.type != "cuda" else ahead(batches, self.device)


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a CUDA device: while one is used, the next is copied from pinned memory on another stream."""
    side = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in chain(batches, [None]):
        arriving = None
        if batch is not None:
            with torch.cuda.stream(side):
                arriving = batch.to(device), side.record_event()
        if waiting is not None:
            yield _arrived(*waiting, torch.cuda.current_stream(device))
        waiting = arriving


def _arrived(batch: Batch, copied: torch.cuda.Event, user: torch.cuda.Stream) -> Batch:
    user.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(user)  # its memory is not given to the next copy before it was used
    return batch


def leave_signals_to_the_run(worker: int) -> None:
    """Keeps a loader process alive when its whole job is signalled, as Slurm and terminals do it.

    The run answers: it comes to the end of its step, for which it needs its loaders, and then ends them by SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Draws:
    """The parameters of all n images (and their copies), drawn once an epoch: far cheaper than a batch at a time."""

    def __init__(self, augment: Augment, seed: int, n: int, size: int) -> None:
        self.augment, self.seed, self.n, self.size = augment, seed, n, size
        self._epoch = -1
        self._table = np.empty((0, 0), np.int32)

    def __call__(self, epoch: int, step: int, indices: Ints) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Of the images (N, k), and of the step's batch as a whole (m,)."""
        if epoch != self._epoch:
            self._table = self.augment.draw(self.seed, epoch, np.arange(self.n * self.augment.repeats), self.size)
            self._epoch = epoch
        return self._table[indices], self.augment.draw_mix(self.seed, epoch, step, self.size)


class ArrayBatches(Dataset[Batch]):
    """Batches of in-memory arrays; with draws for training, without to evaluate. Index i + n × copy is image i of n."""

    def __init__(self, arrays: Arrays, draws: Draws | None = None) -> None:
        self.arrays = arrays
        self.augment_params = draws or Draws(Augment(), 0, len(arrays), 0)

    def __getitem__(self, key: BatchKey) -> Batch:
        indices, epoch, step = key
        rows = indices % len(self.arrays)
        images = torch.from_numpy(self.arrays.images.take(rows, axis=0))  # padding, -1, takes the last image
        self.augment_params.augment.transform(images, self.augment_params.seed, epoch, indices)
        labels, places = (np.where(indices < 0, -1, x) for x in (self.arrays.labels[rows], rows))
        return Batch(images, *map(torch.from_numpy, (labels, places, *self.augment_params(epoch, step, indices))))


class SharedBufferRing:
    """Where a loader process puts its images: memory shared with the main one, used again and again.

    The first touch of every page of fresh memory costs time. A slot's turn comes again after all that can be under way:
    the batches made ahead, and the one that the main process copies (see LazyLoader).
    """

    def __init__(self) -> None:
        self._slots = [torch.empty(0, dtype=torch.uint8)] * (PREFETCH_FACTOR + 1)
        self._turn = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """uint8 of this shape, not blank."""
        size = math.prod(shape)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        self._turn = (self._turn + 1) % len(self._slots)
        if self._slots[self._turn].numel() < size:
            self._slots[self._turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return self._slots[self._turn][:size].view(shape)


class FileBatches(Dataset[Batch]):
    """Batches of image files, decoded and cut to size one by one. Index i + n × copy is file i of n.

    For LazyLoader: in a loader process its images are in memory that is used again.

    Args:
        files: The table of files.
        channels: 1 or 3.
        sizes: Side of the images made, in each epoch; the last stays.
        resize: Length of the shorter side before evaluation's central crop.
        apply_exif_orientation: Turn images as their EXIF entries say.
        augment: For training: random resized crops, and draws of what is done in the batch; None to evaluate.
        seed: Of the augmentation.
        scaled_decode: Of the random crops, see ResizeConfig.
    """

    def __init__(
        self,
        files: Files,
        channels: int,
        sizes: tuple[int, ...],
        resize: int,
        apply_exif_orientation: bool,
        augment: Augment | None = None,
        seed: int = 0,
        scaled_decode: float | None = None,
    ) -> None:
        self.files, self.channels, self.sizes, self.resize, self.apply_exif_orientation = (
            files,
            channels,
            sizes,
            resize,
            apply_exif_orientation,
        )
        self.augment, self.seed = augment, seed
        self.crop = RandomCrop(channels, apply_exif_orientation, augment, scaled_decode) if augment else None
        self._slots = SharedBufferRing()

    def __getitem__(self, key: BatchKey) -> Batch:
        indices, epoch, step = key
        size = self.sizes[min(epoch, len(self.sizes) - 1)]
        augment = self.augment or Augment()
        draws = augment.draw(self.seed, epoch, indices, size)
        mix = augment.draw_mix(self.seed, epoch, step, size)
        numbers = order.uniforms(self.seed, epoch, indices, 22, order.RESIZED_CROP)
        images = self._slots((len(indices), size, size, self.channels))
        rows = np.where(indices < 0, -1, indices % len(self.files))
        for out, row, u in zip(images, rows, numbers, strict=True):
            if row < 0:  # padding
                out.zero_()
            else:
                out.copy_(self._view(self.files.path(row), u, size).permute(1, 2, 0))
        augment.transform(images, self.seed, epoch, indices)
        labels = np.where(rows < 0, -1, self.files.labels[rows])
        return Batch(images, *map(torch.from_numpy, (labels, rows, draws, mix)))

    def _view(self, path: Path, u: npt.NDArray[np.float32], size: int) -> Tensor:
        if self.crop is None:
            return resize_and_crop(decode(path, self.channels, self.apply_exif_orientation), self.resize, size)
        with named(path):
            return self.crop(path.read_bytes(), u, size)


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
    """Image files without labels, apply_exif_orientation and seen as in evaluation; a key is one of FolderOrder's."""

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
