"""Samplers: which samples are in which batch.

They run in the main process and yield one key per batch. Everything random about a batch is a function of its key, so
the number of loader workers cannot change a batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import DistributedSampler

from reslab.data import order
from reslab.data.files import IMAGE_TYPES, DataError, Walk
from reslab.data.order import Ints


class BatchKey(NamedTuple):
    """What determines a batch: the indices of its samples, the epoch, and the optimizer step within the epoch."""

    indices: Ints
    epoch: int = 0
    step: int = 0


@dataclass(eq=False, repr=False)
class TrainOrder(DistributedSampler[BatchKey]):
    """Yield the keys of this rank's micro-batches.

    A DistributedSampler, so that Lightning does not add one.

    Args:
        subset: Indices of the training samples.
        batch_size, accumulate, world, rank: See `order.micro_batch`.
        repeats, n: See `order.repeat`.
        position: Returns (micro-batches taken since training began, micro-batches per epoch), or None if no trainer
            counts them: each iteration is then the next epoch.
    """

    subset: Ints
    seed: int
    batch_size: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0
    repeats: int = 1
    n: int = 0
    position: Callable[[], tuple[int, int] | None] = lambda: None
    epoch: int = field(default=0, init=False)

    def __len__(self) -> int:
        return len(self.subset) // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[BatchKey]:
        # A generator, so that the position is read when the first key is requested: a DataLoader with workers creates
        # two iterators and uses one.
        taken, epoch_length = self.position() or (self.epoch * len(self), len(self))
        epoch, first = divmod(taken, epoch_length)
        self.epoch = epoch + 1
        samples = self.subset[order.permutation(self.seed, epoch, len(self.subset))]
        if self.repeats > 1:
            samples = order.repeat(samples, self.repeats, self.batch_size, self.n)
        for i in range(first, epoch_length):
            indices = order.micro_batch(samples, i, self.batch_size, self.accumulate, self.world, self.rank)
            yield BatchKey(indices, epoch, step=i // self.accumulate)


class EvalOrder(DistributedSampler[BatchKey]):
    """Yield the keys of this rank's evaluation batches: each sample once over all ranks, padded with index -1."""

    def __init__(self, subset: Ints, batch_size: int, world: int = 1, rank: int = 0) -> None:
        self.share = order.evaluation_share(subset, world, rank)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.share) // self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        for start in range(0, len(self.share), self.batch_size):
            yield BatchKey(self.share[start : start + self.batch_size])


class FolderOrder:
    """Yield (number of images before this batch, names of its images) for a directory, in sorted order."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        walk, count = Walk(self.folder), 0
        names = walk.images()
        while batch := list(islice(names, self.batch_size)):
            yield count, batch
            count += len(batch)
        if not count:
            raise DataError(
                "; ".join([f"{self.folder} contains no image files ({IMAGE_TYPES})", *walk.skipped.notes()])
            )
