"""ImageData: the split of a data set, its loaders, and the augmentation and normalisation of batches on the device."""

import os
import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reslab.data.augment import Augment, mix, normalize
from reslab.data.batches import ArrayBatches, Batch, FileBatches, FolderBatch, FolderBatches
from reslab.data.datasets import Arrays, ImageSource, Split
from reslab.data.decode import simplejpeg
from reslab.data.files import DataError, Files, printable
from reslab.data.identity import DataIdentity, identify
from reslab.data.loader import LazyLoader, ignore_job_signals
from reslab.data.order import Ints, check_folds, fold_out, hold_out
from reslab.data.resize import ResizeConfig
from reslab.data.samplers import BatchKey, EvalOrder, FolderOrder, TrainOrder
from reslab.errors import UserError
from reslab.host import available_cores
from reslab.training.lightning_internals import batches_taken

DEVICE_MEMORY_SHARE = 0.1  # of the free memory: the largest data set that `on_device: auto` puts on a GPU


class ImageData(LightningDataModule):
    """Images for training and evaluation; their order and augmentation depend only on the seed.

    The loaders yield uint8 batches; `on_after_batch_transfer` augments and normalises them on the device. Call it
    yourself in a loop without a Trainer.

    Args:
        dataset: See configs/data.
        root: Directory of the data sets (default: $RESLAB_DATA, else `data`).
        batch_size: Samples per optimizer step, over all devices and accumulated micro-batches.
        eval_batch_size: Samples per evaluation batch on one device (default: as in a training batch).
        val_split: Fraction (below 1) or number of training images held out for validation; 0 for none. Which ones
            depends on their identity (the path of a file, the content of an array), see `order.hold_out`.
        split_seed: Seed of the validation split or of the folds, independent of the run's seed.
        seed: Seed of the order and the augmentation.
        num_workers: Loader processes per device (default: 0 for data in memory, CPU cores / devices for image files).
        augment: Augmentation of training images.
        resize: How image files are cropped and resized; not for data in memory.
        download: Download the data set if it is missing and can be downloaded.
        classes: Names of the classes in the order of their labels, instead of the data set's.
        folds: Divide the training images into this many folds by their identity, for cross-validation; `fold` is held
            out for validation, and `val_split` is not used. The test set stays the same.
        fold: The fold that is held out, from 0 to folds - 1.
        on_device: Keep the images of a data set in memory on the device: each step copies only indices and augmentation
            parameters, and gathers, crops, flips and mixes there. The weights are the same bits. auto: on a GPU, if the
            images take less than a tenth of its free memory. Not for image files, nor with `augment.transforms`.

    Attributes:
        augment_seed: Seed of the augmentation, where it differs from `seed`.
    """

    def __init__(
        self,
        dataset: ImageSource,
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_split: int | float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int | None = None,
        augment: Augment = Augment(),  # noqa: B008 - frozen
        resize: ResizeConfig = ResizeConfig(),  # noqa: B008 - frozen
        download: bool = True,
        classes: list[str] | None = None,
        folds: int | None = None,
        fold: int | None = None,
        on_device: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise UserError(f"data.{name} must be at least 1, got {size}")
        check_folds(folds, fold)
        self.dataset, self.augment, self.resize, self.classes = dataset, augment, resize, classes
        self.root = Path(root or os.environ.get("RESLAB_DATA") or "data").expanduser()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_split, self.split_seed, self.seed = val_split, split_seed, seed
        self.folds, self.fold = folds, fold
        self.augment_seed: int | None = None
        self.num_workers, self.download, self.on_device = num_workers, download, on_device
        self._device_images: dict[Arrays, Tensor] = {}

    @cached_property
    def class_names(self) -> list[str]:
        return self.classes or self._dataset_classes()

    def _dataset_classes(self) -> list[str]:
        names = self.call("classes")
        if not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{self._source}.classes must return a list of names, got {names!r}")
        for name in names:
            if name != printable(name):
                raise DataError(f"the class name {name} is not valid UTF-8: rename the class or its directory")
        return list(names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return len(self.dataset.mean)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input in evaluation."""
        return self.channels, self.image_size, self.image_size

    @property
    def image_size(self) -> int:
        """Side of the images in evaluation; networks with a fixed image size follow it."""
        return self.resize.test_size or self.dataset.image_size

    @property
    def test_resize(self) -> int:
        default = round(self.image_size * 256 / 224) if self.resize.test_size else self.dataset.resize
        return self.resize.test_resize or default

    @property
    def _source(self) -> str:
        return type(self.dataset).__name__

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the data set; any exception of its code becomes a DataError with the cause."""
        try:
            return getattr(self.dataset, method)(self.root, *arguments)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            cause = str(error).strip().rpartition("\n")[2]
            raise DataError(f"{self._source}.{method} failed: {type(error).__name__}: {cause}") from error

    def _load(self, split: Split) -> Arrays | Files:
        data = self.call("load", split)
        if not isinstance(data, Arrays | Files):
            raise DataError(
                f"{self._source}.load must return reslab.data.datasets.Arrays or the Files of "
                f"reslab.data.files.file_table, got {type(data).__name__}"
            )
        return data

    def prepare_data(self) -> None:
        self.call("prepare", self.download)

    def setup(self, stage: str | None = None) -> None:
        """Load the data and check everything that can be checked before the first step.

        Raises:
            DataError: Data are missing, damaged, or have labels outside the classes.
            UserError: A batch size, validation split or list of classes does not fit the data or the devices.
        """
        if self.classes and len(self.classes) != (count := len(self._dataset_classes())):
            raise UserError(f"data.classes has {len(self.classes)} names, but the data set has {count} classes")
        self._check_data(self.train_data, "training")
        self._check_data(self.test_data, "test")
        self._check_on_device()
        if stage in (None, "fit"):
            self._check_batch_size()
            self._check_resize()

    def _check_data(self, data: Arrays | Files, name: str) -> None:
        wrong = data.labels[(data.labels < 0) | (data.labels >= self.num_classes)]
        if len(wrong):
            raise DataError(
                f"{len(wrong)} {name} labels are outside 0 to {self.num_classes - 1} "
                f"({self.num_classes} classes), the first is {wrong[0]}"
            )
        if isinstance(data, Arrays) and data.images.shape[3] != self.channels:
            raise DataError(
                f"{self._source} has {name} images of {data.images.shape[3]} channels, shape {data.images.shape}, but "
                f"a mean of {self.channels} values: return (n, H, W, C) and give one mean and std per channel"
            )

    @cached_property
    def train_data(self) -> Arrays | Files:
        """All training images, including those held out for validation."""
        return self._load("train")

    @cached_property
    def test_data(self) -> Arrays | Files:
        return self._load("test")

    @cached_property
    def split(self) -> tuple[Ints, Ints]:
        """Indices of `train_data` for training and for validation."""
        images = self.train_data
        if self.folds is not None and self.fold is not None:
            return fold_out(images.keys, images.labels, self.folds, self.fold, self.split_seed)
        if not self.val_split:
            return np.arange(len(images)), np.arange(0)
        return hold_out(images.keys, images.labels, self.val_split, self.split_seed)

    def _check_batch_size(self) -> None:
        accumulate, world, _ = self._parts
        size, parts = self.batch_size, accumulate * world
        split = f"{world} devices × {accumulate} accumulated batches"
        if rest := size % parts:
            low = f"{size - rest} or " if size > parts else ""
            problem = f"is not a multiple of {split}: use {low}{size - rest + parts}"
        elif self.augment.mixes and size // parts % 2:
            problem = f"leaves {split} an odd number of images each, but mixup and cutmix mix pairs: use {size + parts}"
        elif size > (train := len(self.split[0])):
            problem = f"is larger than the number of training images ({train}): use at most {train // parts * parts}"
        else:
            return
        raise UserError(f"data.batch_size {size} {problem}")

    def _check_resize(self) -> None:
        if isinstance(self.train_data, Arrays) and self.resize != ResizeConfig():
            raise UserError("data.resize requires a data set of image files: the images of this one have a fixed size")
        if self.resize.scaled_decode and simplejpeg is None:
            raise UserError("data.resize.scaled_decode requires simplejpeg: pip install 'reslab[fast]', or remove it")
        if self.test_resize < self.image_size:
            raise UserError(f"data.resize.test_resize {self.test_resize} is below the test size {self.image_size}")

    def _check_on_device(self) -> None:
        if self.on_device is not True:
            return
        if isinstance(self.train_data, Files) or isinstance(self.test_data, Files):
            raise UserError(f"data.on_device true requires images in memory, but {self._source} reads files: use auto")
        if self.augment.transforms:
            raise UserError("data.augment.transforms run on the CPU: data.on_device must be auto or false, got true")

    @property
    def _parts(self) -> tuple[int, int, int]:
        """Micro-batches per optimizer step, number of ranks, this rank."""
        if self.trainer is None:
            return 1, 1, 0
        return self.trainer.accumulate_grad_batches, self.trainer.world_size, self.trainer.global_rank

    def _position(self) -> tuple[int, int] | None:
        # Lightning counts the batches taken and restores the count from a checkpoint, so the loader needs no state to
        # resume in the middle of an epoch.
        if self.trainer is None or not self.trainer.training:
            return None
        return batches_taken(self.trainer), int(self.trainer.num_training_batches)

    def train_dataloader(self) -> DataLoader[Batch]:
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise UserError("trainer.overfit_batches would replace the sampler: use trainer.limit_train_batches")
        # Lightning warns that the loader is not stateful; it does not need to be.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch")
        repeats, n = self.augment.repeats, len(self.train_data)
        sampler = TrainOrder(self.split[0], self.seed, self.batch_size, *self._parts, repeats, n, self._position)
        return self._loader(self._batches(self.train_data, self._train_sizes(), self.augment), sampler)

    def _batches(self, data: Arrays | Files, sizes: tuple[int, ...], augment: Augment | None = None) -> Dataset[Batch]:
        seed = self.seed if self.augment_seed is None else self.augment_seed
        if isinstance(data, Arrays):
            return ArrayBatches(data, augment, seed)
        view = self.channels, self.dataset.apply_exif_orientation, sizes, self.test_resize
        return FileBatches(data, *view, augment, seed, self.resize.scaled_decode)

    @property
    def _device(self) -> torch.device | None:
        return self.trainer.strategy.root_device if self.trainer else None

    @property
    def trains_on_device(self) -> bool:
        """Whether the training images live on the device, see `on_device`; without a Trainer, they do not."""
        return self._lives_on_device(self.train_data, self.augment)

    def _lives_on_device(self, data: Arrays | Files, augment: Augment) -> bool:
        device = self._device
        if device is None or isinstance(data, Files) or augment.transforms:
            return False
        if self.on_device != "auto" or device.type != "cuda":
            return self.on_device is True
        free, _ = torch.cuda.mem_get_info(device)
        return data in self._device_images or data.images.nbytes < DEVICE_MEMORY_SHARE * free

    def _images_on_device(self, data: Arrays) -> Tensor:
        """Return all images as one tensor on the device; copied on the first call only."""
        if data not in self._device_images:
            self._device_images[data] = torch.tensor(np.ascontiguousarray(data.images), device=self._device)
        return self._device_images[data]

    def _train_sizes(self) -> tuple[int, ...]:
        """Return the side of the images in each epoch; only the final one if no trainer knows the number of epochs."""
        final, trainer = self.resize.train_size or self.dataset.image_size, self.trainer
        if self.resize.progressive is None or trainer is None:
            return (final,)
        accumulate, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
        batches = len(self.split[0]) // self.batch_size * accumulate
        taken = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
        steps = max(taken // accumulate, 1)
        epochs = [n for n in (trainer.max_epochs or -1, -(-trainer.max_steps // steps)) if n > 0]
        if not epochs:
            raise UserError("data.resize.progressive requires trainer.max_epochs or trainer.max_steps")
        return self.resize.progressive.sizes(final, min(epochs))

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not len(self.split[1]):
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # as configured
            return []
        return self._eval_loader(self.train_data, self.split[1])

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader(self.test_data, np.arange(len(self.test_data)))

    def test_images(self, indices: Ints) -> Tensor:
        """Return the test images at these positions as evaluation loads them, uint8 (N, H, W, C)."""
        return self._batches(self.test_data, (self.image_size,))[BatchKey(indices)].images

    def unaugmented_images(self, count: int) -> Tensor:
        """Return `count` evenly spaced training images, preprocessed as in evaluation: float32 (N, C, H, W)."""
        train = self.split[0]
        indices = train[np.linspace(0, len(train) - 1, min(count, len(train))).astype(np.int64)]
        images = self._batches(self.train_data, (self.image_size,))[BatchKey(indices)].images
        return normalize(images, self.dataset.mean, self.dataset.std)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    def folder_dataloader(self, folder: str | Path, skip_unreadable: bool = False) -> DataLoader[FolderBatch]:
        """Return a loader of all image files below a directory, sorted by name, preprocessed as in evaluation.

        Files are listed one directory at a time, so a directory tree of any size can be loaded. With `skip_unreadable`,
        unreadable files are reported in `FolderBatch.unreadable` instead of raising a DataError.
        """
        if not Path(folder).is_dir():
            raise DataError(f"{folder} is not a directory or does not exist")
        view = self.channels, self.dataset.apply_exif_orientation, self.image_size, self.test_resize
        batches = FolderBatches(Path(folder), *view, skip_unreadable)
        return self._loader(batches, FolderOrder(Path(folder), self._eval_size))

    @property
    def _eval_size(self) -> int:
        accumulate, world, _ = self._parts
        return self.eval_batch_size or self.batch_size // (accumulate * world) or 1

    def _eval_loader(self, data: Arrays | Files, indices: Ints) -> DataLoader[Batch]:
        _, world, rank = self._parts
        return self._loader(self._batches(data, (self.image_size,)), EvalOrder(indices, self._eval_size, world, rank))

    def _loader(self, batches: Any, sampler: Iterable[Any]) -> DataLoader[Any]:
        workers = self.num_workers
        if workers is None:
            devices = self.trainer.num_devices if self.trainer else 1
            workers = 0 if isinstance(batches, ArrayBatches) else max(1, available_cores() // devices)
        device, images = self._device, None
        if isinstance(batches, ArrayBatches) and self._lives_on_device(batches.arrays, batches.augment):
            images, batches = self._images_on_device(batches.arrays), batches.without_images()
        return LazyLoader(
            batches,
            batch_size=None,  # a key is a whole batch
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device is not None and device.type == "cuda",
            device=None if isinstance(batches, FolderBatches) else device,
            images=images,
            worker_init_fn=ignore_job_signals,
            generator=torch.Generator(),  # without it, each iterator would advance torch's global generator
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Augment (in training) and normalise a batch on its device: uint8 (N, H, W, C) -> float (N, C, H, W)."""
        mean, std = self.dataset.mean, self.dataset.std
        if batch.augment_params.shape[1]:
            images = self.augment.apply(batch.images, batch.augment_params, mean, std)
        else:
            images = normalize(batch.images, mean, std)
        images, lam = mix(images, batch.mix) if len(batch.mix) else (images, batch.mix)
        if self.trainer:
            images = self.trainer.precision_plugin.convert_input(images)  # half or double precision
        return batch._replace(images=images, mix=lam)

    def identity(self) -> DataIdentity:
        """Return what identifies the data: images, labels, split and classes."""
        return identify(self.train_data, self.test_data, self.split, self.class_names)

    def notes(self) -> list[str]:
        """Describe what may be wrong with the data, one line each: skipped files, images in two classes or splits."""
        train, test = self.train_data, self.test_data
        lines = [*_notes_on(train, "training"), *_notes_on(test, "test"), *_overlap(train, test)]
        if self.folds and self.val_split:
            fold = f"fold {self.fold} of {self.folds} (from 0), {len(self.split[1]):,} of {len(train):,} images"
            lines.append(f"validation is {fold}; data.val_split {self.val_split} is not used")
        return [printable(line) for line in lines]

    def preview(self, n_images: int = 8, n_epochs: int = 8) -> tuple[np.ndarray, list[str]]:
        """Return training images as seen in the first epochs, uint8 (images, epochs, H, W, C), and their classes."""
        batches, train = self._batches(self.train_data, self._train_sizes(), self.augment), self.split[0]
        rows = train[np.linspace(0, len(train) - 1, n_images + n_images % 2).astype(int)]  # even: may be mixed in pairs
        augmented = [self.on_after_batch_transfer(batches[BatchKey(rows, epoch)]).images for epoch in range(n_epochs)]
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.dataset.mean, self.dataset.std))
        pixels = ((torch.stack(augmented, 1).float() * std + mean) * 255).round().clamp(0, 255).byte()
        names = [self.class_names[label] for label in self.train_data.labels[rows]]
        return pixels.permute(0, 1, 3, 4, 2)[:n_images].numpy(), names[:n_images]


def _notes_on(data: Arrays | Files, name: str) -> list[str]:
    """Describe the skipped files of one split, and its images that are in several classes."""
    lines = data.skipped.notes() if isinstance(data, Files) else []
    by_picture = np.argsort(data.pictures, kind="stable")
    a, b = by_picture[:-1], by_picture[1:]
    pairs = np.flatnonzero((data.pictures[a] == data.pictures[b]) & (data.labels[a] != data.labels[b]))
    if len(pairs):
        example = pairs[
            a[pairs].argmin()
        ]  # the first in the order of files: `pictures` are numbered by the file system
        first = a[example], b[example]
        count, names = len(np.unique(data.pictures[a[pairs]])), " and ".join(data.describe(i) for i in first)
        lines.append(f"images in several classes: {count:,}, such as {names}")
    return [f"{name} data: {line}" for line in lines]


def _overlap(train: Arrays | Files, test: Arrays | Files) -> list[str]:
    """Describe images that are both in training and test data."""
    if isinstance(train, Files) and isinstance(test, Files):
        a, b = (Path(os.path.realpath(data.folder)) for data in (train, test))
        if a == b:
            return [f"training and test data are the same directory: {test.folder}"]
        if a in b.parents or b in a.parents:
            inner, outer = ("test", "training") if a in b.parents else ("training", "test")
            return [f"the directory of {inner} data is inside that of {outer} data: {max(a, b)}"]
    if type(train) is not type(test):
        return []
    shared = np.flatnonzero(np.isin(test.pictures, train.pictures))
    if not len(shared):
        return []
    first = int(np.argmax(train.pictures == test.pictures[shared[0]]))
    names = f"{train.describe(first)} and {test.describe(shared[0])}"
    return [f"test images that are also training images: {len(shared):,}, such as {names}"]
